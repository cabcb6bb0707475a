//! Pools and steps with the double, which records launches without running them; `double` starts each in a process of its
//! own.

use std::ffi::{CStr, c_char};
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;
use kvarn::codec::SlotType;
use kvarn::pool::{AttendOptions, LayerShape};
use kvarn::tables::SequenceId;
use kvarn::{Config, ConfigOptions, DType};

use super::cases::{MIB, OTHER, Owner, STREAM, alive, books, device, read};
use crate::params::{AttendParams, SHARE_WORDS};
use crate::workspace::part_bytes;
use crate::{Borrowed, DeviceMemory, DeviceTensor, Error, ErrorKind, Pool, PoolOptions, Step, Stream};

/// Tokens of a tile, and channels of a head.
pub(super) const G: usize = 64;
pub(super) const LAYERS: usize = 2;
pub(super) const KV_HEADS: usize = 2;
/// Places in `double::kernels`.
pub(super) const APPEND: u64 = 1;
pub(super) const EXPAND: u64 = 2;
pub(super) const ATTEND: u64 = 3;

pub(super) fn made(pages: usize, slots: usize, options: PoolOptions) -> Result<Arc<Pool>, Error> {
    device();
    let options_of =
        ConfigOptions { sink_tokens: Some(0), ..ConfigOptions::from_name("kvarn_k4v2_g64", G).unwrap() };
    let config = Config::new(&options_of).unwrap();
    let layers = [LayerShape { kv_heads: KV_HEADS, head_dim: G }; LAYERS];
    // SAFETY: what is borrowed lives as long as its owner.
    unsafe { Pool::new(config, &layers, pages, slots, SlotType::Float16, 0, options) }
}

pub(super) fn pool() -> Arc<Pool> {
    made(16, 16, PoolOptions::default()).unwrap()
}

/// A tensor that is never read: the double runs nothing.
pub(super) fn tensor(rows: usize, heads: usize) -> DeviceTensor {
    let strides = [(heads * G) as isize, G as isize, 1];
    // SAFETY: as above.
    unsafe { DeviceTensor::from_raw(1 << 20, DType::Float16, [rows, heads, G], strides) }
}

pub(super) fn append(step: &Step, layer: usize, stream: Stream) -> Result<(), Error> {
    let rows = tensor(step.open().plan().tokens, KV_HEADS);
    step.append(layer, &rows, &rows, false, stream)
}

pub(super) fn attend(step: &Step, layer: usize, stream: Stream) -> Result<(), Error> {
    let q = tensor(step.open().plan().tokens, 2 * KV_HEADS);
    // SAFETY: no logits and no denominators.
    let left_out =
        unsafe { step.attend(layer, &q, &AttendOptions::default(), None, &q, None, usize::MAX, stream) };
    left_out.map(|any| assert!(!any))
}

/// Every layer, eagerly or into a capture.
pub(super) fn forward(step: &Step, stream: Stream) -> Result<(), Error> {
    (0..LAYERS).try_for_each(|layer| append(step, layer, stream).and_then(|()| attend(step, layer, stream)))
}

/// A finished step of so many tokens, without attention.
pub(super) fn prompt(pool: &Arc<Pool>, sequences: &[SequenceId], tokens: usize) {
    let step = pool.step(sequences, &vec![tokens; sequences.len()], &vec![0; sequences.len()], None).unwrap();
    (0..LAYERS).for_each(|layer| append(&step, layer, STREAM).unwrap());
    step.open().finish().unwrap();
}

pub(super) fn calls(name: &CStr) -> u64 {
    // SAFETY: the double, loaded before, and a C string.
    unsafe {
        let library = libloading::Library::new("libcuda.so.1").unwrap();
        library.get::<extern "C" fn(*const c_char) -> u64>(b"double_calls").unwrap()(name.as_ptr())
    }
}

/// A launch that was recorded: the kernel's place, its blocks, its stream.
pub(super) fn launched(index: u64) -> [u64; 3] {
    let mut words = [0; 3];
    // SAFETY: the double fills in three words.
    unsafe {
        let library = libloading::Library::new("libcuda.so.1").unwrap();
        library.get::<extern "C" fn(u64, *mut u64)>(b"double_launch").unwrap()(index, words.as_mut_ptr());
    }
    words
}

/// A number in the parameter of a launch.
pub(super) fn parameter<const BYTES: usize>(index: u64, offset: usize) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    // SAFETY: the double fills in that many bytes.
    unsafe {
        let library = libloading::Library::new("libcuda.so.1").unwrap();
        let copy = library.get::<extern "C" fn(u64, usize, usize, *mut u8)>(b"double_parameter").unwrap();
        copy(index, offset, BYTES, bytes.as_mut_ptr());
    }
    bytes
}

pub(super) fn address(index: u64, offset: usize) -> u64 {
    u64::from_ne_bytes(parameter(index, offset))
}

pub(super) fn refused(result: Result<(), Error>, kind: ErrorKind, text: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.to_string(), text);
    assert_eq!(error.kind(), kind);
}

#[test]
#[ignore = "needs the double"]
fn long_chunk() {
    let pool = made(700, 16, PoolOptions::default()).unwrap();
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 32_768);
    let step = pool.step(&[sequence], &[2048], &[0], None).unwrap();
    append(&step, 0, STREAM).unwrap();
    attend(&step, 0, STREAM).unwrap();
    // Two layers of the prompt, one of this step.
    let (mut launches, mut address) = (0, None);
    while calls(c"cuLaunchKernelEx") > 3 + launches {
        let [kernel, blocks, _] = launched(3 + launches);
        assert_eq!(kernel, ATTEND + 1, "that of 16 columns");
        let shares = u64::from_ne_bytes(parameter(3 + launches, offset_of!(AttendParams, shares)));
        assert_eq!(address.unwrap_or(shares), shares, "shares behind those of the launch before");
        address = Some(shares + 4 * SHARE_WORDS as u64 * blocks);
        launches += 1;
    }
    let blocks = 2048 * 2 / 16;
    let parts = (32_768 + 2048) / 1024; // pieces of a sequence as long
    let bytes = blocks * parts * part_bytes(KV_HEADS, 16, G);
    assert_eq!(launches as usize, bytes.div_ceil(32 << 20));
}

#[test]
#[ignore = "needs the double"]
fn few_driver_calls() {
    let pool = pool();
    let sequence = pool.core().create();
    let step = pool.step(&[sequence], &[3], &[0], None).unwrap();
    append(&step, 0, STREAM).unwrap();
    attend(&step, 0, STREAM).unwrap();
    let names = [
        c"cuCtxGetCurrent",
        c"cuStreamIsCapturing",
        c"cuLaunchKernelEx",
        c"cuEventRecord",
        c"cuMemcpyHtoDAsync_v2",
        c"cuKernelGetFunction",
        c"cuEventCreate",
        c"cuMemAlloc_v2",
    ];
    let before = names.map(calls);
    append(&step, 1, STREAM).unwrap();
    attend(&step, 1, STREAM).unwrap();
    let took = names.map(calls).iter().zip(before).map(|(after, before)| after - before).collect::<Vec<_>>();
    // Of append and attend together: the context, the stream, the launch.
    assert_eq!(took, [2, 2, 2, 0, 0, 0, 0, 0]);
    assert_eq!(launched(0), [APPEND, 1, 0x51]);
    assert_eq!(launched(1), [ATTEND, KV_HEADS as u64, 0x51]);
    // Of the step as a whole: one event for each of its two buffers.
    let before = calls(c"cuEventRecord");
    step.open().finish().unwrap();
    drop(step);
    assert_eq!(calls(c"cuEventRecord") - before, 2);
}

#[test]
#[ignore = "needs the double"]
fn two_streams() {
    let pool = pool();
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 3);
    let step = pool.step(&[sequence], &[1], &[0], None).unwrap();
    let waits = calls(c"cuStreamWaitEvent");
    append(&step, 0, STREAM).unwrap();
    attend(&step, 0, STREAM).unwrap();
    // The buffers were read on this stream only: its own order is enough.
    assert_eq!(calls(c"cuStreamWaitEvent"), waits);
    let copies = calls(c"cuMemcpyHtoDAsync_v2");
    append(&step, 1, OTHER).unwrap();
    attend(&step, 1, OTHER).unwrap();
    // The append's arrays are overwritten, after the first stream's work; attention has others for the stream.
    assert_eq!((calls(c"cuMemcpyHtoDAsync_v2") - copies, calls(c"cuStreamWaitEvent") - waits), (2, 1));
    step.open().finish().unwrap();
}

#[test]
#[ignore = "needs the double"]
fn borrowed_pool() {
    const HALF: usize = 2 * MIB;
    let lender = DeviceMemory::allocate(device(), 2 * HALF, "lender").unwrap();
    let gone = [Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false))];
    let of = |at: u64, bytes, owner: usize| Borrowed {
        address: lender.address() + at,
        bytes,
        owner: Box::new(Owner(Arc::clone(&gone[owner]))),
    };
    let plain = pool();
    let (pages, slots) = (plain.core().layout().page_memory, plain.core().layout().slot_memory);
    assert!(pages + slots < HALF);
    drop(plain);
    let before = alive();
    let with = |pages, slots| made(16, 16, PoolOptions { memory: Some((pages, slots)), check: false });
    let error = with(of(0, pages - 1, 0), of(0, slots, 1)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "memory for pages, of {} bytes: expected {pages} bytes, those of all layers one behind the other; pass a \
             tensor of that size",
            pages - 1
        )
    );
    assert_eq!(error.kind(), ErrorKind::Value);
    let error = with(of(0, pages, 0), of(HALF as u64 + 64, slots, 1)).unwrap_err();
    assert!(error.to_string().starts_with("memory for slots, at 0x"), "{error}");
    assert_eq!(alive(), before);
    for gone in &gone {
        gone.store(false, Ordering::Relaxed);
    }

    // SAFETY: memory of the double, which is the host's.
    unsafe { std::ptr::write_bytes(lender.address() as *mut u8, 0xff, 2 * HALF) };
    let pool = with(of(0, pages, 0), of(HALF as u64, slots, 1)).unwrap();
    let words = read(lender.address() + HALF as u64, slots / 4 + 1);
    assert!(words[..slots / 4].iter().all(|&word| word == 0) && words[slots / 4] == -1);
    assert_eq!(read(lender.address(), 1), [-1]);
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 3 * G);
    assert_eq!((pool.provided_bytes(), pool.pages(0).unwrap().address()), (0, lender.address()));
    let view = pool.slots(1).unwrap();
    drop(pool);
    assert!(gone[0].load(Ordering::Relaxed) && !gone[1].load(Ordering::Relaxed));
    drop(view);
    assert!(gone[1].load(Ordering::Relaxed));
}

#[test]
#[ignore = "needs the double"]
fn checked_pool() {
    let pool = made(16, 16, PoolOptions { check: true, ..PoolOptions::default() }).unwrap();
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 2 * G + 1);
    let step = pool.step(&[sequence], &[1], &[0], None).unwrap();
    let first = books("double_launches");
    append(&step, 0, STREAM).unwrap();
    attend(&step, 0, STREAM).unwrap();
    let page = address(first + 1, offset_of!(AttendParams, items)) + 4;
    let wild = 1_000_000i32;
    // SAFETY: the array is there.
    let written = unsafe { sys::cuMemcpyHtoDAsync_v2(page, (&raw const wild).cast(), 4, STREAM.raw()) };
    assert_eq!(written, sys::CUresult::CUDA_SUCCESS);
    append(&step, 1, STREAM).unwrap();
    refused(
        attend(&step, 1, STREAM),
        ErrorKind::Cuda,
        "1000000 at 1 of the step's array \"items\" on cuda:0: expected 2, as sent; something else wrote to that \
         memory: look for it with compute-sanitizer",
    );
    assert_eq!(books("double_launches"), first + 3);
}

#[test]
#[ignore = "needs the double"]
fn step_without_memory() {
    // Room for the counts, one chunk of pages, and slots up to the limit.
    let pool = made(1 << 16, 1 << 10, PoolOptions::default()).unwrap();
    let sequence = pool.core().create();
    prompt(&pool, &[sequence], 1);
    let (made, taken, stats) = (alive(), books("double_taken"), pool.core().stats());
    let error = pool.step(&[sequence], &[1 << 20], &[0], None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Capacity);
    assert!(error.to_string().contains(" bytes of pages on cuda:0: expected at most the "), "{error}");
    assert_eq!((books("double_taken"), pool.core().stats()), (taken, stats));
    assert_eq!(alive(), made);
    prompt(&pool, &[sequence], 1);
}

#[test]
#[ignore = "needs the double"]
fn pool_without_memory() {
    device();
    let before = alive();
    let error = made(16, 16, PoolOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Capacity);
    assert!(error.to_string().starts_with("16 bytes of counts on cuda:0: expected at most the "), "{error}");
    assert_eq!((alive(), books("double_taken")), (before, 0));
    pool();
}

#[test]
#[ignore = "needs the double"]
fn tile_too_large() {
    let error = made(16, 16, PoolOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Value);
    assert_eq!(
        error.to_string(),
        "tile 64 tokens of head_dim 64, for which a block needs 14656 bytes of shared memory on CUDA: expected at most the \
         11264 bytes of cuda:0; use the CPU, or another configuration"
    );
}

#[test]
#[ignore = "needs the double"]
fn attend_without_memory() {
    let pool = pool();
    let sequence = pool.core().create();
    let step = pool.step(&[sequence], &[3], &[0], None).unwrap();
    append(&step, 0, STREAM).unwrap();
    let (made, launches) = (alive(), books("double_launches"));
    let error = attend(&step, 0, STREAM).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Capacity);
    assert!(error.to_string().contains(" bytes of attention workspace on cuda:0"), "{error}");
    assert_eq!((alive(), books("double_launches")), (made, launches));
    attend(&step, 0, STREAM).unwrap();
}

#[test]
#[ignore = "needs the double"]
fn lost_in_a_step() {
    let pool = pool();
    let sequence = pool.core().create();
    let step = pool.step(&[sequence], &[3], &[0], None).unwrap();
    append(&step, 0, STREAM).unwrap();
    let error = attend(&step, 0, STREAM).unwrap_err().to_string();
    assert!(
        error.starts_with("cuda:0 failed: CUDA_ERROR_ILLEGAL_ADDRESS")
            && error.contains("the last kernel of kvarn started on it was kvarn_attend_d64_g64_k4v2_n1"),
        "{error}"
    );
    let error = append(&step, 1, STREAM).unwrap_err().to_string();
    assert!(error.starts_with("cuda:0, which failed earlier with CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    drop((step, pool));
}
