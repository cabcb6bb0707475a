//! Sequences that are saved, loaded, offloaded and restored, with the double; `double` starts each case in a process of its
//! own.

use std::ffi::{CStr, CString};

use kvarn::pool::{PoolMemory, read_sequence};
use kvarn::tables::SequenceId;

use super::cases::{CAPTURING, OTHER, STREAM, alive};
use super::steps::*;
use crate::{ErrorKind, Pool, Stream};

/// The double lets what this stream was given happen when it is waited for.
const LATE: Stream = Stream::from_address(0x1a7e);

/// Writes to what a sequence stores, as kernels would: halves that are finite, different everywhere.
fn write(pool: &Pool, sequence: SequenceId, seed: usize) {
    let view = pool.core().view(sequence).unwrap();
    let [pages, slots] = pool.addresses();
    for piece in pool.core().layout().pieces(&view) {
        let memory = if piece.memory == PoolMemory::Pages { pages } else { slots };
        for index in 0..piece.bytes {
            let value = ((piece.image_at + index + seed) * 31 % 0x7b) as u8;
            // SAFETY: memory of the double, which is the host's.
            unsafe { *((memory as usize + piece.at + index) as *mut u8) = value };
        }
    }
}

fn saved(pool: &Pool, sequence: SequenceId) -> Vec<u8> {
    let saved = pool.save(sequence, STREAM).unwrap();
    [&saved.header, saved.image.bytes().unwrap()].concat()
}

/// Pages and slots in use.
fn used(pool: &Pool) -> (usize, usize) {
    let stats = pool.core().stats().tables;
    (stats.pages.used, stats.slots.used)
}

fn offloaded(pool: &Pool) -> (usize, usize) {
    let stats = pool.core().stats().offloaded;
    (stats.sequences, stats.bytes)
}

/// Has the next call of this name fail.
fn fail_next(name: &CStr, code: u32) {
    let next = calls(name) + 1;
    // SAFETY: this process has no other thread.
    unsafe { std::env::set_var("DOUBLE_FAIL", format!("{}:{next}:{code}", name.to_str().unwrap())) };
}

#[test]
#[ignore = "needs the double"]
fn there_and_back() {
    drop(pool());
    let before = alive();
    let pool = pool();
    let (a, b) = (pool.core().create(), pool.core().create());
    prompt(&pool, &[a], 3 * G + 5);
    write(&pool, a, 0);
    let file = saved(&pool, a);
    let (lengths, image) = read_sequence(&mut file.as_slice(), pool.core().layout()).unwrap();
    assert_eq!((lengths.length, lengths.sealed), (3 * G + 5, 3));
    // Every matrix of the slot has five tokens, and zeros.
    let size = pool.core().layout().image_size(&lengths).unwrap();
    for matrix in image[size.records..].chunks_exact(G * G * 2) {
        assert!(matrix[5 * G * 2..].iter().all(|&byte| byte == 0));
        assert!(matrix[..5 * G * 2].iter().any(|&byte| byte != 0));
    }

    pool.offload(a, STREAM).unwrap();
    pool.settle().unwrap();
    assert_eq!((used(&pool), offloaded(&pool)), ((0, 0), (1, image.len())));
    assert_eq!(saved(&pool, a), file);
    let text = "sequence 0, which is offloaded: expected a sequence in the pool; restore it first";
    refused(pool.step(&[a], &[1], &[0], None).map(drop), ErrorKind::Value, text);
    refused(pool.offload(a, STREAM), ErrorKind::Value, text);
    refused(
        pool.expand(a, 0, 0, false, &tensor(1, KV_HEADS), &tensor(1, KV_HEADS), STREAM),
        ErrorKind::Value,
        text,
    );
    prompt(&pool, &[b], 2 * G + 1);
    write(&pool, b, 77);
    let held = calls(c"cuStreamWaitEvent");
    pool.restore(a, OTHER).unwrap();
    assert_eq!(calls(c"cuStreamWaitEvent"), held + 1);
    assert_eq!((used(&pool), offloaded(&pool)), ((5, 2), (0, 0)));
    assert_eq!(*pool.core().view(a).unwrap().block_table, [2, 3, 4, -1]);
    assert_eq!(saved(&pool, a), file);
    let text = "sequence 0, which is in the pool: expected an offloaded sequence; use it as it is";
    refused(pool.restore(a, STREAM), ErrorKind::Value, text);

    let c = pool.load(&mut file.as_slice(), STREAM).unwrap();
    assert_eq!(saved(&pool, c), file);
    assert_ne!(saved(&pool, b), file);
    // Of pages and slots that are shared, one reference goes.
    let d = pool.core().fork(c).unwrap();
    pool.offload(c, STREAM).unwrap();
    pool.settle().unwrap();
    assert_eq!(used(&pool), (8, 3));
    assert_eq!(saved(&pool, d), file);
    pool.core().free(c).unwrap();
    assert_eq!(offloaded(&pool), (0, 0));
    // Images are as large as each other: the pinned memory of one is that of the next.
    let pinned = calls(c"cuMemHostAlloc");
    pool.offload(d, STREAM).unwrap();
    pool.restore(d, STREAM).unwrap();
    pool.offload(d, STREAM).unwrap();
    assert_eq!(calls(c"cuMemHostAlloc"), pinned);
    drop(pool);
    assert_eq!(alive(), before);
}

#[test]
#[ignore = "needs the double"]
fn late_copy() {
    let pool = pool();
    let (a, b) = (pool.core().create(), pool.core().create());
    prompt(&pool, &[a], 10 * G);
    write(&pool, a, 0);
    let file = saved(&pool, a);
    pool.offload(a, LATE).unwrap();
    pool.settle().unwrap();
    assert_eq!((used(&pool), offloaded(&pool).0), ((10, 0), 1));
    // What is free is taken without waiting; what is not is waited for.
    let waits = calls(c"cuEventSynchronize");
    let step = pool.step(&[b], &[6 * G], &[0], None).unwrap();
    assert_eq!((calls(c"cuEventSynchronize"), used(&pool)), (waits, (16, 0)));
    drop(step);
    prompt(&pool, &[b], 7 * G);
    assert_eq!(used(&pool), (7, 0));
    let error = pool.restore(a, STREAM).unwrap_err().to_string();
    assert!(
        error.starts_with("640 tokens of a saved or offloaded sequence, which need 10 pages with 9 free"),
        "{error}"
    );
    assert_eq!((used(&pool), offloaded(&pool).0), ((7, 0), 1));
    pool.offload(b, LATE).unwrap();
    pool.restore(a, LATE).unwrap();
    assert_eq!(saved(&pool, a), file);
    // A pool that goes while a copy is on its way waits for it.
    drop(pool);
}

#[test]
#[ignore = "needs the double"]
fn offload_fails() {
    let pool = pool();
    let a = pool.core().create();
    prompt(&pool, &[a], 3 * G + 5);
    write(&pool, a, 0);
    let fail = std::env::var("FAILING").unwrap();
    let (view, stats) = (pool.core().view(a).unwrap(), pool.core().stats());
    fail_next(&CString::new(fail).unwrap(), 1);
    let error = pool.offload(a, STREAM).unwrap_err();
    assert!(error.to_string().contains("CUDA_ERROR_INVALID_VALUE"), "{error}");
    assert_eq!((pool.core().view(a).unwrap(), pool.core().stats()), (view, stats));
    let file = saved(&pool, a);
    pool.offload(a, STREAM).unwrap();
    assert_eq!(saved(&pool, a), file);
}

#[test]
#[ignore = "needs the double"]
fn restore_fails() {
    let pool = pool();
    let a = pool.core().create();
    prompt(&pool, &[a], 3 * G + 5);
    write(&pool, a, 0);
    let file = saved(&pool, a);
    pool.offload(a, STREAM).unwrap();
    pool.settle().unwrap();
    let stats = pool.core().stats();
    let fail = CString::new(std::env::var("FAILING").unwrap()).unwrap();
    fail_next(&fail, 1);
    let error = pool.restore(a, STREAM).unwrap_err();
    assert!(error.to_string().contains("CUDA_ERROR_INVALID_VALUE"), "{error}");
    assert_eq!(pool.core().stats(), stats);
    assert_eq!(saved(&pool, a), file);
    fail_next(&fail, 1);
    pool.load(&mut file.as_slice(), STREAM).unwrap_err();
    assert_eq!(pool.core().stats(), stats);
    pool.restore(a, STREAM).unwrap();
    assert_eq!(saved(&pool, a), file);
}

#[test]
#[ignore = "needs the double"]
fn copy_captured() {
    let pool = pool();
    let a = pool.core().create();
    prompt(&pool, &[a], 3 * G + 5);
    let file = saved(&pool, a);
    let stats = pool.core().stats();
    let text = "copying a sequence during a capture: expected it outside of the capture, as a graph would copy the same \
                pages for ever; save, load, offload and restore before or after";
    refused(pool.save(a, CAPTURING).map(drop), ErrorKind::Cuda, text);
    refused(pool.offload(a, CAPTURING), ErrorKind::Cuda, text);
    refused(pool.load(&mut file.as_slice(), CAPTURING).map(drop), ErrorKind::Cuda, text);
    assert_eq!(pool.core().stats(), stats);
    pool.offload(a, STREAM).unwrap();
    refused(pool.restore(a, CAPTURING), ErrorKind::Cuda, text);
    assert_eq!(offloaded(&pool).0, 1);
}
