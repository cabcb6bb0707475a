//! The CUDA side of kvarn: the driver, the images of the kernels, launches, and device memory of a pool.
//!
//! Nothing here links a CUDA library: the driver is looked for when a device is first asked for, and a machine without
//! one gets an [`Error::Unavailable`] that says what is missing. Launches go to the caller's stream and neither
//! allocate, nor synchronise, nor load.

mod arrays;
mod capture;
mod check;
mod context;
mod departures;
mod device;
mod driver;
mod error;
mod fork;
mod geometry;
mod image;
mod images;
mod launch;
mod loss;
mod memory;
mod params;
mod pinned;
mod plan;
mod pool;
mod probe;
mod share;
mod staging;
mod step;
mod stream;
mod tensor;
mod truncate;
mod upload;
mod version;
mod workspace;

#[cfg(test)]
mod tests;

pub use arrays::StaticArrays;
pub use device::{Device, Limits, warmup};
pub use error::{Error, ErrorKind};
pub use image::{Architecture, Images};
pub use images::SavedSequence;
pub use launch::{Kernel, launch};
pub use memory::{DeviceMemory, MemoryView};
pub use pinned::PinnedImage;
pub use pool::{Borrowed, Pool, PoolOptions};
pub use probe::{Capability, Driver, Unavailable, probe};
pub use step::Step;
pub use stream::Stream;
pub use tensor::DeviceTensor;
pub use upload::{Array, StepBuffer, StepBuffers, Words};
pub use version::Version;
pub use workspace::most_workspace_bytes;
