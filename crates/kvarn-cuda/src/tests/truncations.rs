//! Truncations with the double, which records launches without running them; `double` starts each in a process of its own.

use std::mem::offset_of;
use std::sync::Arc;

use kvarn::tables::SequenceId;

use super::cases::{CAPTURING, STREAM, books, read};
use super::steps::*;
use crate::params::{ExpandParams, Tensor};
use crate::{Error, ErrorKind, Pool, PoolOptions};

fn int(launch: u64, offset: usize) -> i32 {
    i32::from_ne_bytes(parameter(launch, offset))
}

/// Address and strides of a tensor among the parameters.
fn rows(launch: u64, offset: usize) -> (u64, [i64; 2]) {
    let stride = |field| i64::from_ne_bytes(parameter(launch, offset + field));
    (
        address(launch, offset + offset_of!(Tensor, data)),
        [stride(offset_of!(Tensor, row_stride)), stride(offset_of!(Tensor, head_stride))],
    )
}

/// What a truncation must not change if it fails: tables, lengths, usage.
fn state(pool: &Arc<Pool>, sequence: SequenceId) -> impl PartialEq + std::fmt::Debug + use<> {
    (pool.core().view(sequence).unwrap(), pool.core().stats())
}

fn sets_variable(name: &str, value: &str) {
    // SAFETY: no other thread reads or writes variables.
    unsafe { std::env::set_var(name, value) };
}

/// Has the next call of a function of the driver give a code.
fn fail_next(call: &std::ffi::CStr, code: u32) {
    let next = calls(call) + 1;
    sets_variable("DOUBLE_FAIL", &format!("{}:{next}:{code}", call.to_str().unwrap()));
}

#[test]
#[ignore = "needs the double"]
fn record_cut() {
    for check in [false, true] {
        let pool = made(16, 16, PoolOptions { check, ..PoolOptions::default() }).unwrap();
        let (other, sequence) = (pool.core().create(), pool.core().create());
        prompt(&pool, &[other], 2 * G + 1);
        prompt(&pool, &[sequence], 3 * G + 5);
        let fork = pool.core().fork(sequence).unwrap();
        let (first, sent) = (books("double_launches"), calls(c"cuMemcpyHtoDAsync_v2"));
        pool.truncate(sequence, G + 10, STREAM).unwrap();
        assert_eq!(books("double_launches") - first, LAYERS as u64);
        // The tables are sent once, for all layers.
        assert_eq!(calls(c"cuMemcpyHtoDAsync_v2") - sent, 1);
        let view = pool.core().view(sequence).unwrap();
        assert_eq!((view.length, view.sealed), (G + 10, 1));
        assert_eq!((&*view.block_table, &*view.slot_table), (&vec![2, -1], &vec![-1, 2]));
        for (index, layer) in pool.core().layout().layers.iter().enumerate() {
            let launch = first + index as u64;
            // A warp decodes 64 tokens of K or V of one head, a block has four.
            assert_eq!(launched(launch), [EXPAND, 2 * KV_HEADS as u64 / 4, 0x51]);
            // Ten tokens from the tile's first on, of a tile that is past the sinks, in the rotated frame, as half.
            assert_eq!(int(launch, offset_of!(ExpandParams, first)), G as i32);
            assert_eq!(int(launch, offset_of!(ExpandParams, tokens)), 10);
            assert_eq!(int(launch, offset_of!(ExpandParams, rotated)), 1);
            assert_eq!(int(launch, offset_of!(ExpandParams, dtype)), 0);
            assert_eq!(int(launch, offset_of!(ExpandParams, sink_tokens)), 0);
            // From the tile's page, by the tables before the cut.
            assert_eq!(read(address(launch, offset_of!(ExpandParams, block_table)), 4), [2, 3, 4, -1]);
            assert_eq!(read(address(launch, offset_of!(ExpandParams, slot_table)), 4), [-1, -1, -1, 1]);
            // To the slot `[kv_heads, 2, group, head_dim]`, which was zero.
            let slot = pool.cache(layer).slots + 2 * layer.slot_bytes as u64;
            let matrix = (G * G) as i64;
            let strides = [G as i64, 2 * matrix];
            assert_eq!(rows(launch, offset_of!(ExpandParams, k)), (slot, strides));
            assert_eq!(rows(launch, offset_of!(ExpandParams, v)), (slot + 2 * matrix as u64, strides));
            assert!(read(slot, layer.slot_bytes / 4).iter().all(|&word| word == 0));
        }
        assert_eq!(pool.core().stats().tables.unsealed, 1);
        // The fork goes on with the page, the sequence with its slot.
        let step = pool.step(&[sequence, fork], &[G, 1], &[0, 0], None).unwrap();
        (0..LAYERS).for_each(|layer| append(&step, layer, STREAM).unwrap());
        step.open().finish().unwrap();
        let [cut, kept] = [sequence, fork].map(|id| pool.core().view(id).unwrap());
        assert_eq!((cut.block_table[1], kept.block_table[1]), (5, 3));
    }
}

#[test]
#[ignore = "needs the double"]
fn other_cuts() {
    let pool = pool();
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 3 * G + 5);
    let (first, sent) = (books("double_launches"), calls(c"cuMemcpyHtoDAsync_v2"));
    // In the slot, and between tiles: tables only, and so during a capture too.
    for keep in [3 * G + 4, 3 * G, 2 * G, 0] {
        pool.truncate(sequence, keep, CAPTURING).unwrap();
        assert_eq!(pool.core().view(sequence).unwrap().length, keep);
    }
    assert_eq!((books("double_launches"), calls(c"cuMemcpyHtoDAsync_v2")), (first, sent));
    let stats = pool.core().stats().tables;
    assert_eq!((stats.pages.used, stats.slots.used, stats.unsealed), (0, 0, 0));
}

#[test]
#[ignore = "needs the double"]
fn cut_behind_an_offload() {
    let pool = made(16, 2, PoolOptions::default()).unwrap();
    let (sequence, other) = (pool.core().create(), pool.core().create());
    prompt(&pool, &[sequence], 2 * G + 1);
    prompt(&pool, &[other], 1);
    // No slot is free before the other one's is copied, which is waited for.
    pool.offload(other, STREAM).unwrap();
    pool.truncate(sequence, G + 1, STREAM).unwrap();
    assert_eq!(*pool.core().view(sequence).unwrap().slot_table, [-1, 1]);
}

#[test]
#[ignore = "needs the double"]
fn failing_cuts() {
    // 64 slots of a layer are one piece of memory: the cut's slot is the first of the next.
    let pool = made(200, 128, PoolOptions::default()).unwrap();
    let layer = &pool.core().layout().layers[0];
    assert_eq!((64 * layer.slot_bytes, layer.slots_at), (super::cases::MIB * 2, 0));
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 2 * G + 1);
    let others: Vec<_> = (0..63).map(|_| pool.core().create()).collect();
    prompt(&pool, &others, 1);
    let (before, launches) = (state(&pool, sequence), books("double_launches"));
    let cut = |stream| pool.truncate(sequence, G + 1, stream);

    fail_next(c"cuMemCreate", 2);
    let error = cut(STREAM).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Capacity);
    assert!(error.to_string().contains(" bytes of slots on cuda:0"), "{error}");
    assert_eq!((state(&pool, sequence), books("double_launches")), (before, launches));

    let before = state(&pool, sequence);
    refused(
        cut(CAPTURING),
        ErrorKind::Cuda,
        "a cut into a record during a capture: expected it outside of the capture, as a graph would decode the same record \
         for ever; truncate before or after",
    );
    assert_eq!((state(&pool, sequence), books("double_launches")), (before, launches));

    let full = made(16, 1, PoolOptions::default()).unwrap();
    let sequence = full.core().create();
    prompt(&full, &[sequence], 2 * G + 1);
    let before = state(&full, sequence);
    let launches = books("double_launches");
    let error = full.truncate(sequence, G + 1, STREAM).unwrap_err();
    assert!(
        error.to_string().starts_with("65 tokens of sequence 0: expected a free slot for tile 1"),
        "{error}"
    );
    assert_eq!((state(&full, sequence), books("double_launches")), (before, launches));

    cut(STREAM).unwrap();
}

#[test]
#[ignore = "needs the double"]
fn lost_in_a_cut() {
    let pool = pool();
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 2 * G + 1);
    let before = state(&pool, sequence);
    let launches = books("double_launches");
    let next = calls(c"cuLaunchKernelEx") + 2;
    sets_variable("DOUBLE_FAIL", &format!("cuLaunchKernelEx:{next}:700"));
    let error: Error = pool.truncate(sequence, G + 1, STREAM).unwrap_err();
    assert!(error.to_string().contains("kvarn_expand_d64_g64"), "{error}");
    // The first layer's slot was written to, which nobody reads.
    assert_eq!((state(&pool, sequence), books("double_launches")), (before, launches + 1));
}
