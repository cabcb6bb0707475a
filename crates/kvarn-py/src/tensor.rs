//! Callers' arrays and tensors, borrowed through DLPack for the time of a call.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use kvarn_cpu::{DType, TensorMut, TensorRef};
use kvarn_dlpack::abi::{ManagedTensor, ManagedTensorVersioned, Tensor};
use kvarn_dlpack::exchange::{Borrow, CAPSULE_NAME};
use kvarn_dlpack::{BorrowedTensor, ElementType, Error, OwnedTensor};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use pyo3::{ffi, intern};

use crate::error::Class;

const VERSIONED: &CStr = c"dltensor_versioned";
const LEGACY: &CStr = c"dltensor";

/// An argument whose memory is borrowed. The Python object is kept alive, the memory as the lender promises.
pub(crate) struct Lent<'py> {
    name: &'static str,
    object: Bound<'py, PyAny>,
    loan: Loan,
}

enum Loan {
    /// Lives as long as the object.
    Borrowed(Tensor),
    /// Has its own life.
    Owned(OwnedTensor),
}

impl<'py> Lent<'py> {
    /// Borrows the argument `name`: by the C function table of its type where it has one, else by `__dlpack__`.
    pub(crate) fn new(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let loan = match borrow_function(object)? {
            Some(borrow) => {
                refuse_autograd(name, object)?;
                let pointer = NonNull::new(object.as_ptr().cast::<c_void>());
                // SAFETY: we are attached, and the function was found on the type of `object`.
                match pointer.and_then(|pointer| unsafe { borrow.call(pointer) }) {
                    Some(tensor) => Loan::Borrowed(tensor),
                    None => return Err(refused(name, object, PyErr::fetch(py))),
                }
            }
            None => Loan::Owned(export(name, object)?),
        };
        Ok(Self { name, object: object.clone(), loan })
    }

    fn view(&self) -> PyResult<BorrowedTensor<'_>> {
        let view = match &self.loan {
            // SAFETY: filled in by the producer for `object`, which `self` keeps alive.
            Loan::Borrowed(tensor) => unsafe { BorrowedTensor::from_raw(tensor, false) },
            Loan::Owned(tensor) => tensor.view(),
        };
        view.map_err(|error| {
            let class = match error {
                Error::Device(_) => Class::Device,
                Error::ElementType(_) => Class::DType,
                Error::Dimensions(_) => Class::Shape,
                _ => Class::Tensor,
            };
            self.error(class, &error.to_string())
        })
    }

    fn error(&self, class: Class, text: &str) -> PyErr {
        class.error(self.object.py(), format!("{}: {text}", self.name))
    }

    /// Type, shape and strides of a floating-point tensor with the three `dimensions`, the last one contiguous.
    fn floats(&self, dimensions: &str) -> PyResult<(*mut u8, DType, [usize; 3], [isize; 3])> {
        let view = self.view()?;
        let dtype = match view.element() {
            ElementType::Float16 => DType::Float16,
            ElementType::BFloat16 => DType::BFloat16,
            ElementType::Float32 => DType::Float32,
            ElementType::UInt8 | ElementType::Int32 => {
                let text = format!(
                    "dtype {}: expected float16, bfloat16 or float32; convert it first",
                    view.data_type()
                );
                return Err(self.error(Class::DType, &text));
            }
        };
        let (Ok(shape), Ok(strides)) = (view.shape().try_into(), <[isize; 3]>::try_from(view.strides())) else {
            let text = format!("shape {:?}: expected three dimensions, {dimensions}; reshape it", view.shape());
            return Err(self.error(Class::Shape, &text));
        };
        let shape: [usize; 3] = shape;
        if strides[2] != 1 && shape[2] > 1 {
            let text = format!(
                "strides {strides:?}: expected 1 in the last dimension; pass {}.contiguous() or numpy.ascontiguousarray({})",
                self.name, self.name
            );
            return Err(self.error(Class::Shape, &text));
        }
        Ok((view.data(), dtype, shape, strides))
    }

    /// A floating-point tensor to read.
    pub(crate) fn tensor(&self, dimensions: &str) -> PyResult<TensorRef<'_>> {
        let (data, dtype, shape, strides) = self.floats(dimensions)?;
        // SAFETY: the lender's promise, kept while `self` lives; writing meanwhile is documented as the caller's race.
        Ok(unsafe { TensorRef::from_raw(data, dtype, shape, strides) })
    }

    /// A floating-point tensor to write: contiguous, so no two elements overlap.
    pub(crate) fn tensor_mut(&self, dimensions: &str) -> PyResult<TensorMut<'_>> {
        let (data, dtype, shape, strides) = self.floats(dimensions)?;
        self.check_output()?;
        // SAFETY: as in `tensor`; writable and without overlap, as checked.
        Ok(unsafe { TensorMut::from_raw(data, dtype, shape, strides) })
    }

    /// A contiguous float32 array of `shape` to write.
    pub(crate) fn floats_mut(&self, shape: &[usize]) -> PyResult<&mut [f32]> {
        let view = self.view()?;
        if view.element() != ElementType::Float32 {
            let text = format!("dtype {}: expected float32; allocate it so", view.data_type());
            return Err(self.error(Class::DType, &text));
        }
        if view.shape() != shape {
            let text = format!("shape {:?}: expected {shape:?}; allocate it so", view.shape());
            return Err(self.error(Class::Shape, &text));
        }
        self.check_output()?;
        // SAFETY: contiguous, aligned and writable as checked; the arrays passed here are made by our own Python code for
        // this call, so nobody else uses them.
        Ok(unsafe { slice_mut(&view) })
    }

    fn check_output(&self) -> PyResult<()> {
        let view = self.view()?;
        if view.read_only() {
            return Err(
                self.error(Class::Tensor, "read-only memory: expected a writable output; pass another array")
            );
        }
        if !view.is_contiguous() {
            let text = format!("strides {:?}: expected a contiguous output; allocate it so", view.strides());
            return Err(self.error(Class::Shape, &text));
        }
        Ok(())
    }

    /// The one-dimensional float32 array `[length]`.
    pub(crate) fn vector(&self, what: &str) -> PyResult<Vec<f32>> {
        let view = self.view()?;
        if view.element() != ElementType::Float32 {
            let text = format!("dtype {}: expected float32; convert it first", view.data_type());
            return Err(self.error(Class::DType, &text));
        }
        let (&[length], &[stride]) = (view.shape(), view.strides()) else {
            let text = format!("shape {:?}: expected one dimension, {what}; reshape it", view.shape());
            return Err(self.error(Class::Shape, &text));
        };
        let data = view.data().cast::<f32>();
        // SAFETY: the lender's promise; aligned, as the view checked.
        Ok((0..length as isize).map(|index| unsafe { data.offset(index * stride).read_unaligned() }).collect())
    }

    /// Bytes `[tiles, bytes]`, contiguous; `expected` says where the second extent comes from.
    pub(crate) fn bytes(&self, bytes: usize, expected: &str) -> PyResult<&[u8]> {
        let view = self.view()?;
        if view.element() != ElementType::UInt8 {
            let text = format!("dtype {}: expected uint8; pass what encode returned", view.data_type());
            return Err(self.error(Class::DType, &text));
        }
        if view.shape().len() != 2 || view.shape()[1] != bytes {
            let text = format!("shape {:?}: expected [tiles, {bytes}], {expected}", view.shape());
            return Err(self.error(Class::Shape, &text));
        }
        if !view.is_contiguous() {
            let text = format!(
                "strides {:?}: expected contiguous memory; pass {}.contiguous() or numpy.ascontiguousarray({})",
                view.strides(),
                self.name,
                self.name
            );
            return Err(self.error(Class::Shape, &text));
        }
        if view.is_empty() {
            return Ok(&[]);
        }
        // SAFETY: contiguous, and lent while `self` lives; writing meanwhile is documented as the caller's race.
        Ok(unsafe { std::slice::from_raw_parts(view.data(), view.len()) })
    }
}

/// # Safety
/// `view` is contiguous, of float32, writable, and nobody else uses its memory for the lifetime of the slice.
#[expect(clippy::mut_from_ref, reason = "the memory is the lender's, not the view's")]
unsafe fn slice_mut<'a>(view: &BorrowedTensor<'a>) -> &'a mut [f32] {
    if view.is_empty() {
        return &mut [];
    }
    #[expect(clippy::cast_ptr_alignment, reason = "aligned for the element type, as the view checked")]
    // SAFETY: the caller's promise.
    unsafe {
        std::slice::from_raw_parts_mut(view.data().cast::<f32>(), view.len())
    }
}

/// The borrowing function of the type of `object`, if it has one.
fn borrow_function(object: &Bound<'_, PyAny>) -> PyResult<Option<Borrow>> {
    let attribute = object.get_type().getattr_opt(intern!(object.py(), "__dlpack_c_exchange_api__"))?;
    let Some(capsule) = attribute.and_then(|attribute| attribute.cast_into::<PyCapsule>().ok()) else {
        return Ok(None);
    };
    Ok(pointer(&capsule, CAPSULE_NAME).and_then(|table| {
        // SAFETY: the capsule has the name that the standard gives to a table.
        unsafe { Borrow::find(table) }
    }))
}

/// The pointer of `capsule` if it is called `name`.
fn pointer(capsule: &Bound<'_, PyCapsule>, name: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: a live capsule and a C string; the pointer is asked for only where the name fits.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule.as_ptr(), name.as_ptr()) == 0 {
            return None;
        }
        NonNull::new(ffi::PyCapsule_GetPointer(capsule.as_ptr(), name.as_ptr()))
    }
}

fn refuse_autograd(name: &str, object: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = object.py();
    let requires_grad = object.getattr_opt(intern!(py, "requires_grad"))?;
    if requires_grad.is_some_and(|flag| flag.is_truthy().unwrap_or(false)) {
        let text = format!("{name} requires grad: expected a tensor outside autograd; pass {name}.detach()");
        return Err(Class::Tensor.error(py, text));
    }
    Ok(())
}

/// Exports `object` by `__dlpack__` and takes the tensor out of the capsule.
fn export(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<OwnedTensor> {
    let py = object.py();
    let Some(method) = object.getattr_opt(intern!(py, "__dlpack__"))? else {
        let text = format!(
            "{name} of type {}: expected a NumPy array or a torch tensor; convert it first",
            object.get_type().name()?
        );
        return Err(Class::DType.error(py, text));
    };
    refuse_autograd(name, object)?;
    let device = object.call_method0(intern!(py, "__dlpack_device__")).and_then(|device| {
        let (device_type, device_id) = device.extract::<(i32, i32)>()?;
        Ok(kvarn_dlpack::abi::Device { device_type, device_id })
    });
    match device {
        Ok(device) if !device.is_host() => {
            return Err(Class::Device.error(py, format!("{name}: {}", Error::Device(device))));
        }
        Ok(_) => {}
        Err(cause) => return Err(refused(name, object, cause)),
    }
    let arguments = PyDict::new(py);
    arguments.set_item(intern!(py, "max_version"), (1, 3))?;
    let capsule = match method.call((), Some(&arguments)) {
        // A producer older than DLPack 1.0 does not know the argument.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => method.call0(),
        other => other,
    };
    let capsule = capsule.map_err(|cause| refused(name, object, cause))?;
    take(&capsule).map_err(|text| Class::Tensor.error(py, format!("{name}: {text}")))
}

/// Takes the tensor out of a capsule and marks the capsule as consumed.
fn take(object: &Bound<'_, PyAny>) -> Result<OwnedTensor, String> {
    let expected = "expected a DLPack capsule that holds a tensor";
    let Ok(capsule) = object.cast::<PyCapsule>() else {
        let kind = object.get_type().name().map_or_else(|_| "?".to_owned(), |kind| kind.to_string());
        return Err(format!("__dlpack__ gave an object of type {kind}: {expected}; the array library is faulty"));
    };
    let (managed, versioned, used) = match (pointer(capsule, VERSIONED), pointer(capsule, LEGACY)) {
        (Some(managed), _) => (managed, true, c"used_dltensor_versioned"),
        (None, Some(managed)) => (managed, false, c"used_dltensor"),
        (None, None) => {
            // SAFETY: a live capsule; its name is null or a C string.
            let name = unsafe { NonNull::new(ffi::PyCapsule_GetName(capsule.as_ptr()).cast_mut()) };
            // SAFETY: not null, so a C string that lives as long as the capsule.
            let name = name.map_or("".into(), |name| unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy());
            let fix = if name.starts_with("used_") {
                "it was consumed before; export the array again"
            } else {
                "it belongs to something else"
            };
            return Err(format!("capsule {name:?}: {expected}; {fix}"));
        }
    };
    // SAFETY: a live capsule and a static C string.
    if unsafe { ffi::PyCapsule_SetName(capsule.as_ptr(), used.as_ptr()) } != 0 {
        return Err(format!("{}: the capsule cannot be marked as consumed", PyErr::fetch(object.py())));
    }
    // SAFETY: the name says what the pointer is, and that it was not consumed; renamed, nobody else will consume it.
    unsafe {
        if versioned {
            OwnedTensor::from_versioned(managed.cast::<ManagedTensorVersioned>())
                .map_err(|error| error.to_string())
        } else {
            Ok(OwnedTensor::from_legacy(managed.cast::<ManagedTensor>()))
        }
    }
}

/// An error for an object whose library will not lend it.
fn refused(name: &str, object: &Bound<'_, PyAny>, cause: PyErr) -> PyErr {
    let py = object.py();
    let device = object.getattr("device").and_then(|device| device.str()).map(|device| device.to_string());
    let error = match device {
        Ok(device) if device != "cpu" => {
            let text = format!("{name}: device {device}: expected cpu; copy the tensor to the host first");
            Class::Device.error(py, text)
        }
        _ => {
            let text = format!(
                "{name} cannot be lent through DLPack ({}): expected a plain dense array of float16, bfloat16, float32 or uint8; convert it first",
                cause.value(py)
            );
            Class::Tensor.error(py, text)
        }
    };
    error.set_cause(py, Some(cause));
    error
}
