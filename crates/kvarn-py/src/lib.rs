//! The Python module `kvarn._kvarn`: a shell over the Rust crates that converts arguments, results and errors.
//!
//! Its Python face, documented for users, is the package `kvarn`; types are in `_kvarn.pyi`.
#![deny(unsafe_op_in_unsafe_fn)]
// Arguments are extracted by value, and doc comments are Python docstrings.
#![allow(clippy::needless_pass_by_value, clippy::doc_markdown)]

mod arguments;
mod codec;
mod config;
mod cuda;
mod error;
mod lend;
mod memory;
mod open_step;
mod pool;
mod pool_core;
mod prefix;
mod saved;
mod step;
mod tensor;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _kvarn {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::codec::{decode, encode, from_published, load_records, records_header, to_published};
    #[pymodule_export]
    use crate::config::{Config, presets};
    #[pymodule_export]
    use crate::cuda::{CudaPool, CudaStep, StaticArrays, most_workspace_bytes, warmup};
    #[pymodule_export]
    use crate::memory::Memory;
    #[pymodule_export]
    use crate::pool::{Pool, Sequence, Stats};
    #[pymodule_export]
    use crate::step::Step;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }

    /// The instruction set that the CPU backend uses, and all that there are, the smallest first.
    #[pyfunction]
    fn instruction_set() -> (&'static str, [&'static str; 4]) {
        (kvarn_cpu::instruction_set(), kvarn_cpu::instruction_sets())
    }

    /// Threads of the CPU backend.
    #[pyfunction]
    fn threads() -> usize {
        kvarn_cpu::threads()
    }
}
