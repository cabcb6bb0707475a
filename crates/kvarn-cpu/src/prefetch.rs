//! Asking for memory before it is needed.

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Asks for the line at `at`, which will be read soon, but not next: not to the nearest cache, which waits for few lines at a
/// time and holds what is computed with.
#[inline(always)]
pub(crate) fn fetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of the baseline; a prefetch of any address is allowed.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for the line at `at`, which will be written. The instruction is not part of the baseline, for which the intrinsic becomes a
/// prefetch to read to the nearest cache; an append took as long with either.
#[inline(always)]
pub(crate) fn fetch_to_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
