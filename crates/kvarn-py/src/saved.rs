//! Saved sequences: out of pools as bytes, and into them from bytes or a file.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use kvarn::pool::PoolCore;
use kvarn::tables::SequenceId;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use crate::error::{ToPython, attached, detached};
use crate::memory::Memory;
use crate::pool::Sequence;

/// Where a saved sequence is read from.
#[derive(FromPyObject)]
pub(crate) enum Source {
    /// Its bytes.
    Bytes(PyBackedBytes),
    /// A file.
    Path(PathBuf),
}

/// The header and the image, which lie one behind the other in a file.
pub(crate) type Saved<'py> = (Bound<'py, PyBytes>, Memory);

/// What a CPU pool saves.
pub(crate) fn of_cpu<'py>(
    py: Python<'py>,
    pool: &kvarn_cpu::Pool,
    sequence: &Bound<'_, Sequence>,
) -> PyResult<Saved<'py>> {
    let id = sequence.get().id;
    let saved = detached(py, || pool.save(id))?;
    let bytes: *const [u8] = saved.image.as_slice();
    // SAFETY: nobody writes to an image.
    let image = unsafe { Memory::of_shared(bytes, saved.image) };
    Ok((PyBytes::new(py, &saved.header), image))
}

/// What a CUDA pool saves; the image lies in host memory.
pub(crate) fn of_cuda<'py>(
    py: Python<'py>,
    pool: &kvarn_cuda::Pool,
    sequence: &Bound<'_, Sequence>,
    stream: usize,
) -> PyResult<Saved<'py>> {
    let id = sequence.get().id;
    let stream = kvarn_cuda::Stream::from_address(stream);
    let saved = detached(py, || pool.save(id, stream))?;
    let bytes: *const [u8] = saved.image.bytes().map_err(|error| error.to_python(py))?;
    // SAFETY: nobody writes to an image, and its memory is not lent again before it is dropped.
    let image = unsafe { Memory::of_shared(bytes, saved.image) };
    Ok((PyBytes::new(py, &saved.header), image))
}

/// Has `load` read `source`.
pub(crate) fn load<E: ToPython + Send>(
    py: Python<'_>,
    core: &Arc<PoolCore>,
    source: Source,
    load: impl FnOnce(&mut (dyn Read + Send)) -> Result<SequenceId, E> + Send,
) -> PyResult<Sequence> {
    let id = match source {
        Source::Bytes(bytes) => detached(py, || load(&mut &bytes[..]))?,
        Source::Path(path) => {
            let mut file = attached(py, || {
                // With these arguments Python makes the subclass for the number, and names the file.
                py.detach(|| File::open(&path)).map_err(|error| {
                    PyOSError::new_err((error.raw_os_error(), error.to_string(), path.clone()))
                })
            })?;
            detached(py, || load(&mut file))?
        }
    };
    Ok(Sequence { core: Arc::clone(core), id })
}
