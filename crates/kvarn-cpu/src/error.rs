//! The one error of this crate.

use kvarn::tables::TableError;

use crate::DType;

/// What went wrong. Texts name the offending value, what was expected, and the fix.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Configuration, layout or format.
    #[error(transparent)]
    Codec(#[from] kvarn::Error),
    /// Pages, slots, sequences, steps.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A tensor of another shape.
    #[error("{what} of shape {got:?}: expected {expected}; {fix}")]
    Shape {
        /// The tensor.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What was expected.
        expected: String,
        /// What to do.
        fix: &'static str,
    },
    /// A tensor of an element type that does not fit.
    #[error("{what} of dtype {}: expected {expected}; {fix}", got.name())]
    DType {
        /// The tensor.
        what: &'static str,
        /// Its type.
        got: DType,
        /// What was expected.
        expected: &'static str,
        /// What to do.
        fix: &'static str,
    },
    /// A number outside its range.
    #[error("{what} {got}: expected {expected}; {fix}")]
    Value {
        /// The argument.
        what: &'static str,
        /// Its value.
        got: String,
        /// What was expected.
        expected: String,
        /// What to do.
        fix: &'static str,
    },
    /// A call in an order that has no meaning.
    #[error("{0}")]
    Order(String),
    /// Address space for a pool could not be reserved.
    #[error("{bytes} bytes of {what}: the system refused to map them ({reason}); use fewer pages or slots")]
    Memory {
        /// Pages or slots.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
        /// The system's answer.
        reason: String,
    },
}

/// A shape error.
pub(crate) fn shape(what: &'static str, got: &[usize], expected: String, fix: &'static str) -> Error {
    Error::Shape { what, got: got.to_vec(), expected, fix }
}
