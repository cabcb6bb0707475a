//! Memory lent to Python.

use std::any::Any;
use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::Arc;

use kvarn_cpu::MemoryView;
use kvarn_dlpack::abi::{Device, ManagedTensor, ManagedTensorVersioned};
use kvarn_dlpack::{ElementType, Export};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyTuple};

/// Name of a capsule that holds a versioned tensor and was not consumed.
pub(crate) const VERSIONED: &CStr = c"dltensor_versioned";
/// Name of a capsule that holds a tensor of versions before 1.0 and was not consumed.
pub(crate) const LEGACY: &CStr = c"dltensor";

/// Memory of kvarn, to be viewed without copying by `numpy.from_dlpack` or `torch.from_dlpack`.
///
/// The memory lives as long as any view of it.
#[pyclass(module = "kvarn._kvarn", frozen)]
pub(crate) struct Memory(Export);

impl Memory {
    /// Memory of a pool.
    pub(crate) fn of_pool(view: &MemoryView, element: ElementType) -> Self {
        let data = NonNull::new(view.as_ptr()).expect("a mapping is not null");
        // SAFETY: a pool's memory is mapped while its owner lives, of the shape that the view says, aligned to the
        // element, and only ever accessed through raw pointers.
        Self(unsafe { Export::new(data, element, &view.shape, false, Arc::clone(&view.owner) as _) })
    }

    /// Memory of a pool on a CUDA device.
    pub(crate) fn of_device_pool(view: &kvarn_cuda::MemoryView, element: ElementType) -> Self {
        let address = std::ptr::with_exposed_provenance_mut(view.address() as usize);
        let data = NonNull::new(address).expect("device memory is not at 0");
        let device = Device::cuda(view.owner.device().index() as i32);
        // SAFETY: a pool's memory is provided while its owner lives, of the shape that the view says; it is an address of
        // the device, which nobody here reads.
        Self(
            unsafe { Export::new(data, element, &view.shape, false, Arc::clone(&view.owner) as _) }
                .on(device),
        )
    }

    /// A table, read-only.
    pub(crate) fn of_table(table: &Arc<Vec<i32>>, shape: &[usize]) -> Self {
        assert_eq!(table.len(), shape.iter().product::<usize>());
        let data = NonNull::from(table.as_slice()).cast();
        // SAFETY: as long as the shape says, and never changed while the owner lives.
        Self(unsafe { Export::new(data, ElementType::Int32, shape, true, Arc::clone(table) as _) })
    }

    /// Bytes that `owner` keeps where they are, read-only.
    ///
    /// # Safety
    /// They lie there unchanged as long as `owner` lives.
    pub(crate) unsafe fn of_shared(bytes: *const [u8], owner: Arc<dyn Any + Send + Sync>) -> Self {
        let data = NonNull::new(bytes.cast_mut()).expect("a slice is not at 0").cast();
        // SAFETY: the caller's promise.
        Self(unsafe { Export::new(data, ElementType::UInt8, &[bytes.len()], true, owner) })
    }

    /// The bytes of a result.
    pub(crate) fn of_bytes(mut bytes: Vec<u8>, shape: &[usize]) -> Self {
        assert_eq!(bytes.len(), shape.iter().product::<usize>());
        let data = NonNull::from(bytes.as_mut_slice()).cast();
        // SAFETY: the vector is as long as the shape says, and only dropped from here on.
        Self(unsafe { Export::new(data, ElementType::UInt8, shape, false, Arc::new(bytes)) })
    }

    /// The floats of a result.
    pub(crate) fn of_floats(mut floats: Vec<f32>, shape: &[usize]) -> Self {
        assert_eq!(floats.len(), shape.iter().product::<usize>());
        let data = NonNull::from(floats.as_mut_slice()).cast();
        // SAFETY: as in `of_bytes`.
        Self(unsafe { Export::new(data, ElementType::Float32, shape, false, Arc::new(floats)) })
    }
}

#[pymethods]
impl Memory {
    /// Sizes.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.shape())
    }

    /// Name of the element type.
    #[getter]
    fn dtype(&self) -> String {
        self.0.element().data_type().to_string()
    }

    /// Whether views must not be written.
    #[getter]
    fn read_only(&self) -> bool {
        self.0.read_only()
    }

    /// The device, as DLPack numbers it: (1, 0) is the CPU, (2, i) the CUDA device i.
    #[pyo3(name = "__dlpack_device__")]
    fn dlpack_device(&self) -> (i32, i32) {
        let device = self.0.device();
        (device.device_type, device.device_id)
    }

    /// A DLPack capsule over this memory.
    #[pyo3(name = "__dlpack__", signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn dlpack<'py>(
        &self,
        py: Python<'py>,
        stream: Option<isize>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let refused = |text: String| PyBufferError::new_err(text);
        // Work on a pool's device memory is ordered by the streams of its steps: there is nothing to wait for here.
        if let Some(stream) = stream.filter(|_| self.0.device().is_host()) {
            return Err(refused(format!("stream {stream}: expected None; memory of the CPU has no stream")));
        }
        if let Some(device) = dl_device.filter(|&device| device != self.dlpack_device()) {
            let text =
                format!("device {device:?}: expected {:?}; copy the view instead", self.dlpack_device());
            return Err(refused(text));
        }
        if copy == Some(true) {
            let text = "copy=True: expected False or None; copy the view instead";
            return Err(refused(text.to_owned()));
        }
        if max_version.is_some_and(|(major, _)| major >= 1) {
            let managed = self.0.versioned();
            // SAFETY: the capsule owns the loan until it is consumed, and the destructor gives back what was not.
            unsafe {
                PyCapsule::new_with_pointer_and_destructor(
                    py,
                    managed.cast(),
                    VERSIONED,
                    Some(drop_versioned),
                )
            }
        } else {
            let managed = self.0.legacy().map_err(|error| refused(error.to_string()))?;
            // SAFETY: as above.
            unsafe {
                PyCapsule::new_with_pointer_and_destructor(py, managed.cast(), LEGACY, Some(drop_legacy))
            }
        }
    }

    fn __repr__(&self) -> String {
        format!("<kvarn memory of shape {:?}, {}>", self.0.shape(), self.dtype())
    }
}

unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: called by Python with a live capsule; one that still has its first name was not consumed, so the loan is ours
    // to end.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            let managed =
                ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast::<ManagedTensorVersioned>();
            if let Some(deleter) = (*managed).deleter {
                deleter(managed);
            }
        }
    }
}

unsafe extern "C" fn drop_legacy(capsule: *mut ffi::PyObject) {
    // SAFETY: as in `drop_versioned`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, LEGACY.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, LEGACY.as_ptr()).cast::<ManagedTensor>();
            if let Some(deleter) = (*managed).deleter {
                deleter(managed);
            }
        }
    }
}
