//! Errors and panics of Rust as the classes of `kvarn.errors`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kvarn::pool::PoolError;
use kvarn::tables::TableErrorKind;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// A class of `kvarn.errors`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Class {
    Kvarn,
    Shape,
    DType,
    Tensor,
    Device,
    NonFinite,
    Config,
    Format,
    Capacity,
    State,
    Cuda,
    CudaUnavailable,
}

impl Class {
    const NAMES: [&str; 12] = [
        "KvarnError",
        "ShapeError",
        "DTypeError",
        "TensorError",
        "DeviceError",
        "NonFiniteError",
        "ConfigError",
        "FormatError",
        "CapacityError",
        "StateError",
        "CudaError",
        "CudaUnavailableError",
    ];

    /// An exception of this class.
    pub(crate) fn error(self, py: Python<'_>, text: impl Into<String>) -> PyErr {
        static CLASSES: PyOnceLock<Vec<Py<PyType>>> = PyOnceLock::new();
        let classes = CLASSES.get_or_try_init(py, || {
            let module = py.import("kvarn.errors")?;
            Self::NAMES
                .iter()
                .map(|&name| Ok(module.getattr(name)?.cast_into::<PyType>()?.unbind()))
                .collect::<PyResult<Vec<_>>>()
        });
        match classes {
            Ok(classes) => PyErr::from_type(classes[self as usize].bind(py).clone(), (text.into(),)),
            Err(error) => error,
        }
    }
}

/// Conversion of an error of a Rust crate.
pub(crate) trait ToPython {
    /// The exception.
    fn to_python(&self, py: Python<'_>) -> PyErr;
}

impl ToPython for kvarn::Error {
    fn to_python(&self, py: Python<'_>) -> PyErr {
        let class = match self {
            Self::Bits { .. }
            | Self::HeadDim(_)
            | Self::Group(_)
            | Self::Iterations(_)
            | Self::SinkTokens { .. }
            | Self::RecentTokens { .. }
            | Self::Name { .. } => Class::Config,
            Self::Length { .. } => Class::Shape,
            Self::PublishedBits { .. } | Self::Format(_) => Class::Format,
        };
        class.error(py, self.to_string())
    }
}

impl ToPython for PoolError {
    fn to_python(&self, py: Python<'_>) -> PyErr {
        let class = match self {
            Self::Codec(error) => return error.to_python(py),
            Self::Table(error) => match error.kind() {
                TableErrorKind::Shape => Class::Shape,
                TableErrorKind::State => Class::State,
                TableErrorKind::Capacity => Class::Capacity,
            },
            Self::Shape { .. } | Self::Value { .. } => Class::Shape,
            Self::DType { .. } => Class::DType,
            Self::Order(_) => Class::State,
            Self::TooLarge { .. } => Class::Capacity,
        };
        class.error(py, self.to_string())
    }
}

impl ToPython for kvarn_cpu::Error {
    fn to_python(&self, py: Python<'_>) -> PyErr {
        match self {
            Self::Pool(error) => error.to_python(py),
            Self::Memory { .. } | Self::Image { .. } => Class::Capacity.error(py, self.to_string()),
        }
    }
}

impl ToPython for kvarn_cuda::Error {
    fn to_python(&self, py: Python<'_>) -> PyErr {
        use kvarn_cuda::ErrorKind;
        let class = match self {
            Self::Pool(error) => return error.to_python(py),
            Self::Unsupported { .. } => Class::Config,
            other => match other.kind() {
                ErrorKind::Unavailable => Class::CudaUnavailable,
                ErrorKind::Cuda => Class::Cuda,
                ErrorKind::Capacity => Class::Capacity,
                ErrorKind::Value => Class::Shape,
            },
        };
        class.error(py, self.to_string())
    }
}

/// Runs `work` without the GIL. A panic, which is a bug of kvarn, becomes a `KvarnError`: the process goes on.
pub(crate) fn detached<T, E>(py: Python<'_>, work: impl FnOnce() -> Result<T, E> + Send) -> PyResult<T>
where
    T: Send,
    E: ToPython + Send,
{
    attached(py, || py.detach(work).map_err(|error| error.to_python(py)))
}

/// Runs `work` with the GIL. A panic becomes a `KvarnError`.
pub(crate) fn attached<T>(py: Python<'_>, work: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let message = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        let text = format!("internal error ({message}): expected none; please report it as a bug of kvarn");
        Err(Class::Kvarn.error(py, text))
    })
}
