//! A device that is ready for launches: context retained, images loaded.

use std::collections::BTreeMap;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute, CUstream, CUstream_flags};

use crate::context::{Context, Current};
use crate::driver::{Answer, check};
use crate::image::{self, Images};
use crate::launch::{Entry, Kernel};
use crate::loss::Loss;
use crate::memory::Held;
use crate::probe::suits;
use crate::{Capability, Error, fork, probe};

/// What a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can have, static and dynamic.
    pub shared_per_block: u32,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_multiprocessor: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
    /// Bytes of device memory.
    pub memory_bytes: usize,
    /// Whether address space can be reserved and filled later.
    pub virtual_memory: bool,
}

/// A device that is ready for launches. There is one of each index, and it lives as long as the process.
#[derive(Debug)]
pub struct Device {
    index: usize,
    capability: Capability,
    limits: Limits,
    context: Context,
    pub(crate) loss: Loss,
    kernels: BTreeMap<&'static str, Entry>,
    /// For work of our own, which nobody else's stream waits for.
    stream: OwnStream,
    pub(crate) retired: Mutex<Vec<Held>>,
}

#[derive(Clone, Copy, Debug)]
struct OwnStream(CUstream);

// SAFETY: a handle of the driver, which may be used from every thread.
unsafe impl Send for OwnStream {}
// SAFETY: as above.
unsafe impl Sync for OwnStream {}

/// Makes a device ready, so that later calls on it neither load nor allocate: before a graph capture, or to have the
/// time it takes early.
pub fn warmup(index: usize) -> Result<(), Error> {
    Device::open(index).map(drop)
}

impl Device {
    /// The device with this index. The first call retains its context and loads every kernel.
    pub fn open(index: usize) -> Result<&'static Self, Error> {
        Self::open_with(index, Images::embedded())
    }

    pub(crate) fn open_with(index: usize, images: &Images) -> Result<&'static Self, Error> {
        static OPEN: Mutex<Vec<&'static Device>> = Mutex::new(Vec::new());
        fork::check()?;
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.iter().find(|device| device.index == index) {
            return Ok(device);
        }
        let driver = probe()?;
        suits(driver, images, index)?;
        let capability = driver.devices[index];
        let device = Self::new(index, capability, images)
            .map_err(|failure| Loss::default().error(index, failure, None))?;
        let device: &'static Self = Box::leak(Box::new(device));
        open.push(device);
        Ok(device)
    }

    fn new(index: usize, capability: Capability, images: &Images) -> Answer<Self> {
        let context = Context::retain(index)?;
        let loaded = image::load(images)?;
        let current = context.enter()?;
        let limits = Limits::of(context.device())?;
        let mut kernels = BTreeMap::new();
        for (&name, kernel) in loaded {
            kernels.insert(name, Entry::prepare(name, kernel.0, context.device(), limits)?);
        }
        let mut stream = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` is writable, the context is current.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
        drop(current);
        let retired = Mutex::default();
        let stream = OwnStream(stream);
        Ok(Self { index, capability, limits, context, loss: Loss::default(), kernels, stream, retired })
    }

    /// Index, as 1 in "cuda:1".
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Compute capability.
    pub const fn capability(&self) -> Capability {
        self.capability
    }

    /// What it has.
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// A kernel by its name in the image, which takes parameters of `parameter_bytes` bytes each.
    pub fn kernel(&'static self, name: &str, parameter_bytes: &[usize]) -> Result<Kernel, Error> {
        let entry = self
            .kernels
            .get(name)
            .ok_or_else(|| Error::UnknownKernel { name: name.into(), count: self.kernels.len() })?;
        let kernel = Kernel { device: self, entry };
        if kernel.parameter_bytes() != parameter_bytes {
            return Err(Error::Parameters {
                kernel: entry.name,
                takes: kernel.parameter_bytes(),
                got: parameter_bytes.to_vec(),
            });
        }
        Ok(kernel)
    }

    /// All kernels, by name.
    pub fn kernels(&'static self) -> impl ExactSizeIterator<Item = Kernel> {
        self.kernels.values().map(move |entry| Kernel { device: self, entry })
    }

    /// Free and all bytes of device memory, at the moment.
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are writable, the context is current.
        let result = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        self.told(check("cuMemGetInfo", result))?;
        Ok((free, total))
    }

    /// The context becomes current, on a device that works, in a process that was not forked.
    pub(crate) fn enter(&self) -> Result<Current, Error> {
        fork::check()?;
        self.loss.check(self.index)?;
        self.told(self.context.enter())
    }

    pub(crate) const fn context(&self) -> &Context {
        &self.context
    }

    pub(crate) const fn own_stream(&self) -> CUstream {
        self.stream.0
    }

    /// The driver's answer as this crate's error.
    pub(crate) fn told<T>(&self, answer: Answer<T>) -> Result<T, Error> {
        answer.map_err(|failure| self.loss.error(self.index, failure, None))
    }

    /// As [`told`](Self::told), for a call that asks for memory.
    pub(crate) fn told_of_memory<T>(
        &self,
        answer: Answer<T>,
        what: &'static str,
        bytes: usize,
    ) -> Result<T, Error> {
        answer.map_err(|failure| {
            if !failure.out_of_memory() {
                return self.loss.error(self.index, failure, None);
            }
            let (free, total) = self.memory().unwrap_or((0, self.limits.memory_bytes));
            Error::OutOfMemory { what, bytes, device: self.index, free, total }
        })
    }

    pub(crate) fn retired(&self) -> MutexGuard<'_, Vec<Held>> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Limits {
    fn of(device: CUdevice) -> Answer<Self> {
        use CUdevice_attribute as A;
        let ask = |attribute| -> Answer<u32> {
            let mut value = 0;
            // SAFETY: `value` is writable, the device exists.
            let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) };
            check("cuDeviceGetAttribute", result).map(|()| value as u32)
        };
        let mut memory_bytes = 0;
        // SAFETY: as above.
        check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, device) })?;
        Ok(Self {
            multiprocessors: ask(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_per_block: ask(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            shared_per_multiprocessor: ask(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
            l2_bytes: ask(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            memory_bytes,
            virtual_memory: ask(A::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)? == 1,
        })
    }
}
