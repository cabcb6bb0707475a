//! Attention against float64 over the model's tokens.

use fastrand::Rng;
use kvarn::Side;
use kvarn::pool::AttendOptions;

use crate::floats::Floats;
use crate::open_step::OpenStep;
use crate::world::World;

/// Norm of the error over that of the result. The contract allows 2e-3; a bound as near as this one notices a single wrong
/// token among some hundreds.
const TOLERANCE: f64 = 8e-4;

/// What a float32 sum may lose, relative to the sizes of its vectors. An error of a logit is one of the result.
const LOGIT_ERROR: f64 = 4e-7;

impl World {
    /// Attends in one layer and checks one head of a few queries.
    pub(crate) fn check_attention(&self, open: &OpenStep, layer: usize, random: &mut Rng) {
        let at = &self.codec.layers[layer];
        let rows = open.members.iter().map(|member| member.count).sum();
        let ratio = random.usize(1..=3);
        let heads = at.kv_heads * ratio;
        let options = AttendOptions {
            scale: (random.u8(..3) == 0).then_some(0.3),
            window: (random.u8(..3) == 0).then(|| random.usize(1..200)),
            softcap: (random.u8(..4) == 0).then_some(3.0),
            rotated: random.bool(),
        };
        let sinks: Option<Vec<f32>> =
            (random.u8(..3) == 0).then(|| (0..heads).map(|_| random.f32() * 4.0 - 2.0).collect());
        let q = Floats::random([rows, heads, at.head_dim], random);
        let mut out = Floats::zeros(q.shape);
        let mut lse = vec![f32::NAN; rows * heads];
        let (tensor, sink) = (out.tensor_mut(), sinks.as_deref());
        open.step.attend(layer, &q.tensor(), &options, sink, &tensor, Some(&mut lse)).unwrap();

        let appended = open.appended[layer];
        let scale = options.scale.map_or(1.0 / (at.head_dim as f64).sqrt(), f64::from);
        for member in open.members.iter().filter(|member| member.count > 0) {
            let stored = if appended { &member.after } else { &self.sequence(member.id).stored };
            let (index, head) = (random.usize(..member.count), random.usize(..heads));
            let (row, position) = (member.first_row + index, member.start + index);
            let end = stored.length().min(position + 1);
            let first = (position + 1).saturating_sub(options.window.unwrap_or(usize::MAX)).min(end);
            let seen = stored.tokens[first..end].iter();
            let seen: Vec<(&[f32], &[f32])> = seen
                .map(|token| {
                    let part = |side| at.part(token, side, head / ratio);
                    (part(Side::Key), part(Side::Value))
                })
                .collect();
            let values: f64 = seen.iter().map(|(_, v)| square(v)).sum();
            let rms = (values / (seen.len() * at.head_dim).max(1) as f64).sqrt();
            let longest_key = seen.iter().map(|(k, _)| square(k)).fold(0.0, f64::max).sqrt();

            let (mut query, mut result) = (q.row(row, head).to_vec(), out.row(row, head).to_vec());
            if !options.rotated {
                at.rotation.apply(&mut query);
                at.rotation.apply(&mut result);
            }
            let sink = sinks.as_ref().map(|sinks| sinks[head]);
            let (expected, expected_lse) = attend(&query, &seen, scale, options.softcap, sink);
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut result.iter().zip(&expected).map(|(a, b)| f64::from(*a) - b));
            // Where values cancel, the result is held against the size of what was summed.
            let size = norm(&mut expected.iter().copied()).max(0.1 * (at.head_dim as f64).sqrt() * rms);
            let logit_error = LOGIT_ERROR * scale * square(&query).sqrt() * longest_key;
            assert!(
                error <= (TOLERANCE + 2.0 * logit_error) * size,
                "attention of layer {layer}, head {head}, position {position}, {options:?}: error {error} of {size}, of a logit \
                 {logit_error}"
            );
            let lse = f64::from(lse[row * heads + head]);
            assert!(
                lse == expected_lse || (lse - expected_lse).abs() <= TOLERANCE + 2.0 * logit_error,
                "log-sum-exp of layer {layer}, head {head}, position {position}: {lse}, but the model has {expected_lse}"
            );
        }
    }
}

fn square(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum()
}

/// One query's attention in float64 over keys and values, and its log-sum-exp.
fn attend(
    query: &[f32],
    seen: &[(&[f32], &[f32])],
    scale: f64,
    softcap: Option<f32>,
    sink: Option<f32>,
) -> (Vec<f64>, f64) {
    let logit = |key: &[f32]| {
        let logit = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * scale;
        softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
    };
    let logits: Vec<f64> = seen.iter().map(|(key, _)| logit(key)).collect();
    let sink = sink.map_or(f64::NEG_INFINITY, f64::from);
    let most = logits.iter().copied().fold(sink, f64::max);
    let mut out = vec![0.0; query.len()];
    if most == f64::NEG_INFINITY {
        return (out, most);
    }
    let sum = logits.iter().map(|logit| (logit - most).exp()).sum::<f64>() + (sink - most).exp();
    for (logit, (_, values)) in logits.iter().zip(seen) {
        let weight = (logit - most).exp() / sum;
        for (out, value) in out.iter_mut().zip(*values) {
            *out += weight * f64::from(*value);
        }
    }
    (out, most + sum.ln())
}
