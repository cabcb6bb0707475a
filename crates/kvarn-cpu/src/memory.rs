//! Host memory of a pool: anonymous mappings that take room only where they are touched.
//!
//! Large mappings are in large pages where the system has them: rows of one step lie 32 KB and more apart, each on a page of its
//! own, and looking up so many pages would take longer than storing the rows.

use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use crate::Error;

/// A large page, and how many of them are much.
#[cfg(target_os = "linux")]
const LARGE_PAGE: usize = 2 << 20;
#[cfg(target_os = "linux")]
const LARGE_PAGES: usize = 16;

/// A zeroed mapping. It is exported to other libraries, so it is only ever read and written through raw pointers.
#[derive(Debug)]
pub struct HostMemory {
    map: MmapRaw,
    bytes: usize,
}

impl HostMemory {
    /// Reserves `bytes` of address space; the system provides memory as it is touched.
    ///
    /// The memory fills up in each of `parts` parts of it: large pages are asked for where one or two in each are little.
    pub(crate) fn new(bytes: usize, parts: usize, what: &'static str) -> Result<Arc<Self>, Error> {
        let refused = |reason: std::io::Error| Error::Memory { what, bytes, reason: reason.to_string() };
        let map = MmapOptions::new().len(bytes.max(1)).no_reserve_swap().map_anon().map_err(refused)?;
        let map = MmapRaw::from(map);
        #[cfg(target_os = "linux")]
        if bytes / parts.max(1) >= LARGE_PAGES * LARGE_PAGE {
            // Advice: a system without them refuses, and small pages do as well.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Arc::new(Self { map, bytes }))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_every_size_are_zeroed_and_hold_what_is_written() {
        for bytes in [0, 1, 5_000, 3 << 20, 100 << 20] {
            for parts in [1, 7] {
                let memory = HostMemory::new(bytes, parts, "a test").unwrap();
                assert_eq!(memory.bytes(), bytes);
                for offset in [0, bytes / 2, bytes.saturating_sub(1)].into_iter().filter(|&at| at < bytes) {
                    let at = memory.at(offset, 1);
                    // SAFETY: a byte of the mapping, of which there are no references.
                    unsafe {
                        assert!(*at == 0 || *at == 7);
                        *at = 7;
                        assert_eq!(*at, 7);
                    }
                }
            }
        }
    }
}
