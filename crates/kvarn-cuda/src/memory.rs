//! Device memory of a pool: of our own, filled as it is used, or borrowed.

mod chunks;
mod held;
mod mapping;

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::{fmt, ptr};

use cudarc::driver::sys::{self, CUmemorytype, CUpointer_attribute};

use crate::capture::Relaxed;
use crate::driver::check;
use crate::{Device, Error};

pub(crate) use held::Held;
use mapping::Mapping;

/// Records begin at multiples of this.
const ALIGNMENT: u64 = 128;

/// Memory of a device. Only addresses are handed out: the bytes are read and written by kernels.
pub struct DeviceMemory {
    device: &'static Device,
    what: &'static str,
    address: u64,
    bytes: usize,
    source: Source,
}

enum Source {
    /// Address space, filled as it is used.
    Reserved(Mapping),
    /// One allocation, where address space cannot be reserved.
    Allocated,
    /// Of a caller, and what keeps it alive.
    Borrowed(Option<Box<dyn Any + Send + Sync>>),
}

impl DeviceMemory {
    /// Reserves `bytes` of address space; [`ensure`](Self::ensure) provides memory for the part that is used.
    ///
    /// `what` names the memory in errors, as in "pages". A device that cannot reserve address space provides all memory
    /// at once.
    pub fn reserve(device: &'static Device, bytes: usize, what: &'static str) -> Result<Arc<Self>, Error> {
        if !device.limits().virtual_memory {
            return Self::allocate(device, bytes, what);
        }
        let mapping = Mapping::reserve(device, bytes, what)?;
        let address = mapping.address();
        Ok(Arc::new(Self { device, what, address, bytes, source: Source::Reserved(mapping) }))
    }

    /// Allocates `bytes`, zeroed.
    pub fn allocate(device: &'static Device, bytes: usize, what: &'static str) -> Result<Arc<Self>, Error> {
        let _current = device.enter()?;
        let _relaxed = device.told(Relaxed::enter())?;
        device.free_retired();
        let mut address = 0;
        // SAFETY: `address` is writable, the context is current.
        let result = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) };
        device.told_of_memory(check("cuMemAlloc", result), what, bytes)?;
        let memory = Self { device, what, address, bytes, source: Source::Allocated };
        device.zero(address, bytes)?;
        Ok(Arc::new(memory))
    }

    /// Uses `bytes` at `address`, which `owner` keeps alive.
    ///
    /// # Safety
    /// That many bytes of device memory lie there as long as `owner` lives, and only kernels started through this
    /// memory write to them.
    pub unsafe fn borrow(
        device: &'static Device,
        address: u64,
        bytes: usize,
        owner: Box<dyn Any + Send + Sync>,
        what: &'static str,
    ) -> Result<Arc<Self>, Error> {
        let _current = device.enter()?;
        let refuse = |expected: String, fix| {
            Err(Error::Borrowed { what, got: format!("at {address:#x}"), expected, fix })
        };
        if !address.is_multiple_of(ALIGNMENT) {
            return refuse(format!("a multiple of {ALIGNMENT}"), "pass a tensor that starts at its storage");
        }
        if bytes > 0 {
            let kind = pointer(address, CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
            let ordinal = pointer(address, CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
            if kind != Some(CUmemorytype::CU_MEMORYTYPE_DEVICE as u32)
                || ordinal != Some(device.index() as u32)
            {
                return refuse(
                    format!("memory of cuda:{}", device.index()),
                    "pass a tensor of the pool's device",
                );
            }
        }
        Ok(Arc::new(Self { device, what, address, bytes, source: Source::Borrowed(Some(owner)) }))
    }

    /// Provides memory for the bytes of `range`, zeroed where it was not provided before: all or nothing.
    ///
    /// Allocates and waits for the zeros: not for launch paths.
    ///
    /// # Panics
    /// If the range does not lie within the memory.
    pub fn ensure(&self, range: Range<usize>) -> Result<(), Error> {
        assert!(range.start <= range.end && range.end <= self.bytes, "range within the memory");
        match &self.source {
            Source::Reserved(mapping) => mapping.ensure(self.device, range, self.what),
            Source::Allocated | Source::Borrowed(_) => Ok(()),
        }
    }

    /// Writes zeros to all of it, after what the device has to do, and waits for them.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        let _current = self.device.enter()?;
        // SAFETY: the context is current.
        self.device.told(check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() }))?;
        self.device.zero(self.address, self.bytes)
    }

    /// Bytes of device memory that it takes.
    pub fn provided(&self) -> usize {
        match &self.source {
            Source::Reserved(mapping) => mapping.provided(),
            Source::Allocated => self.bytes,
            Source::Borrowed(_) => 0,
        }
    }

    /// The first 64-bit words. Waits for the device.
    pub(crate) fn read_words<const COUNT: usize>(&self) -> Result<[u64; COUNT], Error> {
        let mut words = [0; COUNT];
        let bytes = size_of_val(&words);
        assert!(bytes <= self.bytes, "words within the memory");
        let _current = self.device.enter()?;
        // The legacy stream's copy does not wait for streams that do not block it: all of them are waited for.
        // SAFETY: the context is current.
        self.device.told(check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() }))?;
        // SAFETY: `words` is writable, that many bytes lie at the address, the context is current.
        let copied = unsafe { sys::cuMemcpyDtoH_v2(words.as_mut_ptr().cast(), self.address, bytes) };
        self.device.told(check("cuMemcpyDtoH", copied))?;
        Ok(words)
    }

    /// Address of the first byte.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length of the address space.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device.
    pub const fn device(&self) -> &'static Device {
        self.device
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let held = match &mut self.source {
            Source::Reserved(mapping) => Some(mapping.take()),
            Source::Allocated => Some(Held::Allocation(self.address)),
            Source::Borrowed(owner) => owner.take().map(Held::Owner),
        };
        self.device.release(held.into_iter().collect());
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes of {} at {:#x} of cuda:{}",
            self.bytes,
            self.what,
            self.address,
            self.device.index()
        )
    }
}

/// A number that the driver knows of an address.
fn pointer(address: u64, attribute: CUpointer_attribute) -> Option<u32> {
    let mut value = 0u32;
    // SAFETY: both attributes asked for are of 32 bit; an unknown address is refused.
    let result = unsafe { sys::cuPointerGetAttribute(ptr::from_mut(&mut value).cast(), attribute, address) };
    (result == sys::CUresult::CUDA_SUCCESS).then_some(value)
}

/// A part of a memory, for export: the bytes live as long as `owner`.
#[derive(Clone, Debug)]
pub struct MemoryView {
    /// Keeps the memory.
    pub owner: Arc<DeviceMemory>,
    /// First byte, from the start of `owner`.
    pub offset: usize,
    /// Extents in elements, C order.
    pub shape: Vec<usize>,
}

impl MemoryView {
    /// A view of elements of `element_bytes` bytes each. All its memory is provided: whoever gets it may read it all.
    pub fn new(
        owner: Arc<DeviceMemory>,
        offset: usize,
        shape: Vec<usize>,
        element_bytes: usize,
    ) -> Result<Self, Error> {
        let bytes = shape.iter().product::<usize>() * element_bytes;
        owner.ensure(offset..offset + bytes)?;
        Ok(Self { owner, offset, shape })
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.owner.address() + self.offset as u64
    }
}
