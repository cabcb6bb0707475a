//! The one error of this crate's codec, configuration and formats.

/// What went wrong, one variant per cause. Texts name the offending value, what was expected, and the fix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A bit width that has no format.
    #[error("{what} {value}: expected 2, 3, 4 or 8; choose one of these widths")]
    Bits {
        /// `key_bits` or `value_bits`.
        what: &'static str,
        /// The value given.
        value: usize,
    },
    /// A head dim that cannot be rotated and laid out.
    #[error(
        "head_dim {0}: expected a multiple of 16 from 16 to 256; pad the heads with zeros to the next one"
    )]
    HeadDim(usize),
    /// A tile length other than the two supported.
    #[error("group {0}: expected 64 or 128 tokens; choose one of these tile lengths")]
    Group(usize),
    /// Too many normalisation iterations.
    #[error("iterations {0}: expected 0 to 64; the published value is 8")]
    Iterations(usize),
    /// A sink length that does not fit the tile.
    #[error(
        "sink_tokens {value}: expected 0 or a multiple of 16 up to the group, {group}; the default is the group"
    )]
    SinkTokens {
        /// The value given.
        value: usize,
        /// Tokens of a tile.
        group: usize,
    },
    /// A recent window that is too long.
    #[error("recent_tokens {value}: expected 0 to {max} (four tiles); choose a shorter window")]
    RecentTokens {
        /// The value given.
        value: usize,
        /// The longest window.
        max: usize,
    },
    /// A configuration name that does not follow the grammar.
    #[error(
        "config name {name:?}: expected \"kvarn\" or \"kvarn_k{{2,3,4,8}}v{{2,3,4,8}}_g{{64,128}}\", as in \"kvarn_k4v2_g128\""
    )]
    Name {
        /// The name given.
        name: String,
    },
    /// A slice of the wrong length.
    #[error("{what} holds {got} elements: expected {expected}; pass whole tiles")]
    Length {
        /// What was measured.
        what: &'static str,
        /// Elements given.
        got: usize,
        /// Elements expected.
        expected: usize,
    },
    /// The published order has no 3-bit codes.
    #[error(
        "published order with {key_bits}-bit keys and {value_bits}-bit values: it is defined for 2, 4 and 8 bits only; use native records"
    )]
    PublishedBits {
        /// Bits of a K code.
        key_bits: usize,
        /// Bits of a V code.
        value_bits: usize,
    },
    /// A file or buffer that is not what its header says, or has none.
    #[error("{0}")]
    Format(String),
}
