//! Address space that is given memory in chunks, so that growing copies nothing.

use std::ops::Range;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{
    self, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags, CUmemAllocationHandleType,
    CUmemAllocationProp, CUmemAllocationProp_st__bindgen_ty_1, CUmemAllocationType, CUmemLocation,
    CUmemLocationType,
};

use super::Held;
use super::chunks::Chunks;
use crate::capture::Relaxed;
use crate::driver::{Answer, check};
use crate::{Device, Error};

/// A reserved range of addresses.
#[derive(Debug)]
pub(super) struct Mapping {
    address: u64,
    reserved: usize,
    filled: Mutex<Filled>,
}

#[derive(Debug)]
struct Filled {
    chunks: Chunks,
    /// What was mapped at a time: it is unmapped in the same pieces.
    runs: Vec<Range<usize>>,
}

impl Mapping {
    pub(super) fn reserve(device: &'static Device, bytes: usize, what: &'static str) -> Result<Self, Error> {
        let _current = device.enter()?;
        let _relaxed = device.told(Relaxed::enter())?;
        let chunk = device.told(granularity(device))?;
        let reserved = bytes.max(1).checked_next_multiple_of(chunk).ok_or(Error::TooLarge {
            what,
            got: bytes,
            most: usize::MAX / chunk * chunk,
            fix: "use fewer pages or slots",
        })?;
        let mut address = 0;
        // SAFETY: `address` is writable; the size is a multiple of the granularity.
        let result = unsafe { sys::cuMemAddressReserve(&raw mut address, reserved, 0, 0, 0) };
        device.told_of_memory(check("cuMemAddressReserve", result), what, bytes)?;
        let filled = Filled { chunks: Chunks::new(chunk, reserved / chunk), runs: Vec::new() };
        Ok(Self { address, reserved, filled: Mutex::new(filled) })
    }

    pub(super) const fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn provided(&self) -> usize {
        self.filled.lock().unwrap_or_else(PoisonError::into_inner).chunks.provided()
    }

    /// Maps what is missing of `range`: all or nothing.
    pub(super) fn ensure(
        &self,
        device: &'static Device,
        range: Range<usize>,
        what: &'static str,
    ) -> Result<(), Error> {
        let mut filled = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = filled.chunks.missing(&range);
        if missing.is_empty() {
            return Ok(());
        }
        let _current = device.enter()?;
        let _relaxed = device.told(Relaxed::enter())?;
        device.free_retired();
        for (done, run) in missing.iter().enumerate() {
            let at = self.address + run.start as u64;
            let mapped = device
                .told_of_memory(map(device, at, run.len()), what, missing.iter().map(Range::len).sum())
                .and_then(|()| device.zero(at, run.len()).inspect_err(|_| unmap(at, run.len())));
            if let Err(error) = mapped {
                for run in &missing[..done] {
                    unmap(self.address + run.start as u64, run.len());
                }
                return Err(error);
            }
        }
        for run in missing {
            filled.chunks.provide(&run);
            filled.runs.push(run);
        }
        Ok(())
    }

    /// What is to be given back; the mapping is of no use afterwards.
    pub(super) fn take(&mut self) -> Held {
        let filled = self.filled.get_mut().unwrap_or_else(PoisonError::into_inner);
        let at = |run: Range<usize>| (self.address + run.start as u64, run.len());
        let runs = filled.runs.drain(..).map(at).collect();
        Held::Reservation { address: self.address, bytes: self.reserved, runs }
    }
}

/// Memory of the device, not shared with other processes.
fn properties(device: &Device) -> CUmemAllocationProp {
    CUmemAllocationProp {
        type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: location(device),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn location(device: &Device) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device.context().device() }
}

fn granularity(device: &Device) -> Answer<usize> {
    let properties = properties(device);
    let mut bytes = 0;
    let recommended = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // SAFETY: valid properties; `bytes` is writable.
    let result =
        unsafe { sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const properties, recommended) };
    check("cuMemGetAllocationGranularity", result).map(|()| bytes)
}

/// Gives memory to `bytes` of reserved addresses that have none; on failure they have none still.
fn map(device: &Device, address: u64, bytes: usize) -> Answer<()> {
    let properties = properties(device);
    let mut memory = 0;
    // SAFETY: valid properties; `memory` is writable.
    check("cuMemCreate", unsafe { sys::cuMemCreate(&raw mut memory, bytes, &raw const properties, 0) })?;
    // SAFETY: reserved addresses without memory, of the memory's size.
    let mapped = check("cuMemMap", unsafe { sys::cuMemMap(address, bytes, 0, memory, 0) });
    // What is mapped stays until it is unmapped; nobody needs the handle.
    // SAFETY: created above, given up here.
    let released = check("cuMemRelease", unsafe { sys::cuMemRelease(memory) });
    mapped?;
    let access = CUmemAccessDesc {
        location: location(device),
        flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    // SAFETY: mapped above; one descriptor.
    let allowed =
        check("cuMemSetAccess", unsafe { sys::cuMemSetAccess(address, bytes, &raw const access, 1) });
    released.and(allowed).inspect_err(|_| unmap(address, bytes))
}

/// Takes the memory away again: one run that was mapped in one piece, which no kernel uses any more.
pub(super) fn unmap(address: u64, bytes: usize) {
    // The driver refuses only on a lost device, whose memory goes with the process.
    // SAFETY: mapped, in one piece.
    let _ = unsafe { sys::cuMemUnmap(address, bytes) };
}
