//! What comes from outside, at random: each target takes any input and panics if kvarn does anything but accept it as valid
//! or refuse it with an error.
//!
//! Targets are ordinary functions over bytes, or over the fields of a structure, so any fuzzer can drive them. The tests of
//! this crate do, with proptest: see CONTRIBUTING.md. They also see that nobody allocates what an input merely claims.
// Panicking is how a target tells, and where valid files cannot be made nothing can be tried.
#![allow(clippy::missing_panics_doc)]

mod allocation;
mod damage;
mod published;
mod saved_records;
mod saved_sequence;
mod tensor;

pub use allocation::most_allocated;
pub use damage::{Edit, damaged};
pub use published::published_record;
pub use saved_records::{forge_records, records_file, saved_records};
pub use saved_sequence::{forge_sequence, saved_sequence, sequence_file};
pub use tensor::{LentTensor, lent_tensor};
