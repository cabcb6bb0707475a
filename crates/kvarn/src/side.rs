//! Keys or values.

/// The two matrices of a tile: they differ in what a quantised row is and in the order of their codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys: a row is a channel over the tile's tokens.
    Key,
    /// Values: a row is a token over the head's channels.
    Value,
}
