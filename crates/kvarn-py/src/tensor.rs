//! Callers' arrays and tensors, borrowed through DLPack for the time of a call.

use std::ops::Range;

use kvarn::DType;
use kvarn_cpu::{TensorMut, TensorRef};
use kvarn_cuda::{Borrowed, DeviceTensor, Stream};
use kvarn_dlpack::abi::Device;
use kvarn_dlpack::{BorrowedTensor, ElementType, Error};
use pyo3::prelude::*;

use crate::error::Class;
use crate::lend::{Loan, lend};

/// An argument whose memory is borrowed. The Python object is kept alive, the memory as the lender promises.
pub(crate) struct Lent<'py> {
    name: &'static str,
    object: Bound<'py, PyAny>,
    loan: Loan,
    /// Where the memory must lie.
    device: Device,
}

impl<'py> Lent<'py> {
    /// Borrows the argument `name`: by the C function table of its type where it has one, else by `__dlpack__`.
    pub(crate) fn new(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let loan = lend(name, object)?;
        Ok(Self { name, object: object.clone(), loan, device: Device::CPU })
    }

    /// Borrows the argument `name`, a tensor on the CUDA device `device`.
    pub(crate) fn on_device(name: &'static str, object: &Bound<'py, PyAny>, device: usize) -> PyResult<Self> {
        let device = Device::cuda(device as i32);
        let loan = lend(name, object)?;
        if let Loan::Owned(_) = loan {
            // What lends by capsule only would have to be told of the stream; torch lends by its function table.
            let text =
                format!("{name}: expected a torch tensor on {device}; convert it, as in torch.from_dlpack");
            return Err(Class::Device.error(object.py(), text));
        }
        Ok(Self { name, object: object.clone(), loan, device })
    }

    /// The stream that the tensor's library gives work of its device to.
    pub(crate) fn stream(&self) -> PyResult<Stream> {
        let py = self.object.py();
        let stream = match &self.loan {
            // SAFETY: `object` is of this interpreter, which is attached.
            Loan::Borrowed(_, exchange) => unsafe { exchange.current_stream(self.device) },
            Loan::Owned(_) => None,
        };
        stream.map(Stream::from_raw).ok_or_else(|| {
            let error = self.error(
                Class::Device,
                ": its library names no stream: expected torch 2.10 or newer; update it",
            );
            error.set_cause(py, PyErr::take(py));
            error
        })
    }

    /// Memory of a device that a pool may use as its own, of one element type.
    pub(crate) fn device_memory(&self, right: ElementType) -> PyResult<Borrowed> {
        let view = self.view(|element| element == right, &right.data_type().to_string())?;
        self.check_output(&view)?;
        Ok(Borrowed {
            address: view.data().expose_provenance() as u64,
            bytes: view.len() * right.bytes(),
            owner: Box::new(self.object.clone().unbind()),
        })
    }

    /// A floating-point tensor of a device, to read or, if `output`, to write.
    pub(crate) fn device_tensor(&self, dimensions: &str, output: bool) -> PyResult<DeviceTensor> {
        let (view, dtype, shape, strides) = self.floats(dimensions)?;
        if output {
            self.check_output(&view)?;
        }
        // SAFETY: the lender's promise; torch keeps the memory of a tensor until work given to its stream has run.
        Ok(unsafe { DeviceTensor::from_raw(view.data().expose_provenance() as u64, dtype, shape, strides) })
    }

    /// Address and length of a contiguous float32 tensor of a device.
    pub(crate) fn device_floats(&self) -> PyResult<(u64, usize)> {
        let view = self.view(|element| element == ElementType::Float32, "float32")?;
        if !view.is_contiguous() {
            return Err(self.wrong_strides(&view, "contiguous memory"));
        }
        Ok((view.data().expose_provenance() as u64, view.len()))
    }

    /// A checked view; `expected` says which element types are right.
    fn view(&self, right: impl Fn(ElementType) -> bool, expected: &str) -> PyResult<BorrowedTensor<'_>> {
        let view = match (&self.loan, self.device) {
            // SAFETY: filled in by the producer for `object`, which `self` keeps alive.
            (Loan::Borrowed(tensor, _), Device::CPU) => unsafe { BorrowedTensor::from_raw(tensor, false) },
            // SAFETY: as above; only the address is used.
            (Loan::Borrowed(tensor, _), device) => unsafe {
                BorrowedTensor::from_raw_on(device, tensor, false)
            },
            (Loan::Owned(tensor), _) => tensor.view(),
        };
        let wrong_type = |data_type| {
            let text = format!(" of dtype {data_type}: expected {expected}; convert it first");
            self.error(Class::DType, &text)
        };
        match view {
            Ok(view) if right(view.element()) => Ok(view),
            Ok(view) => Err(wrong_type(view.data_type())),
            Err(Error::ElementType(data_type)) => Err(wrong_type(data_type)),
            Err(error) => {
                let class = match error {
                    Error::Device(_) | Error::OtherDevice { .. } => Class::Device,
                    Error::Dimensions(_) => Class::Shape,
                    _ => Class::Tensor,
                };
                Err(self.error(class, &format!(": {error}")))
            }
        }
    }

    fn error(&self, class: Class, text: &str) -> PyErr {
        class.error(self.object.py(), format!("{}{text}", self.name))
    }

    fn wrong_shape(&self, view: &BorrowedTensor<'_>, expected: &str) -> PyErr {
        self.error(Class::Shape, &format!(" of shape {:?}: expected {expected}", view.shape()))
    }

    fn wrong_strides(&self, view: &BorrowedTensor<'_>, expected: &str) -> PyErr {
        let (strides, name) = (view.strides(), self.name);
        let fix = format!("pass {name}.contiguous() or numpy.ascontiguousarray({name})");
        self.error(Class::Shape, &format!(" with strides {strides:?}: expected {expected}; {fix}"))
    }

    /// A floating-point tensor with the three `dimensions`, the last one contiguous: view, type, shape, strides.
    fn floats(&self, dimensions: &str) -> PyResult<(BorrowedTensor<'_>, DType, [usize; 3], [isize; 3])> {
        let view = self.floats_view()?;
        let (Some(dtype), &[a, b, c], &[stride_a, stride_b, stride_c]) =
            (dtype(view.element()), view.shape(), view.strides())
        else {
            return Err(self.wrong_shape(&view, &format!("three dimensions, {dimensions}; reshape it")));
        };
        if view.is_empty() {
            // Strides between elements that do not exist mean nothing.
            return Ok((view, dtype, [a, b, c], [0, 0, 1]));
        }
        if stride_c != 1 && c > 1 {
            return Err(self.wrong_strides(&view, "1 in the last dimension"));
        }
        Ok((view, dtype, [a, b, c], [stride_a, stride_b, stride_c]))
    }

    /// A floating-point tensor to read.
    pub(crate) fn tensor(&self, dimensions: &str) -> PyResult<TensorRef<'_>> {
        let (view, dtype, shape, strides) = self.floats(dimensions)?;
        // SAFETY: the lender's promise, kept while `self` lives; writing meanwhile is documented as the caller's race.
        Ok(unsafe { TensorRef::from_raw(view.data(), dtype, shape, strides) })
    }

    /// A floating-point tensor to write: contiguous, so no two elements overlap.
    pub(crate) fn tensor_mut(&self, dimensions: &str) -> PyResult<TensorMut<'_>> {
        let (view, dtype, shape, strides) = self.floats(dimensions)?;
        self.check_output(&view)?;
        // SAFETY: as in `tensor`; writable and without overlap, as checked.
        Ok(unsafe { TensorMut::from_raw(view.data(), dtype, shape, strides) })
    }

    /// A contiguous float32 array of `shape` to write.
    pub(crate) fn floats_mut(&mut self, shape: &[usize]) -> PyResult<&mut [f32]> {
        let view = self.view(|element| element == ElementType::Float32, "float32")?;
        if view.shape() != shape {
            return Err(self.wrong_shape(&view, &format!("{shape:?}; allocate it so")));
        }
        self.check_output(&view)?;
        if view.is_empty() {
            return Ok(&mut []);
        }
        #[expect(clippy::cast_ptr_alignment, reason = "aligned for the element type, as the view checked")]
        let data = view.data().cast::<f32>();
        // SAFETY: contiguous, aligned and writable as checked; the arrays passed here are made by our own Python code
        // for this call, so nobody else uses them.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, view.len()) })
    }

    fn check_output(&self, view: &BorrowedTensor<'_>) -> PyResult<()> {
        if view.read_only() {
            let text = ": read-only memory: expected a writable output; pass another array";
            return Err(self.error(Class::Tensor, text));
        }
        if !view.is_contiguous() {
            return Err(self.wrong_strides(view, "a contiguous output"));
        }
        Ok(())
    }

    /// Refuses `output` where it shares memory with this argument, or is of another type.
    pub(crate) fn check_apart(&self, output: &Self) -> PyResult<()> {
        let (ours, theirs) = (self.floats_view()?, output.floats_view()?);
        if theirs.element() != ours.element() {
            let text = format!(
                " of dtype {}: expected {}, the type of {}; allocate it so",
                theirs.data_type(),
                ours.data_type(),
                self.name
            );
            return Err(output.error(Class::DType, &text));
        }
        let (a, b) = (span(&ours), span(&theirs));
        if a.start < b.end && b.start < a.end {
            let text = format!(
                ": it shares memory with {}: expected memory of its own; pass another array",
                self.name
            );
            return Err(output.error(Class::Tensor, &text));
        }
        Ok(())
    }

    fn floats_view(&self) -> PyResult<BorrowedTensor<'_>> {
        self.view(|element| dtype(element).is_some(), "float16, bfloat16 or float32")
    }

    /// The values of a one-dimensional float32 array; `dimension` says what it counts.
    pub(crate) fn vector(&self, dimension: &str) -> PyResult<Vec<f32>> {
        let view = self.view(|element| element == ElementType::Float32, "float32")?;
        let (&[length], &[stride]) = (view.shape(), view.strides()) else {
            return Err(self.wrong_shape(&view, &format!("one dimension, {dimension}; reshape it")));
        };
        #[expect(clippy::cast_ptr_alignment, reason = "aligned for the element type, as the view checked")]
        let data = view.data().cast::<f32>();
        // SAFETY: the lender's promise.
        let value = |index| unsafe { data.offset(index * stride).read() };
        Ok((0..length as isize).map(value).collect())
    }

    /// Bytes `[tiles, bytes]`, contiguous; `origin` says where the second extent comes from.
    pub(crate) fn bytes(&self, bytes: usize, origin: &str) -> PyResult<&[u8]> {
        let view = self.view(|element| element == ElementType::UInt8, "uint8")?;
        if view.shape().len() != 2 || view.shape()[1] != bytes {
            return Err(self.wrong_shape(&view, &format!("[tiles, {bytes}], {origin}")));
        }
        if !view.is_contiguous() {
            return Err(self.wrong_strides(&view, "contiguous memory"));
        }
        if view.is_empty() {
            return Ok(&[]);
        }
        // SAFETY: contiguous, and lent while `self` lives; writing meanwhile is documented as the caller's race.
        Ok(unsafe { std::slice::from_raw_parts(view.data(), view.len()) })
    }
}

/// The bytes between the first and the last element of a view.
fn span(view: &BorrowedTensor<'_>) -> Range<isize> {
    let at = view.data().addr() as isize;
    if view.is_empty() {
        return at..at;
    }
    let steps = view.shape().iter().zip(view.strides()).map(|(&size, &stride)| (size as isize - 1) * stride);
    let (low, high) = steps.fold((0, 0), |(low, high), step| (low + step.min(0), high + step.max(0)));
    let bytes = view.element().bytes() as isize;
    at + low * bytes..at + (high + 1) * bytes
}

/// The type of a floating-point tensor.
const fn dtype(element: ElementType) -> Option<DType> {
    match element {
        ElementType::Float16 => Some(DType::Float16),
        ElementType::BFloat16 => Some(DType::BFloat16),
        ElementType::Float32 => Some(DType::Float32),
        ElementType::UInt8 | ElementType::Int32 => None,
    }
}
