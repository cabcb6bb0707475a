//! How an array is lent: by the C function table of its type where it has one, else by a DLPack capsule.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use kvarn_dlpack::abi::{Device, ManagedTensor, ManagedTensorVersioned, Tensor};
use kvarn_dlpack::exchange::{CAPSULE_NAME, Exchange};
use kvarn_dlpack::{Error, OwnedTensor};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use pyo3::{ffi, intern};

use crate::error::Class;
use crate::memory::{LEGACY, VERSIONED};

/// A lent tensor.
pub(crate) enum Loan {
    /// Lives as long as the object; and the functions of its library.
    Borrowed(Tensor, Exchange),
    /// Has its own life.
    Owned(OwnedTensor),
}

/// Borrows the argument `name`.
pub(crate) fn lend(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Loan> {
    let Some(exchange) = exchange(object)? else {
        return export(name, object).map(Loan::Owned);
    };
    refuse_autograd(name, object)?;
    let pointer = NonNull::new(object.as_ptr().cast::<c_void>());
    // SAFETY: we are attached, and the function was found on the type of `object`.
    match pointer.and_then(|pointer| unsafe { exchange.borrow(pointer) }) {
        Some(tensor) => Ok(Loan::Borrowed(tensor, exchange)),
        None => Err(refused(name, object, PyErr::fetch(object.py()))),
    }
}

/// The functions of the type of `object`, if it has them.
fn exchange(object: &Bound<'_, PyAny>) -> PyResult<Option<Exchange>> {
    let attribute = object.get_type().getattr_opt(intern!(object.py(), "__dlpack_c_exchange_api__"))?;
    let Some(capsule) = attribute.and_then(|attribute| attribute.cast_into::<PyCapsule>().ok()) else {
        return Ok(None);
    };
    Ok(pointer(&capsule, CAPSULE_NAME).and_then(|table| {
        // SAFETY: the capsule has the name that the standard gives to a table.
        unsafe { Exchange::find(table) }
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
fn export(name: &str, object: &Bound<'_, PyAny>) -> PyResult<OwnedTensor> {
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
        Ok(Device { device_type, device_id })
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
        return Err(format!(
            "__dlpack__ gave an object of type {kind}: {expected}; the array library is faulty"
        ));
    };
    let (managed, versioned, used) = match (pointer(capsule, VERSIONED), pointer(capsule, LEGACY)) {
        (Some(managed), _) => (managed, true, c"used_dltensor_versioned"),
        (None, Some(managed)) => (managed, false, c"used_dltensor"),
        (None, None) => {
            // SAFETY: a live capsule; its name is null or a C string.
            let name = unsafe { NonNull::new(ffi::PyCapsule_GetName(capsule.as_ptr()).cast_mut()) };
            // SAFETY: not null, so a C string that lives as long as the capsule.
            let name =
                name.map_or("".into(), |name| unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy());
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
