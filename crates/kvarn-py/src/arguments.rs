//! Numbers that must not be negative.

use pyo3::prelude::*;

use crate::error::Class;

/// `value` as a count or index, or an error of `class` that names it.
pub(crate) fn natural(py: Python<'_>, class: Class, what: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value).map_err(|_| {
        class.error(py, format!("{what} {value}: expected 0 or more; pass a number of that range"))
    })
}

/// Every value as a count.
pub(crate) fn naturals(py: Python<'_>, what: &str, values: &[i64]) -> PyResult<Vec<usize>> {
    values.iter().map(|&value| natural(py, Class::Shape, what, value)).collect()
}
