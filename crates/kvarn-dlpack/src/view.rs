//! A checked view of a lent tensor.

use std::marker::PhantomData;

use crate::abi::{DataType, Device, Tensor};
use crate::{ElementType, Error};

/// Most dimensions that a view can have.
pub const MAX_DIMENSIONS: usize = 8;

/// Host memory of a known element type and shape, lent for `'a`.
///
/// Sizes are not negative and fit in memory, the first element is aligned, an element exists wherever the shape says
/// so; strides are in elements and may be zero or negative. Shape and strides are copied, so the lender may drop them.
#[derive(Clone, Copy, Debug)]
pub struct BorrowedTensor<'a> {
    data: *mut u8,
    element: ElementType,
    ndim: usize,
    shape: [usize; MAX_DIMENSIONS],
    strides: [isize; MAX_DIMENSIONS],
    device: Device,
    read_only: bool,
    lender: PhantomData<&'a ()>,
}

impl BorrowedTensor<'_> {
    /// Checks `tensor`.
    ///
    /// # Errors
    /// Where the memory is not on the host, of a type that kvarn does not exchange, absent, or inconsistent.
    ///
    /// # Safety
    /// `tensor.shape` and `tensor.strides` are null or hold `tensor.ndim` elements; `tensor.data`, if not null and on
    /// the host, points to the memory that shape, strides and offset describe, and lives as long as the view's lifetime says.
    pub unsafe fn from_raw(tensor: &Tensor, read_only: bool) -> Result<Self, Error> {
        if !tensor.device.is_host() {
            return Err(Error::Device(tensor.device));
        }
        // SAFETY: the caller's promise.
        unsafe { Self::checked(tensor, read_only) }
    }

    /// Checks `tensor`, whose memory must be that of `device`.
    ///
    /// # Errors
    /// As [`from_raw`](Self::from_raw).
    ///
    /// # Safety
    /// As [`from_raw`](Self::from_raw); `tensor.data` is an address of the device, not to be read by the CPU.
    pub unsafe fn from_raw_on(device: Device, tensor: &Tensor, read_only: bool) -> Result<Self, Error> {
        if tensor.device != device {
            return Err(Error::OtherDevice { got: tensor.device, expected: device });
        }
        // SAFETY: the caller's promise.
        unsafe { Self::checked(tensor, read_only) }
    }

    unsafe fn checked(tensor: &Tensor, read_only: bool) -> Result<Self, Error> {
        let ndim = usize::try_from(tensor.ndim)
            .ok()
            .filter(|&ndim| ndim <= MAX_DIMENSIONS && (ndim == 0 || !tensor.shape.is_null()))
            .ok_or(Error::Dimensions(tensor.ndim))?;
        let element = ElementType::from_data_type(tensor.dtype).ok_or(Error::ElementType(tensor.dtype))?;
        let mut sizes = [0; MAX_DIMENSIONS];
        if ndim > 0 {
            // SAFETY: not null, so it holds `ndim` elements by the caller's promise.
            sizes[..ndim].copy_from_slice(unsafe { std::slice::from_raw_parts(tensor.shape, ndim) });
        }
        let sizes = &sizes[..ndim];
        let wrong_shape = || Error::Shape(sizes.to_vec());
        let mut shape = [1; MAX_DIMENSIONS];
        let mut bytes = element.bytes();
        for (size, &given) in shape.iter_mut().zip(sizes) {
            *size = usize::try_from(given).map_err(|_| wrong_shape())?;
            // A dimension of no elements leaves the others free, so they are bounded as if it had one.
            bytes = bytes.checked_mul((*size).max(1)).ok_or_else(wrong_shape)?;
        }
        if bytes > isize::MAX as usize {
            return Err(wrong_shape());
        }
        let mut strides = [1; MAX_DIMENSIONS];
        if tensor.strides.is_null() {
            for dimension in (1..ndim).rev() {
                strides[dimension - 1] = strides[dimension] * shape[dimension] as isize;
            }
        } else if ndim > 0 {
            // SAFETY: not null, so it holds `ndim` elements by the caller's promise.
            let given = unsafe { std::slice::from_raw_parts(tensor.strides, ndim) };
            strides.iter_mut().zip(given).for_each(|(stride, &given)| *stride = given as isize);
        }
        let elements: usize = shape[..ndim].iter().product();
        let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        if elements > 0 {
            if tensor.data.is_null() {
                return Err(Error::NullData(elements));
            }
            if !data.addr().is_multiple_of(element.bytes()) {
                return Err(Error::Alignment { address: data.addr(), bytes: element.bytes() });
            }
        }
        let device = tensor.device;
        Ok(Self { data, element, ndim, shape, strides, device, read_only, lender: PhantomData })
    }

    /// The first element, aligned. Not to be read if the tensor is empty, nor written if it is read-only.
    pub const fn data(&self) -> *mut u8 {
        self.data
    }

    /// Element type.
    pub const fn element(&self) -> ElementType {
        self.element
    }

    /// Element type in DLPack's terms; displays as its name.
    pub const fn data_type(&self) -> DataType {
        self.element.data_type()
    }

    /// Where the memory lies.
    pub const fn device(&self) -> Device {
        self.device
    }

    /// Sizes.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.ndim]
    }

    /// Strides in elements.
    pub fn strides(&self) -> &[isize] {
        &self.strides[..self.ndim]
    }

    /// Whether writing is forbidden.
    pub const fn read_only(&self) -> bool {
        self.read_only
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements lie one after the other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.is_empty()
            || self.shape().iter().zip(self.strides()).rev().all(|(&size, &stride)| {
                let fits = size == 1 || stride == expected;
                expected *= size as isize;
                fits
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(data: &mut [f32], shape: &mut [i64], strides: Option<&mut [i64]>) -> Tensor {
        Tensor {
            data: data.as_mut_ptr().cast(),
            device: Device::CPU,
            ndim: shape.len() as i32,
            dtype: ElementType::Float32.data_type(),
            shape: shape.as_mut_ptr(),
            strides: strides.map_or(std::ptr::null_mut(), <[i64]>::as_mut_ptr),
            byte_offset: 0,
        }
    }

    fn view(tensor: &Tensor) -> Result<BorrowedTensor<'_>, Error> {
        // SAFETY: the tests make tensors over live slices of the lengths that they name.
        unsafe { BorrowedTensor::from_raw(tensor, false) }
    }

    #[test]
    fn null_strides_are_compact() {
        let (mut data, mut shape) = ([0.0; 24], [2, 3, 4]);
        let raw = tensor(&mut data, &mut shape, None);
        let view = view(&raw).unwrap();
        assert_eq!((view.shape(), view.strides()), ([2, 3, 4].as_slice(), [12, 4, 1].as_slice()));
        assert!(view.is_contiguous());
        assert_eq!((view.len(), view.element()), (24, ElementType::Float32));
    }

    #[test]
    fn strides_and_offset_are_kept() {
        let (mut data, mut shape, mut strides) = ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [2, 2], [3, 1]);
        let mut raw = tensor(&mut data, &mut shape, Some(&mut strides));
        raw.byte_offset = 4;
        let view = view(&raw).unwrap();
        assert_eq!(view.strides(), [3, 1]);
        assert!(!view.is_contiguous());
        // SAFETY: the second element of `data`.
        assert_eq!(unsafe { view.data().cast::<f32>().read_unaligned() }, 1.0);
    }

    #[test]
    fn strides_of_single_elements_do_not_matter() {
        let (mut data, mut shape, mut strides) = ([0.0; 4], [1, 4, 1], [77, 1, -5]);
        assert!(view(&tensor(&mut data, &mut shape, Some(&mut strides))).unwrap().is_contiguous());
    }

    #[test]
    fn a_scalar_and_an_empty_tensor_are_views() {
        let mut data = [7.0];
        let scalar = tensor(&mut data, &mut [], None);
        assert_eq!(view(&scalar).unwrap().len(), 1);
        let mut shape = [0, 3];
        let mut empty = tensor(&mut data, &mut shape, None);
        empty.data = std::ptr::null_mut();
        assert!(view(&empty).unwrap().is_empty());
    }

    #[test]
    fn every_inconsistency_is_named() {
        let (mut data, mut shape) = ([0.0; 6], [2, 3]);
        let good = tensor(&mut data, &mut shape, None);
        let changed = |change: fn(&mut Tensor)| {
            let mut bad = good;
            change(&mut bad);
            view(&bad).map(|_| ()).unwrap_err()
        };
        let cuda = Device { device_type: 2, device_id: 1 };
        assert_eq!(changed(|t| t.device = Device { device_type: 2, device_id: 1 }), Error::Device(cuda));
        assert_eq!(changed(|t| t.ndim = -1), Error::Dimensions(-1));
        assert_eq!(changed(|t| t.ndim = 9), Error::Dimensions(9));
        assert_eq!(changed(|t| t.shape = std::ptr::null_mut()), Error::Dimensions(2));
        assert!(matches!(changed(|t| t.dtype.bits = 64), Error::ElementType(_)));
        assert!(matches!(changed(|t| t.dtype.lanes = 2), Error::ElementType(_)));
        assert_eq!(changed(|t| t.data = std::ptr::null_mut()), Error::NullData(6));
        assert!(matches!(changed(|t| t.byte_offset = 2), Error::Alignment { bytes: 4, .. }));
        for sizes in [[-1, 3], [1 << 62, 1 << 62], [1 << 61, 4], [0, i64::MAX]] {
            let mut shape = sizes;
            let bad = tensor(&mut data, &mut shape, None);
            assert_eq!(view(&bad).map(|_| ()).unwrap_err(), Error::Shape(sizes.to_vec()));
        }
    }
}
