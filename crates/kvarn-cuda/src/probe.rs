//! Whether CUDA can be used here, and if not, why.

use std::ffi::{c_int, c_uint};
use std::fmt;
use std::sync::Mutex;

use cudarc::driver::sys;
use libloading::Library;

use crate::image::Images;
use crate::{Error, Version, fork};

/// Why CUDA cannot be used here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// No driver library.
    #[error(
        "no NVIDIA driver ({reason}): expected libcuda.so.1 on a machine with a GPU; install the driver, or use \
         device=\"cpu\""
    )]
    NoDriver {
        /// What the dynamic loader said.
        reason: String,
    },
    /// A driver library that is none, or not the one that runs.
    #[error("libcuda.so.1: {reason}: expected the library of the running driver; {fix}")]
    BrokenDriver {
        /// What is wrong.
        reason: String,
        /// What to do.
        fix: &'static str,
    },
    /// A driver that cannot run the images.
    #[error(
        "an NVIDIA driver for CUDA {driver}: expected one for CUDA {needed} or newer, which the kernels were built \
         for; update the driver, or use device=\"cpu\""
    )]
    OldDriver {
        /// Newest release that the driver supports.
        driver: Version,
        /// Release that the images need.
        needed: Version,
    },
    /// The driver did not start.
    #[error("cuInit gave CUDA error {code}: expected success; {fix}")]
    NotStarted {
        /// Its answer.
        code: u32,
        /// What to do.
        fix: &'static str,
    },
    /// No device.
    #[error(
        "no CUDA device: expected one or more; make them visible to the process (CUDA_VISIBLE_DEVICES), or use \
         device=\"cpu\""
    )]
    NoDevice,
    /// An index beyond the devices.
    #[error("cuda:{device} of {count} CUDA devices: expected cuda:0 to cuda:{}; choose one of them", count - 1)]
    DeviceIndex {
        /// The index.
        device: usize,
        /// Devices there are.
        count: usize,
    },
    /// No image for the device.
    #[error(
        "cuda:{device} of compute capability {capability}: expected one that the kernels were built for ({built}); \
         build them for it with KVARN_CUDA_ARCHS, or use device=\"cpu\""
    )]
    NoImage {
        /// Index of the device.
        device: usize,
        /// Its compute capability.
        capability: Capability,
        /// What the images are for.
        built: String,
    },
    /// A build without kernels.
    #[error(
        "no CUDA kernels: expected them in this build; build it with the folder cuda, or use device=\"cpu\""
    )]
    NoKernels,
}

/// Compute capability of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capability {
    /// As 9 in 9.0.
    pub major: u32,
    /// As 0 in 9.0.
    pub minor: u32,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A driver that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// Newest release of CUDA that it supports.
    pub version: Version,
    /// Compute capability of every visible device.
    pub devices: Vec<Capability>,
}

/// Looks for a driver and its devices, once; a failed look is repeated at the next call.
///
/// Says nothing about images: [`Device::open`](crate::Device::open) does.
pub fn probe() -> Result<&'static Driver, Error> {
    static FOUND: Mutex<Option<&'static Driver>> = Mutex::new(None);
    fork::check()?;
    let mut found = FOUND.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(driver) = *found {
        return Ok(driver);
    }
    // Devices never come or go while a process runs.
    let driver: &'static Driver = Box::leak(Box::new(look()?));
    fork::watch();
    *found = Some(driver);
    Ok(driver)
}

const SUCCESS: c_uint = 0;
const NO_DEVICE: c_uint = 100;
const MAJOR: c_int = 75;
const MINOR: c_int = 76;

/// The driver's own library, asked without cudarc, which panics where there is none.
fn look() -> Result<Driver, Unavailable> {
    // SAFETY: the initialisers of the driver's library have no requirements.
    let library = unsafe { Library::new("libcuda.so.1") }
        .map_err(|error| Unavailable::NoDriver { reason: reason_of(&error) })?;
    // SAFETY: signatures of the CUDA driver API, unchanged since its release 2.2.
    let (version_of, start, count, attribute) = unsafe {
        (
            symbol::<unsafe extern "C" fn(*mut c_int) -> c_uint>(&library, "cuDriverGetVersion")?,
            symbol::<unsafe extern "C" fn(c_uint) -> c_uint>(&library, "cuInit")?,
            symbol::<unsafe extern "C" fn(*mut c_int) -> c_uint>(&library, "cuDeviceGetCount")?,
            symbol::<unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_uint>(
                &library,
                "cuDeviceGetAttribute",
            )?,
        )
    };
    let mut number = 0;
    // SAFETY: `number` is writable.
    answered("cuDriverGetVersion", unsafe { version_of(&raw mut number) })?;
    // SAFETY: no requirements.
    match unsafe { start(0) } {
        SUCCESS => {}
        NO_DEVICE => return Err(Unavailable::NoDevice),
        code => return Err(Unavailable::NotStarted { code, fix: fix_of(code) }),
    }
    let mut devices = 0;
    // SAFETY: `devices` is writable.
    answered("cuDeviceGetCount", unsafe { count(&raw mut devices) })?;
    if devices < 1 {
        return Err(Unavailable::NoDevice);
    }
    let ask = |device, which| {
        let mut value = 0;
        // SAFETY: `value` is writable; a wrong device is refused.
        answered("cuDeviceGetAttribute", unsafe { attribute(&raw mut value, which, device) })?;
        Ok(value as u32)
    };
    let devices: Result<Vec<Capability>, Unavailable> = (0..devices)
        .map(|device| Ok(Capability { major: ask(device, MAJOR)?, minor: ask(device, MINOR)? }))
        .collect();
    let driver = Driver { version: Version::of_driver(number as u32), devices: devices? };
    same_library(number)?;
    Ok(driver)
}

/// cudarc looks for the library under other names too: make sure that it found this one, not a stub for linking.
fn same_library(number: c_int) -> Result<(), Unavailable> {
    let mut other = 0;
    // SAFETY: the library was loaded above, so cudarc finds it under its last name at the latest; `other` is writable.
    let result = unsafe { sys::cuDriverGetVersion(&raw mut other) };
    if result as u32 == SUCCESS && other == number {
        return Ok(());
    }
    Err(Unavailable::BrokenDriver {
        reason: "another libcuda.so is found first".into(),
        fix: "remove the folder of stubs from LD_LIBRARY_PATH",
    })
}

/// # Safety
/// `F` is the type of the function.
unsafe fn symbol<F: Copy>(library: &Library, name: &'static str) -> Result<F, Unavailable> {
    // SAFETY: by the caller.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|error| Unavailable::BrokenDriver {
        reason: reason_of(&error),
        fix: "install the driver again",
    })
}

fn answered(call: &'static str, code: c_uint) -> Result<(), Unavailable> {
    if code == SUCCESS {
        return Ok(());
    }
    Err(Unavailable::BrokenDriver {
        reason: format!("{call} gave CUDA error {code}"),
        fix: "install the driver again, and restart the machine",
    })
}

/// The loader's text is in the source of the error.
fn reason_of(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn fix_of(code: c_uint) -> &'static str {
    match code {
        3 => "in a forked process, start it with the method \"spawn\" instead",
        34 => "remove the folder of stubs from LD_LIBRARY_PATH",
        802 => "start the fabric manager of the machine",
        803 => "restart the machine, so that library and kernel module of the driver are of one version",
        804 => "use a driver that this device supports, without a compatibility package",
        _ => "see whether nvidia-smi works, and restart the machine",
    }
}

/// Whether `images` run on `device`: the reason if not.
pub(crate) fn suits(driver: &Driver, images: &Images, device: usize) -> Result<(), Unavailable> {
    if images.is_empty() {
        return Err(Unavailable::NoKernels);
    }
    // Machine code runs on every driver of its major release; compiling PTX needs one as new as the compiler.
    let oldest = Version::new(images.toolkit().major, 0);
    if driver.version < oldest {
        return Err(Unavailable::OldDriver { driver: driver.version, needed: oldest });
    }
    let count = driver.devices.len();
    let capability = *driver.devices.get(device).ok_or(Unavailable::DeviceIndex { device, count })?;
    if images.machine_code_for(capability) {
        return Ok(());
    }
    if !images.ptx_for(capability) {
        return Err(Unavailable::NoImage { device, capability, built: images.architecture_list() });
    }
    if driver.version < images.toolkit() {
        return Err(Unavailable::OldDriver { driver: driver.version, needed: images.toolkit() });
    }
    Ok(())
}
