//! DLPack 1.x: the C structures by which array libraries lend each other memory, and checked views of them.
//!
//! [`abi`] mirrors the published header; [`BorrowedTensor`] is what the rest of the project reads; [`OwnedTensor`] keeps
//! a lent tensor alive and gives it back; [`Export`] lends memory of ours; [`exchange`] is the C function table by which
//! a consumer borrows without allocating.
//!
//! Specification: <https://dmlc.github.io/dlpack/latest/c_api.html>.
#![deny(unsafe_op_in_unsafe_fn)]

mod dtype;
mod error;
mod export;
mod owned;
mod view;

pub mod abi;
pub mod exchange;

pub use dtype::ElementType;
pub use error::Error;
pub use export::Export;
pub use owned::OwnedTensor;
pub use view::{BorrowedTensor, MAX_DIMENSIONS};
