//! The one error of this crate.

use kvarn::pool::PoolError;

use crate::Unavailable;

/// What went wrong. Texts name the offending value, what was expected, and the fix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// CUDA cannot be used here.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// What a pool of any backend refuses.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A configuration that no kernel serves.
    #[error("{what} {got} on CUDA: expected {expected}; use the CPU, or another configuration")]
    Unsupported {
        /// What is not supported.
        what: &'static str,
        /// Its value.
        got: String,
        /// What is.
        expected: String,
    },
    /// The driver refused a call.
    #[error(
        "{call} for cuda:{device}: {answer}: expected success; check the arguments, and what ran on the device before"
    )]
    Driver {
        /// The call, with the kernel if it launches one.
        call: String,
        /// Index of the device.
        device: usize,
        /// Name and text of the driver's answer.
        answer: String,
    },
    /// A kernel failed, and with it everything on its device. Given once.
    #[error(
        "cuda:{device} failed: {answer}; {suspect}: expected it to run to its end; set CUDA_LAUNCH_BLOCKING=1 to see \
         the kernel at fault, and restart the process"
    )]
    Lost {
        /// Index of the device.
        device: usize,
        /// Name and text of the driver's answer.
        answer: String,
        /// Which of our kernels was started last.
        suspect: String,
    },
    /// A call to a device that failed before, which was reported then.
    #[error(
        "cuda:{device}, which failed earlier with {name}: expected a working device; restart the process"
    )]
    AlreadyLost {
        /// Index of the device.
        device: usize,
        /// The driver's answer.
        name: String,
    },
    /// CUDA used on both sides of a fork.
    #[error(
        "a process forked after CUDA was used: expected one that started CUDA itself; start it with the method \
         \"spawn\" or \"forkserver\""
    )]
    Forked,
    /// Device or pinned memory ran out.
    #[error(
        "{bytes} bytes of {what} on cuda:{device}: expected at most the {free} bytes free of {total}; use fewer pages \
         or slots, or free memory of others (torch.cuda.empty_cache() gives back what torch keeps)"
    )]
    OutOfMemory {
        /// What the memory is for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
        /// Index of the device.
        device: usize,
        /// Bytes free.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// Memory or a buffer that is too small for what it should hold.
    #[error("{got} bytes of {what}: expected at most {most}; {fix}")]
    TooLarge {
        /// What does not fit.
        what: &'static str,
        /// Its bytes.
        got: usize,
        /// The most that fits.
        most: usize,
        /// What to do.
        fix: &'static str,
    },
    /// Work that cannot be a part of a graph, while one is captured.
    #[error("{what} during a capture: expected {expected}; {fix}")]
    Capturing {
        /// What was asked for.
        what: &'static str,
        /// What was expected.
        expected: &'static str,
        /// What to do.
        fix: &'static str,
    },
    /// A number in an array of a step that a kernel would take for a place outside the pool.
    #[error(
        "{value} at {index} of the step's array {array:?}: expected {low} to {high}; the tables are damaged: report it \
         as a bug of kvarn"
    )]
    OutOfRange {
        /// The array.
        array: &'static str,
        /// Index in the array.
        index: usize,
        /// The number.
        value: i64,
        /// Smallest number allowed.
        low: i64,
        /// Largest number allowed.
        high: i64,
    },
    /// An array of a step that is no longer what was sent.
    #[error(
        "{value} at {index} of the step's array {array:?} on cuda:{device}: expected {sent}, as sent; something else \
         wrote to that memory: look for it with compute-sanitizer"
    )]
    Overwritten {
        /// The array.
        array: &'static str,
        /// Index in the array.
        index: usize,
        /// The number found.
        value: i32,
        /// The number sent.
        sent: i32,
        /// Index of the device.
        device: usize,
    },
    /// A kernel that no image has.
    #[error(
        "kernel {name:?}: expected one of the {count} in the images; build them with the Rust code that names it"
    )]
    UnknownKernel {
        /// The name.
        name: String,
        /// Kernels loaded.
        count: usize,
    },
    /// A kernel whose parameters are not those of the Rust code.
    #[error(
        "parameters of {got:?} bytes for kernel {kernel}: expected {takes:?}, as in its image; build the kernels and the \
         Rust code from the same sources"
    )]
    Parameters {
        /// The kernel.
        kernel: &'static str,
        /// Bytes of each parameter that it takes.
        takes: &'static [usize],
        /// Bytes of each that it would be given.
        got: Vec<usize>,
    },
    /// A launch that the device cannot carry out.
    #[error("{what} {got} of kernel {kernel}: expected {expected}; choose a smaller configuration")]
    Launch {
        /// The argument.
        what: &'static str,
        /// Its value.
        got: String,
        /// The kernel.
        kernel: &'static str,
        /// What was expected.
        expected: String,
    },
    /// Memory of a caller that cannot be used.
    #[error("memory for {what}, {got}: expected {expected}; {fix}")]
    Borrowed {
        /// The memory.
        what: &'static str,
        /// Its address or its size.
        got: String,
        /// What was expected.
        expected: String,
        /// What to do.
        fix: &'static str,
    },
}

/// What kind of mistake an [`Error`] is, for callers that map errors to classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// CUDA cannot be used here.
    Unavailable,
    /// CUDA failed, or was used in an order that has no meaning.
    Cuda,
    /// Too little memory.
    Capacity,
    /// An argument outside its range.
    Value,
}

impl Error {
    /// What kind of mistake this is.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Unavailable(_) => ErrorKind::Unavailable,
            Self::Driver { .. }
            | Self::Lost { .. }
            | Self::AlreadyLost { .. }
            | Self::Forked
            | Self::Capturing { .. }
            | Self::OutOfRange { .. }
            | Self::Overwritten { .. }
            | Self::UnknownKernel { .. }
            | Self::Parameters { .. } => ErrorKind::Cuda,
            Self::OutOfMemory { .. } | Self::TooLarge { .. } => ErrorKind::Capacity,
            // Callers map what is within a pool error by themselves.
            Self::Pool(_) | Self::Unsupported { .. } | Self::Launch { .. } | Self::Borrowed { .. } => {
                ErrorKind::Value
            }
        }
    }
}
