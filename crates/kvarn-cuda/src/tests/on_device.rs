//! What the double cannot show: run on a machine with a GPU, one at a time.

use std::env;
use std::ffi::c_void;
use std::process::Command;
use std::ptr;
use std::thread;

use cudarc::driver::sys::{self, CUresult, CUstreamCaptureMode};

use super::IMAGES;
use crate::{Array, Device, DeviceMemory, Error, ErrorKind, StepBuffers, Stream, launch};

const MIB: usize = 1 << 20;

fn device() -> &'static Device {
    Device::open_with(0, &IMAGES).unwrap()
}

fn done(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS);
}

fn stream() -> Stream {
    let _current = device().enter().unwrap();
    let mut stream = ptr::null_mut();
    // SAFETY: `stream` is writable.
    done(unsafe { sys::cuStreamCreate(&raw mut stream, 1) });
    Stream::from_raw(stream.cast())
}

fn synchronize(stream: Stream) -> CUresult {
    let _current = device().enter().unwrap();
    // SAFETY: a live stream.
    unsafe { sys::cuStreamSynchronize(stream.raw()) }
}

fn read(address: u64, count: usize) -> Vec<i32> {
    let _current = device().enter().unwrap();
    let mut words = vec![-1; count];
    // SAFETY: as many words lie at both places.
    done(unsafe { sys::cuMemcpyDtoH_v2(words.as_mut_ptr().cast(), address, count * 4) });
    words
}

fn fill(stream: Stream, mut address: u64, mut value: i32, mut count: u32) -> Result<(), Error> {
    let kernel = device().kernel("kvarn_test_fill", &[8, 4, 4])?;
    let mut parameters: [*mut c_void; 3] =
        [(&raw mut address).cast(), (&raw mut value).cast(), (&raw mut count).cast()];
    // SAFETY: the kernel's parameters; the caller gives memory for `count` words.
    unsafe { launch(&kernel, [count.div_ceil(128), 1, 1], [128, 1, 1], 0, stream, &mut parameters) }
}

/// Runs `work` in a process of its own: the other tests load other images, or would find the device lost.
fn alone(name: &str, work: impl FnOnce()) {
    if env::var_os("ALONE").is_some() {
        return work();
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("tests::on_device::{name}"), "--ignored", "--nocapture"])
        .env("ALONE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{text}");
    assert!(output.status.success() && text.contains("1 passed"));
}

#[test]
#[ignore = "needs a CUDA device"]
fn embedded_images_load() {
    alone("embedded_images_load", || {
        let device = Device::open(0).unwrap();
        assert!(device.kernels().len() > 0);
        for kernel in device.kernels() {
            println!(
                "{}: {} registers, {} bytes local, {} threads, parameters {:?}",
                kernel.name(),
                kernel.registers(),
                kernel.local_bytes(),
                kernel.threads(),
                kernel.parameter_bytes()
            );
        }
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn memory_grows_under_a_kernel() {
    let device = device();
    println!("{:?} {:?}", device.capability(), device.limits());
    assert!(device.limits().virtual_memory);
    let (free, total) = device.memory().unwrap();
    // Twice the device: only what is used takes memory.
    let memory = DeviceMemory::reserve(device, 2 * total, "pages").unwrap();
    let stream = stream();
    memory.ensure(0..MIB).unwrap();
    fill(stream, memory.address(), 7, (MIB / 4) as u32).unwrap();
    memory.ensure(0..64 * MIB).unwrap();
    memory.ensure(total + 1..total + MIB).unwrap();
    fill(stream, memory.address() + 2 * MIB as u64, 8, 100).unwrap();
    done(synchronize(stream));
    assert!(read(memory.address(), MIB / 4).iter().all(|&word| word == 7));
    let words = read(memory.address() + 2 * MIB as u64, 1000);
    assert!(words[..100].iter().all(|&word| word == 8) && words[100..].iter().all(|&word| word == 0));
    assert!(read(memory.address() + total as u64 + 4, 1000).iter().all(|&word| word == 0));

    let provided = memory.provided();
    let error = memory.ensure(0..total + total / 2).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Capacity, "{error}");
    println!("{error}");
    assert_eq!(memory.provided(), provided);
    drop(memory);
    let (after, _) = device.memory().unwrap();
    assert!(after + 64 * MIB >= free, "{free} bytes free before, {after} after");
}

#[test]
#[ignore = "needs a CUDA device"]
fn borrowed_memory_is_known_to_the_driver() {
    let device = device();
    let lender = DeviceMemory::reserve(device, 8 * MIB, "pages").unwrap();
    lender.ensure(0..8 * MIB).unwrap();
    // SAFETY: memory of the lender.
    let memory = unsafe {
        DeviceMemory::borrow(device, lender.address() + 128, MIB, Box::new(lender.clone()), "pages")
    };
    assert_eq!(memory.unwrap().bytes(), MIB);
    let host = vec![0u8; 4096];
    let address = (host.as_ptr() as u64).next_multiple_of(128);
    // SAFETY: refused.
    let error = unsafe { DeviceMemory::borrow(device, address, 128, Box::new(()), "pages") }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Value, "{error}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn step_arrays_arrive_on_any_stream_and_thread() {
    let device = device();
    let buffers = StepBuffers::new(device, false);
    let mut buffer = buffers.take(&[1000, 10]).unwrap();
    let copy = DeviceMemory::allocate(device, 100 * 4, "slots").unwrap();
    let streams = [stream(), stream()];
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..100 {
                let stream = streams[round % 2];
                let array = vec![round as i32; 1000];
                let arrays = [Array::new("rounds", &array), Array::new("ones", &[1; 10])];
                let [words, _] = buffer.send(stream, arrays).unwrap();
                buffer.read_by(stream).unwrap();
                {
                    let _current = device.enter().unwrap();
                    let to = copy.address() + 4 * round as u64;
                    // SAFETY: one word at both places.
                    done(unsafe { sys::cuMemcpyDtoDAsync_v2(to, words.address + 3996, 4, stream.raw()) });
                }
            }
        });
    });
    for stream in streams {
        done(synchronize(stream));
    }
    assert_eq!(read(copy.address(), 100), (0..100).collect::<Vec<i32>>());
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_captured_launch_runs_at_each_replay() {
    let device = device();
    let memory = DeviceMemory::allocate(device, MIB, "slots").unwrap();
    let mut buffer = StepBuffers::new(device, false).take(&[4]).unwrap();
    let stream = stream();
    let mut graph = ptr::null_mut();
    {
        let _current = device.enter().unwrap();
        // SAFETY: a live stream.
        done(unsafe {
            sys::cuStreamBeginCapture_v2(stream.raw(), CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL)
        });
        fill(stream, memory.address(), 5, 1000).unwrap();
        let error = buffer.send(stream, [Array::new("one", &[1])]).unwrap_err();
        assert!(matches!(error, Error::Capturing { .. }), "{error}");
        // None of this may spoil the capture.
        let other = DeviceMemory::reserve(device, MIB, "pages").unwrap();
        other.ensure(0..MIB).unwrap();
        // SAFETY: as above; `graph` is writable.
        done(unsafe { sys::cuStreamEndCapture(stream.raw(), &raw mut graph) });
    }
    assert_eq!(read(memory.address(), 1000), [0; 1000]);
    let _current = device.enter().unwrap();
    let mut ready = ptr::null_mut();
    // SAFETY: a captured graph; `ready` is writable.
    unsafe {
        done(sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0));
        done(sys::cuGraphLaunch(ready, stream.raw()));
    }
    done(synchronize(stream));
    assert_eq!(read(memory.address(), 1001)[999..], [5, 0]);
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_wild_kernel_is_told_once() {
    alone("a_wild_kernel_is_told_once", || {
        let device = device();
        let memory = DeviceMemory::allocate(device, MIB, "slots").unwrap();
        let kernel = device.kernel("kvarn_test_wild", &[8]).unwrap();
        let mut address = 64u64;
        let stream = stream();
        // SAFETY: none, that is the point.
        unsafe { launch(&kernel, [1; 3], [1; 3], 0, stream, &mut [(&raw mut address).cast()]) }.unwrap();
        assert_ne!(synchronize(stream), CUresult::CUDA_SUCCESS);
        let error = fill(stream, memory.address(), 1, 1).unwrap_err();
        println!("{error}");
        assert!(
            matches!(&error, Error::Lost { suspect, .. } if suspect.contains("kvarn_test_")),
            "{error:?}"
        );
        let error = fill(stream, memory.address(), 1, 1).unwrap_err();
        assert!(matches!(error, Error::AlreadyLost { .. }), "{error:?}");
        drop(memory);
    });
}
