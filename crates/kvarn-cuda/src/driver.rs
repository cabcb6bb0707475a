//! What the driver answers.

use std::ffi::CStr;
use std::fmt;

use cudarc::driver::sys::{self, CUresult};

/// A driver call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The call.
    pub call: &'static str,
    /// Its answer.
    pub result: CUresult,
}

/// What a driver call gives.
pub(crate) type Answer<T> = Result<T, Failure>;

/// The answer of `call` as a result.
#[inline]
pub(crate) fn check(call: &'static str, result: CUresult) -> Answer<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Failure { call, result }) }
}

impl Failure {
    /// Name of the answer, as in `CUDA_ERROR_INVALID_VALUE`.
    pub(crate) fn name(self) -> String {
        // SAFETY: the function fills in a pointer to text that the driver never frees.
        text(self.result, |result, text| unsafe { sys::cuGetErrorName(result, text) })
            .unwrap_or_else(|| format!("CUDA error {}", self.result as u32))
    }

    /// Whether memory ran out.
    pub(crate) fn out_of_memory(self) -> bool {
        self.result == CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }

    /// Whether the context is of no use afterwards: every later call in it gives the same answer.
    pub(crate) fn sticky(self) -> bool {
        matches!(
            self.result,
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
                | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
                | CUresult::CUDA_ERROR_CONTAINED
                | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
                | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
                | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
                | CUresult::CUDA_ERROR_ASSERT
                | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
                | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUresult::CUDA_ERROR_INVALID_PC
                | CUresult::CUDA_ERROR_LAUNCH_FAILED
                | CUresult::CUDA_ERROR_TENSOR_MEMORY_LEAK
        )
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        // SAFETY: as in `name`.
        let meaning = text(self.result, |result, text| unsafe { sys::cuGetErrorString(result, text) });
        meaning.map_or(Ok(()), |meaning| write!(f, " ({meaning})"))
    }
}

fn text(
    result: CUresult,
    ask: impl FnOnce(CUresult, *mut *const std::ffi::c_char) -> CUresult,
) -> Option<String> {
    let mut text = std::ptr::null();
    if ask(result, &raw mut text) != CUresult::CUDA_SUCCESS || text.is_null() {
        return None;
    }
    // SAFETY: the driver gives static, terminated text.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}
