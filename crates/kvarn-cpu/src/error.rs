//! The one error of this crate.

use kvarn::pool::PoolError;

/// What went wrong. Texts name the offending value, what was expected, and the fix.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What a pool of any backend refuses.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Address space for a pool could not be reserved.
    #[error("{bytes} bytes of {what}: the system refused to map them ({reason}); use fewer pages or slots")]
    Memory {
        /// Pages or slots.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
        /// The system's answer.
        reason: String,
    },
    /// Memory for a sequence outside the pool.
    #[error(
        "a sequence of {bytes} bytes: the system has not as much memory; free memory, or save shorter sequences"
    )]
    Image {
        /// Bytes asked for.
        bytes: usize,
    },
}

impl From<kvarn::Error> for Error {
    fn from(error: kvarn::Error) -> Self {
        Self::Pool(error.into())
    }
}
