//! Attention against float64 over the model's tokens.

use fastrand::Rng;
use kvarn::Side;
use kvarn::pool::AttendOptions;

use crate::common::{Rows, attend_f64};
use crate::open_step::OpenStep;
use crate::world::World;

/// Norm of the error over that of the result. The contract allows 2e-3; this backend computes in float32, and a bound as
/// near as this one notices a single wrong token among a thousand.
const TOLERANCE: f64 = 5e-5;

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
        let q = Rows::random([rows, heads, at.head_dim], random.u64(..));
        let mut out = Rows::zeros(q.shape);
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
            let (expected, expected_lse) = attend_f64(&query, seen.into_iter(), scale, options.softcap, sink);
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut result.iter().zip(&expected).map(|(a, b)| f64::from(*a) - b));
            // Where values cancel, the result is held against the size of what was summed.
            let size = norm(&mut expected.iter().copied()).max(0.1 * (at.head_dim as f64).sqrt() * rms);
            let logit_error = LOGIT_ERROR * scale * square(&query).sqrt() * longest_key;
            assert!(
                error <= (TOLERANCE + 2.0 * logit_error) * size,
                "attention of layer {layer}, head {head}, position {position}, {options:?}: error {error} of {size}"
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
