//! The C function table by which a consumer borrows a tensor without allocating: `DLPackExchangeAPI`, version 1.3.
//!
//! Array types carry it as the capsule `__dlpack_c_exchange_api__`, named [`CAPSULE_NAME`].

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use crate::abi::{DataType, Device, ManagedTensorVersioned, PackVersion, Tensor, VERSION};

/// Name of the capsule.
pub const CAPSULE_NAME: &CStr = c"dlpack_exchange_api";

/// `DLPackExchangeAPIHeader`.
#[repr(C)]
#[derive(Debug)]
pub struct Header {
    /// Version of the table. With another major number only `previous` may be used.
    pub version: PackVersion,
    /// An older table, or null.
    pub previous: *const Header,
}

type SetError = unsafe extern "C" fn(*mut c_void, *const std::ffi::c_char, *const std::ffi::c_char);
type Allocate =
    unsafe extern "C" fn(*mut Tensor, *mut *mut ManagedTensorVersioned, *mut c_void, Option<SetError>) -> i32;

/// `DLPackExchangeAPI`. `PyObject` pointers are `void` pointers here, as in the header.
#[repr(C)]
#[derive(Debug)]
pub struct ExchangeApi {
    /// Version and older tables.
    pub header: Header,
    /// Makes a tensor like a prototype.
    pub allocate: Option<Allocate>,
    /// Exports an object, owning.
    pub export: Option<unsafe extern "C" fn(*mut c_void, *mut *mut ManagedTensorVersioned) -> i32>,
    /// Makes an object from a managed tensor.
    pub import: Option<unsafe extern "C" fn(*mut ManagedTensorVersioned, *mut *mut c_void) -> i32>,
    /// Fills in a tensor that borrows from an object; may be null.
    pub borrow: Option<unsafe extern "C" fn(*mut c_void, *mut Tensor) -> i32>,
    /// The stream in use on a device.
    pub current_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> i32>,
}

/// The functions of a table that borrow a tensor and name a stream.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    borrow: unsafe extern "C" fn(*mut c_void, *mut Tensor) -> i32,
    current_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> i32>,
}

impl Exchange {
    /// Finds the functions in `table` or the older tables behind it; `None` if none of our major version borrows.
    ///
    /// # Safety
    /// `table` is what a capsule named [`CAPSULE_NAME`] holds.
    pub unsafe fn find(table: NonNull<c_void>) -> Option<Self> {
        let mut header: *const Header = table.as_ptr().cast();
        while !header.is_null() {
            // SAFETY: every table begins with a header, and the chain ends with null.
            let Header { version, previous } = unsafe { &*header };
            if version.major == VERSION.major {
                // SAFETY: a table of our major version has our layout up to `current_stream`.
                let table = unsafe { &*header.cast::<ExchangeApi>() };
                return table.borrow.map(|borrow| Self { borrow, current_stream: table.current_stream });
            }
            header = *previous;
        }
        None
    }

    /// Borrows from `object`. `None`: the producer failed and has set a Python exception.
    ///
    /// # Safety
    /// The caller holds the Python interpreter; `object` is a `PyObject *` of the type that the table was found on. What
    /// comes back lives as long as `object` is alive and not resized.
    pub unsafe fn borrow(self, object: NonNull<c_void>) -> Option<Tensor> {
        let mut tensor = Tensor {
            data: std::ptr::null_mut(),
            device: Device::CPU,
            ndim: 0,
            dtype: DataType { code: 0, bits: 0, lanes: 0 },
            shape: std::ptr::null_mut(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        };
        // SAFETY: the caller's promise; `tensor` is ours.
        (unsafe { (self.borrow)(object.as_ptr(), &raw mut tensor) } == 0).then_some(tensor)
    }

    /// The stream that the array library gives its work of `device` to, on this thread. `None`: the library names none, or has
    /// set a Python exception.
    ///
    /// # Safety
    /// The caller holds the Python interpreter.
    pub unsafe fn current_stream(self, device: Device) -> Option<*mut c_void> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: the caller's promise; `stream` is writable.
        let answer = unsafe { (self.current_stream?)(device.device_type, device.device_id, &raw mut stream) };
        (answer == 0).then_some(stream)
    }
}

#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_header() {
        assert_eq!(size_of::<Header>(), 16);
        assert_eq!(size_of::<ExchangeApi>(), 56);
        assert_eq!(offset_of!(ExchangeApi, allocate), 16);
        assert_eq!(offset_of!(ExchangeApi, export), 24);
        assert_eq!(offset_of!(ExchangeApi, import), 32);
        assert_eq!(offset_of!(ExchangeApi, borrow), 40);
        assert_eq!(offset_of!(ExchangeApi, current_stream), 48);
    }

    unsafe extern "C" fn borrow(object: *mut c_void, tensor: *mut Tensor) -> i32 {
        if object == NonNull::dangling().as_ptr() {
            return -1;
        }
        // SAFETY: `Exchange::borrow` passes a valid tensor.
        unsafe { (*tensor).data = object };
        0
    }

    fn table(major: u32, previous: *const Header) -> ExchangeApi {
        ExchangeApi {
            header: Header { version: PackVersion { major, minor: 0 }, previous },
            allocate: None,
            export: None,
            import: None,
            borrow: Some(borrow),
            current_stream: None,
        }
    }

    #[test]
    fn an_older_table_behind_a_newer_one_is_found() {
        let old = table(1, std::ptr::null());
        let new = table(2, &raw const old.header);
        let lone = table(2, std::ptr::null());
        // SAFETY: tables as a capsule would hold them.
        let (found, none) = unsafe {
            (Exchange::find(NonNull::from(&new).cast()), Exchange::find(NonNull::from(&lone).cast()))
        };
        assert!(none.is_none());
        let mut memory = 0u8;
        let object = NonNull::from(&mut memory).cast();
        // SAFETY: the function above only stores the pointer.
        let tensor = unsafe { found.unwrap().borrow(object) }.unwrap();
        assert_eq!(tensor.data, object.as_ptr());
        // SAFETY: as above; the dangling pointer is not read.
        assert!(unsafe { found.unwrap().borrow(NonNull::dangling()) }.is_none());
    }
    unsafe extern "C" fn stream(kind: i32, index: i32, stream: *mut *mut c_void) -> i32 {
        // SAFETY: `Exchange::current_stream` passes a valid place.
        unsafe { *stream = std::ptr::without_provenance_mut((100 * kind + index) as usize) };
        if index == 9 { -1 } else { 0 }
    }

    #[test]
    fn the_stream_of_a_device_is_asked_for() {
        let with = ExchangeApi { current_stream: Some(stream), ..table(1, std::ptr::null()) };
        let without = table(1, std::ptr::null());
        let asked = |table: &ExchangeApi, index| {
            // SAFETY: a table as a capsule would hold it, whose functions need no interpreter.
            let stream = unsafe {
                Exchange::find(NonNull::from(table).cast()).unwrap().current_stream(Device::cuda(index))
            };
            stream.map(<*mut c_void>::addr)
        };
        assert_eq!(asked(&with, 3), Some(203));
        assert_eq!((asked(&with, 9), asked(&without, 3)), (None, None));
    }
}
