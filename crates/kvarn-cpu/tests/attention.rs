//! Attention and expansion over records and slots, against float64 over what is stored.

mod common;

use std::sync::Arc;

use common::Rows;
use kvarn::codec::SlotType;
use kvarn::pool::{AttendOptions, LayerShape};
use kvarn::tables::SequenceId;
use kvarn::{Config, ConfigOptions};
use kvarn_cpu::{Pool, encode_tiles};

impl Rows {
    fn row(&self, i: usize, j: usize) -> &[f32] {
        &self.values[(i * self.shape[1] + j) * self.shape[2]..][..self.shape[2]]
    }
}

/// Attention of one query over `keys` and `values` (index, row), and its log-sum-exp.
fn attend_f64<'a>(
    q: &[f32],
    seen: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    scale: f64,
    softcap: Option<f32>,
    sink: Option<f32>,
) -> (Vec<f64>, f64) {
    let mut logits = Vec::new();
    let mut values = Vec::new();
    for (k, v) in seen {
        let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let logit = dot * scale;
        logits.push(softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh()));
        values.push(v);
    }
    let sink = sink.map_or(f64::NEG_INFINITY, f64::from);
    let max = logits.iter().copied().fold(sink, f64::max);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; q.len()], max);
    }
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f64 = weights.iter().sum::<f64>() + (sink - max).exp();
    let mut out = vec![0.0; q.len()];
    for (weight, v) in weights.iter().zip(values) {
        for (out, v) in out.iter_mut().zip(v) {
            *out += weight / sum * f64::from(*v);
        }
    }
    (out, max + sum.ln())
}

fn config(name: &str, head_dim: usize, sink_tokens: usize, recent_tokens: usize) -> Config {
    let options = ConfigOptions::from_name(name, head_dim).unwrap();
    Config::new(&ConfigOptions { sink_tokens: Some(sink_tokens), recent_tokens, ..options }).unwrap()
}

fn pool(config: Config, kv_heads: usize) -> Arc<Pool> {
    let layers = [LayerShape { kv_heads, head_dim: config.head_dim() }];
    Pool::new(config, &layers, 64, 64, SlotType::Float32).unwrap()
}

fn expand(pool: &Pool, id: SequenceId) -> (Rows, Rows) {
    let shape = [
        pool.core().view(id).unwrap().length,
        pool.core().layout().layers[0].shape.kv_heads,
        pool.core().layout().config.head_dim(),
    ];
    let (mut k, mut v) = (Rows::zeros(shape), Rows::zeros(shape));
    pool.expand(id, 0, 0, false, &k.tensor_mut(), &v.tensor_mut()).unwrap();
    (k, v)
}

/// One step of every sequence, checked: returns the outputs.
#[allow(clippy::too_many_arguments)]
fn checked_step(
    pool: &Arc<Pool>,
    ids: &[SequenceId],
    counts: &[usize],
    hold: &[usize],
    group: usize,
    options: &AttendOptions,
    sink_logits: Option<&[f32]>,
    seed: u64,
) -> Rows {
    let (kv_heads, head_dim) =
        (pool.core().layout().layers[0].shape.kv_heads, pool.core().layout().config.head_dim());
    let rows = counts.iter().sum();
    let heads = kv_heads * group;
    let (k, v) =
        (Rows::random([rows, kv_heads, head_dim], seed), Rows::random([rows, kv_heads, head_dim], seed + 1));
    let q = Rows::random([rows, heads, head_dim], seed + 2);
    let step = pool.step(ids, counts, hold).unwrap();
    let mut before = Rows::zeros(q.shape);
    step.attend(0, &q.tensor(), options, sink_logits, &before.tensor_mut(), None).unwrap();
    let stored_before: Vec<_> = ids.iter().map(|&id| expand(pool, id)).collect();
    step.append(0, &k.tensor(), &v.tensor(), false).unwrap();
    let mut out = Rows::zeros(q.shape);
    let mut lse = vec![f32::NAN; rows * heads];
    step.attend(0, &q.tensor(), options, sink_logits, &out.tensor_mut(), Some(&mut lse)).unwrap();
    let starts: Vec<_> =
        step.open().plan().sequences.iter().map(kvarn::tables::SequencePlan::start).collect();
    step.open().finish().unwrap();

    let scale = options.scale.map_or(1.0 / (head_dim as f64).sqrt(), f64::from);
    let mut row = 0;
    for (index, &id) in ids.iter().enumerate() {
        let stored = expand(pool, id);
        for token in 0..counts[index] {
            let position = starts[index] + token;
            for head in 0..heads {
                for (stored, result, lse) in [
                    (&stored_before[index], before.row(row, head), None),
                    (&stored, out.row(row, head), Some(lse[row * heads + head])),
                ] {
                    let (k, v) = stored;
                    let first = (position + 1).saturating_sub(options.window.unwrap_or(usize::MAX));
                    let seen = first.min(k.shape[0])..(position + 1).min(k.shape[0]);
                    let seen = seen.map(|key| (k.row(key, head / group), v.row(key, head / group)));
                    let sink = sink_logits.map(|sinks| sinks[head]);
                    let (expected, expected_lse) =
                        attend_f64(q.row(row, head), seen, scale, options.softcap, sink);
                    let norm =
                        |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
                    let size = norm(&mut expected.iter().copied());
                    let error = norm(&mut result.iter().zip(&expected).map(|(a, b)| f64::from(*a) - b));
                    assert!(
                        // Products with records are of integers: see `attend::integer`.
                        error <= 1e-3 * size + 1e-6,
                        "{counts:?} row {row} head {head}: {error} of {size}"
                    );
                    if let Some(lse) = lse {
                        let close = (f64::from(lse) - expected_lse).abs() < 1e-3;
                        assert!(close || f64::from(lse) == expected_lse, "{lse} {expected_lse}");
                    }
                }
            }
            row += 1;
        }
    }
    out
}

#[test]
fn ragged_steps_agree_with_float64() {
    let sinks: Vec<f32> = (0..6).map(|head| head as f32 - 2.0).collect();
    let plain = AttendOptions::default();
    for (index, (name, head_dim, sink, recent, options)) in [
        ("kvarn_k4v2_g64", 64, 64, 0, plain),
        ("kvarn_k3v3_g64", 96, 16, 5, AttendOptions { window: Some(100), ..plain }),
        ("kvarn_k2v2_g64", 16, 0, 64, AttendOptions { softcap: Some(2.0), scale: Some(0.3), ..plain }),
        ("kvarn_k8v8_g128", 80, 128, 0, plain),
        ("kvarn_k8v4_g128", 256, 32, 200, AttendOptions { window: Some(1), ..plain }),
    ]
    .into_iter()
    .enumerate()
    {
        let pool = pool(config(name, head_dim, sink, recent), 2);
        let ids = [pool.core().create(), pool.core().create(), pool.core().create()];
        for (step, (counts, hold)) in [
            ([1, 130, 700], [0, 0, 0]),
            ([5, 0, 1], [5, 0, 1]),
            ([63, 64, 1], [0, 3, 0]),
            ([1, 1, 1], [1, 1, 1]),
            ([300, 2, 33], [64, 0, 0]),
        ]
        .into_iter()
        .enumerate()
        {
            let logits = (index >= 3).then_some(sinks.as_slice());
            checked_step(&pool, &ids, &counts, &hold, 3, &options, logits, (100 * index + 10 * step) as u64);
        }
        pool.truncate(ids[0], pool.core().view(ids[0]).unwrap().length - 2).unwrap();
        checked_step(&pool, &ids, &[1, 1, 1], &[0, 0, 0], 3, &options, None, 7);
    }
}

#[test]
fn a_sequence_gets_the_same_bits_alone_and_in_a_batch() {
    let config = config("kvarn_k4v2_g64", 64, 64, 0);
    let (alone, batch) = (pool(config, 2), pool(config, 2));
    let (one, many) = (alone.core().create(), [batch.core().create(), batch.core().create()]);
    let rows = |count, seed| Rows::random([count, 2, 64], seed);
    let joined = |a: &Rows, b: &Rows| Rows {
        values: [a.values.as_slice(), b.values.as_slice()].concat(),
        shape: [a.shape[0] + b.shape[0], a.shape[1], a.shape[2]],
    };
    for (step, count) in [900, 1, 1, 70].into_iter().enumerate() {
        let seed = 40 * step as u64;
        let (k, v, q) = (rows(count, seed), rows(count, seed + 1), Rows::random([count, 4, 64], seed + 2));
        let (k2, v2, q2) = (rows(33, seed + 3), rows(33, seed + 4), Rows::random([33, 4, 64], seed + 5));
        let (mut out, mut outs) = (Rows::zeros(q.shape), Rows::zeros([33 + count, 4, 64]));
        let single = alone.step(&[one], &[count], &[0]).unwrap();
        single.append(0, &k.tensor(), &v.tensor(), false).unwrap();
        single.attend(0, &q.tensor(), &AttendOptions::default(), None, &out.tensor_mut(), None).unwrap();
        single.open().finish().unwrap();
        let both = batch.step(&[many[1], many[0]], &[33, count], &[0, 0]).unwrap();
        both.append(0, &joined(&k2, &k).tensor(), &joined(&v2, &v).tensor(), false).unwrap();
        let q = joined(&q2, &q);
        both.attend(0, &q.tensor(), &AttendOptions::default(), None, &outs.tensor_mut(), None).unwrap();
        both.open().finish().unwrap();
        assert_eq!(out.values, outs.values[33 * 4 * 64..]);
    }
}

#[test]
fn cached_and_offline_encoding_agree() {
    for (sink, arrivals) in [(0, vec![64, 64]), (0, vec![1; 128]), (64, vec![100, 28]), (16, vec![128])] {
        let config = config("kvarn_k4v2_g64", 48, sink, 0);
        let pool = pool(config, 1);
        let id = pool.core().create();
        let (k, v) = (Rows::random([128, 1, 48], 3), Rows::random([128, 1, 48], 4));
        let mut row = 0;
        for count in arrivals {
            let part = |all: &Rows| Rows {
                values: all.values[row * 48..(row + count) * 48].to_vec(),
                shape: [count, 1, 48],
            };
            let step = pool.step(&[id], &[count], &[0]).unwrap();
            step.append(0, &part(&k).tensor(), &part(&v).tensor(), false).unwrap();
            step.open().finish().unwrap();
            row += count;
        }
        let record_bytes = config.layout().record_bytes;
        let mut records = vec![0; 2 * record_bytes];
        let tiles = |rows: &Rows| Rows { values: rows.values.clone(), shape: [2, 64, 48] };
        encode_tiles(&config, tiles(&k).tensor(), tiles(&v).tensor(), false, &mut records).unwrap();
        let view = pool.core().view(id).unwrap();
        for tile in usize::from(sink == 64)..2 {
            let page = pool.pages(0).unwrap();
            let at = view.block_table[tile] as usize * record_bytes;
            // SAFETY: the page lies within the pool's memory, which nobody writes now.
            let stored = unsafe { std::slice::from_raw_parts(page.as_ptr().add(at), record_bytes) };
            assert_eq!(stored, &records[tile * record_bytes..][..record_bytes], "sink {sink} tile {tile}");
        }
    }
}

#[test]
fn steps_must_be_whole_and_in_order() {
    let pool = pool(config("kvarn", 64, 128, 0), 1);
    let id = pool.core().create();
    let rows = Rows::random([3, 1, 64], 1);
    let step = pool.step(&[id], &[3], &[0]).unwrap();
    assert!(step.open().finish().unwrap_err().to_string().starts_with("layer 0 has not been appended to"));
    assert!(step.append(1, &rows.tensor(), &rows.tensor(), false).is_err());
    let short = Rows::random([2, 1, 64], 1);
    assert!(
        step.append(0, &rows.tensor(), &short.tensor(), false)
            .unwrap_err()
            .to_string()
            .contains("[2, 1, 64]")
    );
    step.append(0, &rows.tensor(), &rows.tensor(), false).unwrap();
    assert!(step.append(0, &rows.tensor(), &rows.tensor(), false).is_err());
    assert!(pool.core().free(id).is_err());
    drop(step);
    assert_eq!(pool.core().stats().tables.slots.used, 0);
    let step = pool.step(&[id], &[3], &[0]).unwrap();
    step.append(0, &rows.tensor(), &rows.tensor(), false).unwrap();
    step.open().finish().unwrap();
    assert!(step.open().finish().is_err() && step.append(0, &rows.tensor(), &rows.tensor(), false).is_err());
    assert_eq!(pool.core().view(id).unwrap().length, 3);
}

#[test]
fn non_finite_and_huge_values_are_counted_and_stay_where_they_are() {
    let config = config("kvarn_k4v2_g64", 64, 0, 0);
    let layers = [LayerShape { kv_heads: 2, head_dim: 64 }];
    let pool = Pool::new(config, &layers, 4, 4, SlotType::Float32).unwrap();
    let (good, bad) = (pool.core().create(), pool.core().create());
    let mut rows = Rows::random([128, 2, 64], 9);
    for id in [good, bad] {
        if id == bad {
            rows.values[5 * 128 + 3] = f32::NAN;
            rows.values[7 * 128 + 9] = f32::INFINITY;
            rows.values[9 * 128 + 1] = 3e38;
        }
        let step = pool.step(&[id], &[128], &[0]).unwrap();
        let counts = step.append(0, &rows.tensor(), &rows.tensor(), false).unwrap();
        step.open().finish().unwrap();
        assert_eq!(counts.non_finite, if id == bad { 4 } else { 0 });
        assert_eq!(counts.saturated > 0, id == bad);
    }
    let ((k, v), (k_bad, v_bad)) = (expand(&pool, good), expand(&pool, bad));
    assert!(k_bad.values.iter().chain(&v_bad.values).all(|value| value.is_finite()));
    for token in 0..128 {
        assert_eq!((k.row(token, 1), v.row(token, 1)), (k_bad.row(token, 1), v_bad.row(token, 1)));
    }
    assert_eq!(&k.values[64 * 128..], &k_bad.values[64 * 128..]);
}
