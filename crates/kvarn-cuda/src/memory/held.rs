//! Giving memory back: only when no kernel can be using it.

use std::any::Any;
use std::{fmt, mem};

use cudarc::driver::sys::{self, CUevent};

use super::mapping::unmap;
use crate::capture::Relaxed;
use crate::driver::check;
use crate::{Device, Error, fork};

/// Something of the driver that nobody refers to any more, though a kernel may still be using it.
pub(crate) enum Held {
    /// Addresses, and the runs (address, bytes) of them that have memory.
    Reservation { address: u64, bytes: usize, runs: Vec<(u64, usize)> },
    /// An allocation on the device.
    Allocation(u64),
    /// Pinned memory of the host.
    Pinned(*mut u8),
    /// An event.
    Event(CUevent),
    /// What keeps borrowed memory alive.
    Owner(Box<dyn Any + Send + Sync>),
}

// SAFETY: handles and addresses of the driver, which may be used from every thread; nobody else has them.
unsafe impl Send for Held {}

impl Device {
    /// Waits for the device, then frees `held`. While a stream of the device is being captured that cannot be waited
    /// for: then they are kept, and freed when memory is next asked for or given back.
    ///
    /// On a lost device, and in a forked process, nothing is freed: the memory goes with the context.
    pub(crate) fn release(&self, held: Vec<Held>) {
        if fork::forked() {
            // What belongs to the parent is not touched, not even its owners.
            mem::forget(held);
            return;
        }
        if self.loss.lost() {
            return;
        }
        self.retired().extend(held);
        let Ok(_current) = self.enter() else { return };
        let Ok(_relaxed) = Relaxed::enter() else { return };
        self.free_retired();
    }

    /// Frees what was given back, if the device can be waited for. The context is current.
    pub(crate) fn free_retired(&self) {
        let mut retired = self.retired();
        if retired.is_empty() {
            return;
        }
        // SAFETY: the context is current.
        let waited = check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() });
        if let Err(failure) = waited {
            // A failed kernel is reported by the next call; a capture ends some time.
            if failure.sticky() {
                retired.clear();
            }
            return;
        }
        // An owner may do anything when it goes, so the list is not locked meanwhile.
        let free = mem::take(&mut *retired);
        drop(retired);
        free.into_iter().for_each(Held::free);
    }

    /// Writes zeros, and waits for them.
    pub(crate) fn zero(&self, address: u64, bytes: usize) -> Result<(), Error> {
        let stream = self.own_stream();
        // SAFETY: memory that was just provided and that nobody knows of; the context is current.
        self.told(check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address, 0, bytes, stream) }))?;
        // SAFETY: our own stream.
        self.told(check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) }))
    }
}

impl Held {
    fn free(self) {
        // SAFETY: each was made by the driver, is freed once, and is used by no kernel: the device has been waited for.
        // An answer other than success is that of a lost device.
        unsafe {
            match self {
                Self::Reservation { address, bytes, runs } => {
                    for (address, bytes) in runs {
                        unmap(address, bytes);
                    }
                    let _ = sys::cuMemAddressFree(address, bytes);
                }
                Self::Allocation(address) => {
                    let _ = sys::cuMemFree_v2(address);
                }
                Self::Pinned(memory) => {
                    let _ = sys::cuMemFreeHost(memory.cast());
                }
                Self::Event(event) => {
                    let _ = sys::cuEventDestroy_v2(event);
                }
                Self::Owner(owner) => drop(owner),
            }
        }
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reservation { .. } => "reservation",
            Self::Allocation(_) => "allocation",
            Self::Pinned(_) => "pinned memory",
            Self::Event(_) => "event",
            Self::Owner(_) => "owner",
        })
    }
}
