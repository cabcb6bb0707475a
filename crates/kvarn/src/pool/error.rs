//! The one error of pools.

use crate::DType;
use crate::tables::TableError;

/// What went wrong. Texts name the offending value, what was expected, and the fix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Configuration, layout or format.
    #[error(transparent)]
    Codec(#[from] crate::Error),
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
    /// A pool beyond the address space.
    #[error("{what} of {count} times {each} bytes: expected less than the address space; use fewer")]
    TooLarge {
        /// Pages or slots.
        what: &'static str,
        /// How many.
        count: usize,
        /// Bytes of each, in the layer at which the sum overflowed.
        each: usize,
    },
}

impl PoolError {
    /// A [`PoolError::Shape`].
    pub fn shape(what: &'static str, got: &[usize], expected: String, fix: &'static str) -> Self {
        Self::Shape { what, got: got.to_vec(), expected, fix }
    }
}
