//! Host memory of a pool: anonymous mappings that take room only where they are touched.

use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use crate::Error;

/// A zeroed mapping. It is exported to other libraries, so it is only ever read and written through raw pointers.
#[derive(Debug)]
pub struct HostMemory {
    map: MmapRaw,
    bytes: usize,
}

impl HostMemory {
    /// Reserves `bytes` of address space; the system provides memory as it is touched.
    pub(crate) fn new(bytes: usize, what: &'static str) -> Result<Arc<Self>, Error> {
        let refused = |reason: std::io::Error| Error::Memory { what, bytes, reason: reason.to_string() };
        let map = MmapOptions::new().len(bytes.max(1)).no_reserve_swap().map_anon().map_err(refused)?;
        Ok(Arc::new(Self { map: map.into(), bytes }))
    }

    /// First byte, aligned to a memory page.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Length.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Pointer to `count` bytes at `offset`.
    ///
    /// # Panics
    /// If they do not lie within the memory.
    pub(crate) fn at(&self, offset: usize, count: usize) -> *mut u8 {
        assert!(offset.checked_add(count).is_some_and(|end| end <= self.bytes), "range within the memory");
        // SAFETY: within the mapping, as asserted.
        unsafe { self.as_ptr().add(offset) }
    }
}

/// A layer's part of a pool's memory, for export: the bytes live as long as `owner`.
#[derive(Clone, Debug)]
pub struct MemoryView {
    /// Keeps the memory mapped.
    pub owner: Arc<HostMemory>,
    /// First byte, from the start of `owner`.
    pub offset: usize,
    /// Extents in elements, C order.
    pub shape: Vec<usize>,
}

impl MemoryView {
    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.owner.at(self.offset, 0)
    }
}
