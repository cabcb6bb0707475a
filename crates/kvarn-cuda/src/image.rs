//! The compiled kernels, embedded by the build, loaded once for all devices.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{self, CUkernel, CUlibrary};

use crate::driver::{Answer, check};
use crate::{Capability, Version};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Images need the alignment of their header.
#[repr(align(16))]
#[allow(dead_code)] // in a build without kernels
struct Aligned<const BYTES: usize>([u8; BYTES]);

/// One target of the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Architecture {
    /// Ten times the compute capability: 90 for 9.0.
    pub number: u32,
    /// Whether PTX was added, which newer devices compile when they load it.
    pub ptx: bool,
}

/// One compiled source.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Image {
    /// Name of the source, without folder and suffix.
    pub name: &'static str,
    /// The fat binary.
    pub bytes: &'static [u8],
}

/// All images of a build.
#[derive(Debug)]
pub struct Images {
    pub(crate) toolkit: Version,
    pub(crate) architectures: &'static [Architecture],
    pub(crate) list: &'static [Image],
}

impl Images {
    /// Those of this build.
    pub fn embedded() -> &'static Self {
        &EMBEDDED
    }

    /// Release of the CUDA compiler that made them.
    pub const fn toolkit(&self) -> Version {
        self.toolkit
    }

    /// What they were compiled for.
    pub const fn architectures(&self) -> &'static [Architecture] {
        self.architectures
    }

    /// Names and bytes of the images.
    pub fn sizes(&self) -> impl ExactSizeIterator<Item = (&'static str, usize)> + '_ {
        self.list.iter().map(|image| (image.name, image.bytes.len()))
    }

    /// Whether the build has no kernels.
    pub const fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Machine code runs within a major capability, from its minor one on.
    pub(crate) fn machine_code_for(&self, device: Capability) -> bool {
        self.architectures.iter().any(|architecture| {
            architecture.number / 10 == device.major && architecture.number % 10 <= device.minor
        })
    }

    /// PTX runs on every device as new as it, or newer.
    pub(crate) fn ptx_for(&self, device: Capability) -> bool {
        let number = device.major * 10 + device.minor;
        self.architectures.iter().any(|architecture| architecture.ptx && architecture.number <= number)
    }

    /// As in "8.0, 9.0, newer than 8.0 by PTX".
    pub(crate) fn architecture_list(&self) -> String {
        let dotted = |number: u32| format!("{}.{}", number / 10, number % 10);
        let mut parts: Vec<String> =
            self.architectures.iter().map(|architecture| dotted(architecture.number)).collect();
        let ptx = self.architectures.iter().filter(|architecture| architecture.ptx);
        parts.extend(ptx.map(|architecture| format!("newer than {} by PTX", dotted(architecture.number))));
        parts.join(", ")
    }
}

/// A kernel of a loaded image, the same for all devices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loaded(pub CUkernel);

// SAFETY: a handle of the driver, which may be used from every thread.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// Kernels by name.
pub(crate) type Kernels = BTreeMap<&'static str, Loaded>;

/// Loads `images`, at the first call; later calls, of whatever device, get the same kernels.
///
/// The driver must run.
pub(crate) fn load(images: &Images) -> Answer<&'static Kernels> {
    static LOADED: Mutex<Option<&'static Kernels>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernels) = *loaded {
        return Ok(kernels);
    }
    let mut libraries = Vec::with_capacity(images.list.len());
    let mut kernels = Kernels::new();
    for image in images.list {
        let added = load_one(image).and_then(|library| {
            libraries.push(library);
            names(library, &mut kernels)
        });
        if let Err(failure) = added {
            for library in libraries {
                // SAFETY: loaded above; its kernels were given to nobody.
                let _ = unsafe { sys::cuLibraryUnload(library) };
            }
            return Err(failure);
        }
    }
    // Kernels are used as long as the process lives.
    let kernels: &'static Kernels = Box::leak(Box::new(kernels));
    *loaded = Some(kernels);
    Ok(kernels)
}

fn load_one(image: &Image) -> Answer<CUlibrary> {
    let mut library = ptr::null_mut();
    // SAFETY: a fat binary, aligned; no options.
    let result = unsafe {
        sys::cuLibraryLoadData(
            &raw mut library,
            image.bytes.as_ptr().cast(),
            ptr::null_mut(),
            ptr::null_mut(),
            0,
            ptr::null_mut(),
            ptr::null_mut(),
            0,
        )
    };
    check("cuLibraryLoadData", result).map(|()| library)
}

fn names(library: CUlibrary, kernels: &mut Kernels) -> Answer<()> {
    let mut count = 0;
    // SAFETY: a loaded library; `count` is writable.
    check("cuLibraryGetKernelCount", unsafe { sys::cuLibraryGetKernelCount(&raw mut count, library) })?;
    let mut list = vec![ptr::null_mut(); count as usize];
    // SAFETY: as above; the list holds `count` handles.
    let result = unsafe { sys::cuLibraryEnumerateKernels(list.as_mut_ptr(), count, library) };
    check("cuLibraryEnumerateKernels", result)?;
    for kernel in list {
        let mut name = ptr::null();
        // SAFETY: a kernel of the library; `name` is writable.
        check("cuKernelGetName", unsafe { sys::cuKernelGetName(&raw mut name, kernel) })?;
        // SAFETY: terminated text that lives as long as the library.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        kernels.insert(String::leak(name), Loaded(kernel));
    }
    Ok(())
}
