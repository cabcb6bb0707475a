//! Launches: the only place where a kernel is started.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUdevice, CUfunction, CUfunction_attribute, CUkernel, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchAttributeValue, CUlaunchConfig,
};

use crate::context::Current;
use crate::driver::{Answer, check};
use crate::{Device, Error, Limits, Stream};

/// A kernel on a device, ready to be launched.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub(crate) device: &'static Device,
    pub(crate) entry: &'static Entry,
}

/// What is known of a kernel on one device.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: &'static str,
    raw: CUkernel,
    parameters: Vec<usize>,
    threads: u32,
    registers: u32,
    local_bytes: u32,
    shared: u32,
    /// Whether the code is for a device that knows launches which begin early.
    begins_early: bool,
}

// SAFETY: a handle of the driver, which may be used from every thread, and numbers.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

impl Entry {
    /// Loads a kernel into the current context and lets it use all the shared memory that a block can have.
    pub(crate) fn prepare(
        name: &'static str,
        raw: CUkernel,
        device: CUdevice,
        limits: Limits,
    ) -> Answer<Self> {
        use CUfunction_attribute as A;
        let ask = |attribute| -> Answer<u32> {
            let mut value = 0;
            // SAFETY: a loaded kernel, an existing device; `value` is writable.
            let result = unsafe { sys::cuKernelGetAttribute(&raw mut value, attribute, raw, device) };
            check("cuKernelGetAttribute", result).map(|()| value as u32)
        };
        let fixed = ask(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let shared = limits.shared_per_block.saturating_sub(fixed);
        let most = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as above.
        check("cuKernelSetAttribute", unsafe {
            sys::cuKernelSetAttribute(most, shared as i32, raw, device)
        })?;
        let mut function = std::ptr::null_mut();
        // SAFETY: as above; the context is current.
        check("cuKernelGetFunction", unsafe { sys::cuKernelGetFunction(&raw mut function, raw) })?;
        // The driver loads code when it is first used, unless told to.
        // SAFETY: a function of the current context.
        check("cuFuncLoad", unsafe { sys::cuFuncLoad(function) })?;
        Ok(Self {
            name,
            raw,
            parameters: parameters(raw),
            threads: ask(A::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            registers: ask(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: ask(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            shared,
            begins_early: ask(A::CU_FUNC_ATTRIBUTE_PTX_VERSION)? >= 90,
        })
    }
}

/// Bytes of each parameter of a kernel: the driver refuses the index after the last.
fn parameters(kernel: CUkernel) -> Vec<usize> {
    let (mut offset, mut size) = (0, 0);
    let mut sizes = Vec::new();
    // SAFETY: a loaded kernel; both are writable.
    while unsafe { sys::cuKernelGetParamInfo(kernel, sizes.len(), &raw mut offset, &raw mut size) }
        == sys::CUresult::CUDA_SUCCESS
    {
        sizes.push(size);
    }
    sizes
}

impl Kernel {
    /// Name in the image.
    pub const fn name(&self) -> &'static str {
        self.entry.name
    }

    /// Device it is launched on.
    pub const fn device(&self) -> &'static Device {
        self.device
    }

    /// Bytes of each parameter.
    pub fn parameter_bytes(&self) -> &'static [usize] {
        &self.entry.parameters
    }

    /// Most threads of a block, as the kernel's launch bounds say.
    pub const fn threads(&self) -> u32 {
        self.entry.threads
    }

    /// Registers of a thread.
    pub const fn registers(&self) -> u32 {
        self.entry.registers
    }

    /// Bytes of local memory of a thread: 0 unless registers are spilled or arrays indexed at run time.
    pub const fn local_bytes(&self) -> u32 {
        self.entry.local_bytes
    }

    /// Most bytes of dynamic shared memory of a launch.
    pub const fn dynamic_shared(&self) -> u32 {
        self.entry.shared
    }

    /// Blocks of `threads` threads and `shared` bytes of dynamic shared memory that a multiprocessor holds at a time.
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Result<u32, Error> {
        let _current = self.device.enter()?;
        let mut blocks = 0;
        // SAFETY: a kernel stands for its function in the current context; `blocks` is writable.
        let result = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &raw mut blocks,
                self.function(),
                threads as i32,
                shared as usize,
            )
        };
        self.device.told(check("cuOccupancyMaxActiveBlocksPerMultiprocessor", result))?;
        Ok(blocks as u32)
    }

    /// The driver takes a kernel for a function and finds the one of the current context.
    const fn function(&self) -> CUfunction {
        self.entry.raw.cast()
    }

    fn fits(&self, block: [u32; 3], shared: u32, parameters: usize) -> Result<(), Error> {
        let Entry { name: kernel, threads, shared: most, parameters: ref takes, .. } = *self.entry;
        let refuse = |what, got: String, expected: String| Err(Error::Launch { what, got, kernel, expected });
        if block.iter().product::<u32>() > threads {
            return refuse("block", format!("{block:?}"), format!("at most {threads} threads"));
        }
        if shared > most {
            return refuse("shared memory", format!("{shared} bytes"), format!("at most {most} bytes"));
        }
        if parameters != takes.len() {
            return refuse("parameters", parameters.to_string(), takes.len().to_string());
        }
        Ok(())
    }
}

/// Starts `kernel` on `stream`: `grid` blocks of `block` threads with `shared` bytes of dynamic shared memory.
///
/// Returns before the kernel runs; what goes wrong in it is reported by a later call. Neither allocates nor
/// synchronises, so it can be captured into a graph.
///
/// # Safety
/// - Each of `parameters` points to a value of the type that the kernel takes in that place, readable during the call.
/// - Addresses among them stay valid, and nobody else writes there, until the kernel has run.
/// - `stream` is a live stream of the kernel's device, of its primary context.
pub unsafe fn launch(
    kernel: &Kernel,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Stream,
    parameters: &mut [*mut c_void],
) -> Result<(), Error> {
    let current = kernel.device.enter()?;
    // SAFETY: the caller's promise.
    unsafe { start(&current, kernel, grid, block, shared, stream, parameters, &mut []) }
}

/// As [`launch`], in the context of the kernel's device, which the caller made current; the kernel may begin before the one in
/// front of it has ended.
///
/// # Safety
/// As [`launch`]. The kernel waits for the one in front (cuda/predecessor.cuh) before it touches what that one may touch, if
/// it is compiled for `sm_90` or newer.
pub(crate) unsafe fn launch_early(
    current: &Current,
    kernel: &Kernel,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Stream,
    parameters: &mut [*mut c_void],
) -> Result<(), Error> {
    let mut allowed = [CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }];
    let attributes: &mut [_] = if kernel.entry.begins_early { &mut allowed } else { &mut [] };
    // SAFETY: the caller's promise.
    unsafe { start(current, kernel, grid, block, shared, stream, parameters, attributes) }
}

#[allow(clippy::too_many_arguments)] // the driver's
unsafe fn start(
    _current: &Current,
    kernel: &Kernel,
    [x, y, z]: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Stream,
    parameters: &mut [*mut c_void],
    attributes: &mut [CUlaunchAttribute],
) -> Result<(), Error> {
    kernel.fits(block, shared, parameters.len())?;
    let device = kernel.device;
    device.loss.launched(kernel.entry);
    let config = CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: block[0],
        blockDimY: block[1],
        blockDimZ: block[2],
        sharedMemBytes: shared,
        hStream: stream.raw(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    // SAFETY: the kernel's function in the current context; the rest by the caller.
    let result = unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            kernel.function(),
            parameters.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    };
    check("cuLaunchKernelEx", result)
        .map_err(|failure| device.loss.error(device.index(), failure, Some(kernel.name())))
}
