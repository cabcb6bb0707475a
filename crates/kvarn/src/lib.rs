//! The core of kvarn: what a KV cache tile is, how it is encoded, where its bytes lie.
//!
//! Plain Rust over slices: no CUDA, no Python, no unsafe code. Backends (`kvarn-cpu`, `kvarn-cuda`) own the memory of a
//! pool and use this crate for configuration, record layout, the codec and the tables.
//!
//! Source of the method: KVarN, arXiv 2606.03458.
#![forbid(unsafe_code)]

mod aligned;
mod bits;
mod config;
mod dtype;
mod error;
mod half_round;
mod name;
mod side;

pub mod codec;
pub mod pool;
pub mod record;
pub mod tables;

pub use aligned::Aligned;
pub use bits::Bits;
pub use config::{Config, ConfigOptions, GROUPS, HEAD_DIMS};
pub use dtype::DType;
pub use error::Error;
pub use half_round::{Saturation, round_to_half};
pub(crate) use half_round::{saturates, through_half};
pub use name::{PRESETS, parse_name};
pub use side::Side;
