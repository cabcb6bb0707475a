//! What is tried with the double; `double` starts each in a process of its own.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;

use super::IMAGES;
use crate::{
    Array, Device, DeviceMemory, Error, ErrorKind, MemoryView, StepBuffers, Stream, Unavailable, launch,
    probe,
};

pub(super) const MIB: usize = 1 << 20;
pub(super) const STREAM: Stream = Stream::from_address(0x51);
pub(super) const OTHER: Stream = Stream::from_address(0x52);
/// The double takes this one for a stream that records.
pub(super) const CAPTURING: Stream = Stream::from_address(0xca);

pub(super) fn device() -> &'static Device {
    Device::open_with(0, &IMAGES).unwrap()
}

/// A number from the double's books.
pub(super) fn books(name: &str) -> u64 {
    // SAFETY: the double, loaded before.
    unsafe {
        let library = libloading::Library::new("libcuda.so.1").unwrap();
        library.get::<extern "C" fn() -> u64>(name.as_bytes()).unwrap()()
    }
}

pub(super) fn alive() -> u64 {
    books("double_alive")
}

pub(super) fn read(address: u64, count: usize) -> Vec<i32> {
    let mut words = vec![0; count];
    // SAFETY: as many words lie at both places.
    let result = unsafe { sys::cuMemcpyDtoH_v2(words.as_mut_ptr().cast(), address, count * 4) };
    assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
    words
}

#[test]
#[ignore = "needs a library that is none"]
fn no_driver() {
    let error = probe().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(matches!(error, Error::Unavailable(Unavailable::NoDriver { .. })), "{error:?}");
    assert!(error.to_string().starts_with("no NVIDIA driver ("), "{error}");
    assert!(error.to_string().contains("libcuda.so.1"), "{error}");
    assert_eq!(Device::open(0).unwrap_err(), error);
}

#[test]
#[ignore = "needs the double"]
fn open_refuses() {
    let index = std::env::var("DEVICE").map_or(0, |index| index.parse().unwrap());
    let error = Device::open_with(index, &IMAGES).unwrap_err();
    assert_eq!(error.to_string(), std::env::var("EXPECTED").unwrap());
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[test]
#[ignore = "needs the double"]
fn memory_grows() {
    let device = device();
    let before = alive();
    let memory = DeviceMemory::reserve(device, 100 * MIB - 5, "pages").unwrap();
    assert_eq!((memory.bytes(), memory.provided()), (100 * MIB - 5, 0));
    let address = memory.address();
    memory.ensure(3 * MIB..3 * MIB + 1).unwrap();
    assert_eq!(memory.provided(), 2 * MIB);
    memory.ensure(0..10 * MIB).unwrap();
    memory.ensure(0..10 * MIB).unwrap();
    assert_eq!((memory.provided(), memory.address()), (10 * MIB, address));
    assert_eq!(books("double_taken"), 10 * MIB as u64);
    memory.ensure(99 * MIB..100 * MIB - 5).unwrap();
    assert_eq!(memory.provided(), 12 * MIB);
    assert!(read(address, 10 * MIB / 4).iter().all(|&word| word == 0));
    drop(memory);
    assert_eq!((alive(), books("double_taken")), (before, 0));
}

#[test]
#[ignore = "needs the double"]
fn memory_runs_out() {
    let device = device();
    let before = alive();
    let memory = DeviceMemory::reserve(device, 100 * MIB, "pages").unwrap();
    memory.ensure(4 * MIB..6 * MIB).unwrap();
    // Two runs are missing: the first fits, the second does not.
    let error = memory.ensure(0..40 * MIB).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Capacity);
    assert_eq!(
        error.to_string(),
        format!(
            "{} bytes of pages on cuda:0: expected at most the {} bytes free of {}; use fewer pages or slots, or free \
             memory of others (torch.cuda.empty_cache() gives back what torch keeps)",
            38 * MIB,
            10 * MIB,
            16 * MIB
        )
    );
    assert_eq!((memory.provided(), books("double_taken")), (2 * MIB, 2 * MIB as u64));
    memory.ensure(0..16 * MIB).unwrap();
    assert_eq!(memory.provided(), 16 * MIB);
    drop(memory);
    assert_eq!((alive(), books("double_taken")), (before, 0));
}

#[test]
#[ignore = "needs the double"]
fn mapping_fails() {
    let device = device();
    let before = alive();
    let memory = DeviceMemory::reserve(device, 100 * MIB, "pages").unwrap();
    memory.ensure(4 * MIB..6 * MIB).unwrap();
    let (kept, taken) = (alive(), books("double_taken"));
    let error = memory.ensure(0..10 * MIB).unwrap_err();
    assert!(error.to_string().contains("CUDA_ERROR_INVALID_VALUE (invalid argument)"), "{error}");
    assert_eq!((alive(), books("double_taken")), (kept, taken));
    memory.ensure(0..10 * MIB).unwrap();
    drop(memory);
    assert_eq!((alive(), books("double_taken")), (before, 0));
}

#[test]
#[ignore = "needs the double"]
fn memory_without_mapping() {
    let device = device();
    let before = alive();
    let memory = DeviceMemory::reserve(device, 10 * MIB, "slots").unwrap();
    assert_eq!(memory.provided(), 10 * MIB);
    memory.ensure(0..10 * MIB).unwrap();
    let error = DeviceMemory::reserve(device, 10 * MIB, "slots").unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { free, .. } if free == 6 * MIB), "{error:?}");
    drop(memory);
    assert_eq!((alive(), books("double_taken")), (before, 0));
}

#[test]
#[ignore = "needs the double"]
fn memory_outlives_a_capture() {
    let device = device();
    let memory = DeviceMemory::reserve(device, 10 * MIB, "pages").unwrap();
    memory.ensure(0..10 * MIB).unwrap();
    // SAFETY: no other thread reads or writes variables.
    unsafe { std::env::set_var("DOUBLE_CAPTURING", "1") };
    drop(memory);
    assert_eq!(books("double_taken"), 10 * MIB as u64);
    // SAFETY: as above.
    unsafe { std::env::remove_var("DOUBLE_CAPTURING") };
    let next = DeviceMemory::allocate(device, MIB, "slots").unwrap();
    assert_eq!(books("double_taken"), MIB as u64);
    drop(next);
    assert_eq!(books("double_taken"), 0);
}

/// Says when it goes.
pub(super) struct Owner(pub Arc<AtomicBool>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "needs the double"]
fn borrowed_memory() {
    let device = device();
    let lender = DeviceMemory::allocate(device, MIB, "slots").unwrap();
    let gone = Arc::new(AtomicBool::new(false));
    let borrow = |address| {
        let owner = Box::new(Owner(Arc::clone(&gone)));
        // SAFETY: memory of the lender, or refused.
        unsafe { DeviceMemory::borrow(device, address, 1024, owner, "pages") }
    };
    let error = borrow(lender.address() + 64).unwrap_err();
    assert!(error.to_string().contains("expected a multiple of 128"), "{error}");
    let error = borrow(1 << 20).unwrap_err();
    assert!(error.to_string().contains("expected memory of cuda:0"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Value);
    gone.store(false, Ordering::Relaxed);
    let memory = borrow(lender.address()).unwrap();
    memory.ensure(0..1024).unwrap();
    assert_eq!((memory.address(), memory.provided()), (lender.address(), 0));
    assert!(!gone.load(Ordering::Relaxed));
    drop(memory);
    assert!(gone.load(Ordering::Relaxed));
}

#[test]
#[ignore = "needs the double"]
fn views_are_provided() {
    let memory = DeviceMemory::reserve(device(), 100 * MIB, "slots").unwrap();
    let view = MemoryView::new(Arc::clone(&memory), 2 * MIB, vec![3, MIB], 2).unwrap();
    assert_eq!(memory.provided(), 6 * MIB);
    assert_eq!(view.address(), memory.address() + 2 * MIB as u64);
    let provided = memory.address();
    drop(memory);
    assert_eq!(view.owner.address(), provided);
    assert!(read(view.address(), MIB).iter().all(|&word| word == 0));
}

#[test]
#[ignore = "needs the double"]
fn step_arrays() {
    let device = device();
    let before = alive();
    let buffers = StepBuffers::new(device, false);
    let mut buffer = buffers.take(&[5, 3]).unwrap();
    let made = alive();
    let mut address = 0;
    // More often than there are stages.
    for round in 0..10 {
        let (five, two) = ([round, 2, 3, 4, 5], [-1, round]);
        let [a, b] = buffer.send(STREAM, [Array::new("a", &five), Array::new("b", &two)]).unwrap();
        assert_eq!((a.count, b.count, b.address - a.address), (5, 2, 32));
        assert_eq!(a.address % 16, 0);
        assert!(round == 0 || a.address == address);
        address = a.address;
        assert_eq!(read(a.address, 5), [round, 2, 3, 4, 5]);
        assert_eq!(read(b.address, 2), [-1, round]);
        buffer.read_by(STREAM).unwrap();
        buffer.read_by(OTHER).unwrap();
    }
    let error = buffer.send(STREAM, [Array::new("a", &[0; 17])]).unwrap_err();
    assert!(error.to_string().starts_with("80 bytes of step arrays: expected at most 64"), "{error}");
    let error = buffer.send(CAPTURING, [Array::new("a", &[0])]).unwrap_err();
    assert!(error.to_string().starts_with("sending a step's arrays during a capture"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Cuda);

    // Room that is not used keeps the arrays behind it in place, and is not written.
    let [a, b] = buffer.send(STREAM, [Array::new("a", &[7]).with_room(5), Array::new("b", &[8])]).unwrap();
    let words = read(a.address, 9);
    assert_eq!((b.address - a.address, words[0], words[4], words[8]), (32, 7, 5, 8));

    // Two steps open at a time, then the same buffers again, then one that is too small replaced.
    drop(buffer);
    let (first, second) = (buffers.take(&[8]).unwrap(), buffers.take(&[8]).unwrap());
    let two = alive();
    assert!(two > made);
    drop((first, second));
    drop((buffers.take(&[8]).unwrap(), buffers.take(&[8]).unwrap()));
    assert_eq!(alive(), two);
    drop(buffers.take(&[100]).unwrap());
    assert!(alive() <= two);
    drop(buffers);
    assert_eq!((alive(), books("double_taken")), (before, 0));
}

#[test]
#[ignore = "needs the double"]
fn step_buffers_fail() {
    let device = device();
    let before = alive();
    let buffers = StepBuffers::new(device, false);
    buffers.take(&[8]).unwrap_err();
    assert_eq!((alive(), books("double_taken")), (before, 0));
    buffers.take(&[8]).unwrap();
}

fn fill(shared: u32, threads: u32, parameters: &mut [*mut c_void]) -> Result<(), Error> {
    let kernel = device().kernel("kvarn_test_fill", &[8, 4, 4]).unwrap();
    // SAFETY: the double runs nothing.
    unsafe { launch(&kernel, [2, 1, 1], [threads, 1, 1], shared, STREAM, parameters) }
}

#[test]
#[ignore = "needs the double"]
fn launches() {
    let device = device();
    assert_eq!(device.kernels().map(|kernel| kernel.name()).collect::<Vec<_>>(), ["kvarn_test_fill"]);
    let unknown = device.kernel("kvarn_attend", &[]).unwrap_err();
    assert!(unknown.to_string().starts_with("kernel \"kvarn_attend\": expected one of the 1"), "{unknown}");
    let other = device.kernel("kvarn_test_fill", &[8, 8]).unwrap_err();
    assert!(
        other
            .to_string()
            .starts_with("parameters of [8, 8] bytes for kernel kvarn_test_fill: expected [8, 4, 4]"),
        "{other}"
    );
    let kernel = device.kernel("kvarn_test_fill", &[8, 4, 4]).unwrap();
    assert_eq!((kernel.registers(), kernel.dynamic_shared()), (32, 226 << 10));

    let mut three = [std::ptr::null_mut(); 3];
    assert_eq!(
        fill(226 * 1024 + 1, 128, &mut three).unwrap_err().to_string(),
        "shared memory 231425 bytes of kernel kvarn_test_fill: expected at most 231424 bytes; choose a smaller \
         configuration"
    );
    assert!(fill(0, 1025, &mut three).unwrap_err().to_string().contains("at most 1024 threads"));
    assert!(fill(0, 128, &mut three[..2]).unwrap_err().to_string().starts_with("parameters 2 of kernel"));
    assert_eq!(books("double_launches"), 0);
    fill(226 * 1024, 1024, &mut three).unwrap();
    assert_eq!((books("double_launches"), books("double_contexts")), (1, 0));
}

#[test]
#[ignore = "needs the double"]
fn lost_device() {
    let device = device();
    let memory = DeviceMemory::allocate(device, MIB, "slots").unwrap();
    let mut three = [std::ptr::null_mut(); 3];
    fill(0, 32, &mut three).unwrap();
    fill(0, 32, &mut three).unwrap();
    let error = fill(0, 32, &mut three).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cuda:0 failed: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered); the last kernel of \
         kvarn started on it was kvarn_test_fill: expected it to run to its end; set CUDA_LAUNCH_BLOCKING=1 to see the \
         kernel at fault, and restart the process"
    );
    assert_eq!(error.kind(), ErrorKind::Cuda);
    let later = "cuda:0, which failed earlier with CUDA_ERROR_ILLEGAL_ADDRESS: expected a working device; restart the \
                 process";
    assert_eq!(fill(0, 32, &mut three).unwrap_err().to_string(), later);
    assert_eq!(DeviceMemory::allocate(device, MIB, "slots").unwrap_err().to_string(), later);
    drop(memory);
}

unsafe extern "C" {
    fn fork() -> c_int;
    fn waitpid(process: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn _exit(status: c_int) -> !;
}

#[test]
#[ignore = "needs the double"]
fn forked() {
    let memory = DeviceMemory::allocate(device(), MIB, "slots").unwrap();
    // SAFETY: the child only looks at atomics and leaves.
    let child = unsafe { fork() };
    if child == 0 {
        let refused = probe() == Err(Error::Forked)
            && memory.device().memory() == Err(Error::Forked)
            && Device::open_with(0, &IMAGES).is_err_and(|error| error == Error::Forked);
        drop(memory);
        // SAFETY: leaves without running what belongs to the parent.
        unsafe { _exit(i32::from(!refused)) };
    }
    let mut status = -1;
    // SAFETY: a child of this process; `status` is writable.
    assert_eq!(unsafe { waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    assert_eq!(books("double_taken"), MIB as u64);
}
