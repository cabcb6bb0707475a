//! The CPU backend of kvarn: host memory of a pool, and append, seal, attend and expand over it.
//!
//! `kvarn` decides what lies where; this crate owns the bytes and does the arithmetic, in parallel over sequences, KV
//! heads and 512-token leaves, with results that do not depend on the number of threads.

mod append;
mod attend;
mod dtype;
mod error;
mod features;
mod images;
mod lanes;
mod memory;
mod pool;
mod prefetch;
mod read;
mod rows;
mod step;
mod tensor;
mod threads;
mod tiles;
mod truncate;

pub use error::Error;
pub use features::{instruction_set, instruction_sets};
pub use images::SavedSequence;
pub use memory::{HostMemory, MemoryView};
pub use pool::Pool;
pub use step::Step;
pub use tensor::{TensorMut, TensorRef};
pub use threads::threads;
pub use tiles::{decode_tiles, encode_tiles, find_non_finite};
