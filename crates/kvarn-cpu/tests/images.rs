//! Sequences that leave a pool and come back: the same bytes, wherever they lie.

mod common;

use std::sync::Arc;

use common::Rows;
use kvarn::codec::SlotType;
use kvarn::pool::LayerShape;
use kvarn::tables::SequenceId;
use kvarn::{Config, ConfigOptions};
use kvarn_cpu::Pool;

const LAYERS: [LayerShape; 2] =
    [LayerShape { kv_heads: 2, head_dim: 32 }, LayerShape { kv_heads: 1, head_dim: 64 }];

fn pool(pages: usize, slots: usize) -> Arc<Pool> {
    let options = ConfigOptions {
        sink_tokens: Some(16),
        recent_tokens: 20,
        ..ConfigOptions::from_name("kvarn_k3v2_g64", 32).unwrap()
    };
    Pool::new(Config::new(&options).unwrap(), &LAYERS, pages, slots, SlotType::Float32).unwrap()
}

fn append(pool: &Arc<Pool>, id: SequenceId, count: usize, hold: usize, seed: u64) {
    let step = pool.step(&[id], &[count], &[hold]).unwrap();
    for (layer, LayerShape { kv_heads, head_dim }) in LAYERS.into_iter().enumerate() {
        let rows = |seed| Rows::random([count, kv_heads, head_dim], seed);
        step.append(layer, &rows(seed).tensor(), &rows(seed + 1).tensor(), false).unwrap();
    }
    step.open().finish().unwrap();
}

fn saved(pool: &Pool, id: SequenceId) -> Vec<u8> {
    let saved = pool.save(id).unwrap();
    [&saved.header[..], &saved.image].concat()
}

fn expand(pool: &Pool, id: SequenceId) -> Vec<Vec<f32>> {
    let length = pool.core().view(id).unwrap().length;
    let mut all = Vec::new();
    for (layer, LayerShape { kv_heads, head_dim }) in LAYERS.into_iter().enumerate() {
        let [mut k, mut v] = [(); 2].map(|()| Rows::zeros([length, kv_heads, head_dim]));
        pool.expand(id, layer, 0, false, &k.tensor_mut(), &v.tensor_mut()).unwrap();
        all.extend([k.values, v.values]);
    }
    all
}

#[test]
fn bytes_do_not_depend_on_pages_and_what_else_is_in_slots() {
    for (length, hold) in [(0, 0), (1, 0), (64, 0), (83, 3), (84, 0), (300, 7), (320, 0)] {
        let (one, other) = (pool(16, 16), pool(16, 16));
        let a = one.core().create();
        if length > 0 {
            append(&one, a, length, hold, 5);
        }
        let file = saved(&one, a);
        assert_eq!(file, saved(&one, a));

        // Slots and pages that others have used.
        let [first, second] = [(); 2].map(|()| other.core().create());
        append(&other, first, 250, 0, 7);
        append(&other, second, 130, 0, 9);
        other.core().free(first).unwrap();
        let b = other.core().create();
        if length > 0 {
            append(&other, b, length, hold, 5);
        }
        assert_eq!(saved(&other, b), file, "{length} tokens");
        let loaded = other.load(&mut file.as_slice()).unwrap();
        let views = [one.core().view(a).unwrap(), other.core().view(loaded).unwrap()];
        assert_eq!((views[0].length, views[0].committed), (views[1].length, views[1].committed));
        assert_eq!(expand(&other, loaded), expand(&one, a));
        assert_eq!(saved(&other, loaded), file);

        // It goes on as the one that was saved.
        append(&one, a, 90, 2, 11);
        append(&other, loaded, 90, 2, 11);
        assert_eq!(saved(&other, loaded), saved(&one, a));
    }
}

#[test]
fn a_restored_sequence_is_as_before() {
    let pool = pool(8, 8);
    let (a, b) = (pool.core().create(), pool.core().create());
    append(&pool, a, 300, 0, 5);
    append(&pool, b, 10, 0, 6);
    let fork = pool.core().fork(a).unwrap();
    let (before, values) = (saved(&pool, a), expand(&pool, a));
    let stats = pool.core().stats();
    pool.offload(a).unwrap();
    let now = pool.core().stats();
    assert_eq!(now.tables, stats.tables, "the fork has all of it still");
    assert_eq!((now.offloaded.sequences, now.offloaded.bytes), (1, before.len() - 128));
    assert_eq!(saved(&pool, a), before);
    pool.offload(fork).unwrap();
    assert_eq!(pool.core().stats().tables.pages.used, 0);
    append(&pool, b, 290, 0, 8);
    pool.restore(a).unwrap();
    assert_eq!(expand(&pool, a), values);
    // The other does not fit beside it: nothing changes.
    let stats = pool.core().stats();
    let error = pool.restore(fork).unwrap_err().to_string();
    assert!(error.contains("which need 4 pages with 0 free and 2 slots with 4 free"), "{error}");
    assert_eq!(pool.core().stats(), stats);
    pool.core().free(fork).unwrap();
    assert_eq!(pool.core().stats().offloaded.sequences, 0);
    assert_eq!(saved(&pool, a), before);
}

#[test]
fn a_file_that_does_not_fit_or_is_damaged_changes_nothing() {
    let (one, small) = (pool(8, 8), pool(3, 8));
    let a = one.core().create();
    append(&one, a, 300, 0, 5);
    let mut file = saved(&one, a);
    let stats = small.core().stats();
    let error = small.load(&mut file.as_slice()).unwrap_err().to_string();
    assert!(error.contains("4 pages with 3 free"), "{error}");
    *file.last_mut().unwrap() ^= 1;
    let error = one.load(&mut file.as_slice()).unwrap_err().to_string();
    assert!(error.contains("slot checksum"), "{error}");
    assert_eq!(small.core().stats(), stats);
    assert_eq!(one.core().stats().tables.sequences, 1);
}

#[test]
fn a_sequence_in_an_open_step_stays_where_it_is() {
    let pool = pool(8, 8);
    let a = pool.core().create();
    append(&pool, a, 300, 0, 5);
    let step = pool.step(&[a], &[1], &[0]).unwrap();
    for error in [pool.save(a).map(drop).unwrap_err(), pool.offload(a).unwrap_err()] {
        assert!(error.to_string().contains("which is in open step"), "{error}");
    }
    drop(step);
    pool.offload(a).unwrap();
}
