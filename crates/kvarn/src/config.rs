//! What a cache stores: bit widths, tile length, encoder options, 16-bit tokens.

use crate::record::RecordLayout;
use crate::{Bits, Error, parse_name};

/// Head dims with a rotation and a layout: multiples of 16 up to 256.
pub const HEAD_DIMS: std::ops::RangeInclusive<usize> = 16..=256;
/// Tokens of a tile.
pub const GROUPS: [usize; 2] = [64, 128];

/// Plain values from which a [`Config`] is checked and made.
#[derive(Clone, Debug)]
pub struct ConfigOptions {
    /// Channels of a head, a multiple of 16 from 16 to 256.
    pub head_dim: usize,
    /// Bits of a K code: 2, 3, 4 or 8.
    pub key_bits: usize,
    /// Bits of a V code: 2, 3, 4 or 8.
    pub value_bits: usize,
    /// Tokens of a tile: 64 or 128.
    pub group: usize,
    /// `true`: the refit encoder; `false`: KVarN as published.
    pub refit: bool,
    /// Iterations of the variance normalisation (arXiv 2606.03458, Algorithm 1: 8).
    pub iterations: usize,
    /// Leading positions that stay in 16 bit for good: 0 or a multiple of 16 up to `group`; `None` means `group`.
    pub sink_tokens: Option<usize>,
    /// Newest committed positions that stay in 16 bit, 0 to four tiles.
    pub recent_tokens: usize,
}

impl ConfigOptions {
    /// The defaults with the bit widths and tile length of `name` (see [`parse_name`]).
    pub fn from_name(name: &str, head_dim: usize) -> Result<Self, Error> {
        let (key_bits, value_bits, group) = parse_name(name)?;
        Ok(Self {
            head_dim,
            key_bits: key_bits.get(),
            value_bits: value_bits.get(),
            group,
            refit: true,
            iterations: 8,
            sink_tokens: None,
            recent_tokens: 0,
        })
    }
}

/// A checked configuration. Two caches with equal configurations hold interchangeable records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    head_dim: usize,
    key_bits: Bits,
    value_bits: Bits,
    group: usize,
    refit: bool,
    iterations: usize,
    sink_tokens: usize,
    recent_tokens: usize,
}

impl Config {
    /// Checks `options`.
    pub fn new(options: &ConfigOptions) -> Result<Self, Error> {
        let &ConfigOptions { head_dim, group, refit, iterations, recent_tokens, .. } = options;
        check_head_dim(head_dim)?;
        if !GROUPS.contains(&group) {
            return Err(Error::Group(group));
        }
        if iterations > 64 {
            return Err(Error::Iterations(iterations));
        }
        let sink_tokens = options.sink_tokens.unwrap_or(group);
        if sink_tokens > group || !sink_tokens.is_multiple_of(16) {
            return Err(Error::SinkTokens { value: sink_tokens, group });
        }
        if recent_tokens > 4 * group {
            return Err(Error::RecentTokens { value: recent_tokens, max: 4 * group });
        }
        Ok(Self {
            head_dim,
            key_bits: Bits::new(options.key_bits, "key_bits")?,
            value_bits: Bits::new(options.value_bits, "value_bits")?,
            group,
            refit,
            iterations,
            sink_tokens,
            recent_tokens,
        })
    }

    /// The defaults for `name`, as in [`ConfigOptions::from_name`].
    pub fn from_name(name: &str, head_dim: usize) -> Result<Self, Error> {
        Self::new(&ConfigOptions::from_name(name, head_dim)?)
    }

    /// The same configuration for layers with another head dim.
    pub fn with_head_dim(self, head_dim: usize) -> Result<Self, Error> {
        check_head_dim(head_dim)?;
        Ok(Self { head_dim, ..self })
    }

    /// Channels of a head.
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bits of a K code.
    pub const fn key_bits(&self) -> Bits {
        self.key_bits
    }

    /// Bits of a V code.
    pub const fn value_bits(&self) -> Bits {
        self.value_bits
    }

    /// Tokens of a tile.
    pub const fn group(&self) -> usize {
        self.group
    }

    /// Whether the refit encoder is used.
    pub const fn refit(&self) -> bool {
        self.refit
    }

    /// Iterations of the variance normalisation.
    pub const fn iterations(&self) -> usize {
        self.iterations
    }

    /// Leading positions read from 16 bit.
    pub const fn sink_tokens(&self) -> usize {
        self.sink_tokens
    }

    /// Newest committed positions kept in 16 bit.
    pub const fn recent_tokens(&self) -> usize {
        self.recent_tokens
    }

    /// Where the bytes of a record lie.
    pub fn layout(&self) -> RecordLayout {
        RecordLayout::new(self.head_dim, self.group, self.key_bits, self.value_bits)
    }

    /// The name in the grammar of [`parse_name`], which leaves out the encoder and the 16-bit tokens.
    pub fn name(&self) -> String {
        format!("kvarn_k{}v{}_g{}", self.key_bits.get(), self.value_bits.get(), self.group)
    }
}

fn check_head_dim(head_dim: usize) -> Result<(), Error> {
    if HEAD_DIMS.contains(&head_dim) && head_dim.is_multiple_of(16) {
        Ok(())
    } else {
        Err(Error::HeadDim(head_dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> ConfigOptions {
        ConfigOptions::from_name("kvarn_k4v2_g128", 128).unwrap()
    }

    #[test]
    fn defaults_are_those_of_the_published_sinks_and_our_encoder() {
        let config = Config::new(&options()).unwrap();
        assert_eq!((config.sink_tokens(), config.recent_tokens(), config.iterations()), (128, 0, 8));
        assert!(config.refit());
        assert_eq!(config.name(), "kvarn_k4v2_g128");
    }

    #[test]
    fn every_bad_value_is_named() {
        for (change, expected) in [
            ((|o| o.head_dim = 100) as fn(&mut ConfigOptions), Error::HeadDim(100)),
            (|o| o.head_dim = 0, Error::HeadDim(0)),
            (|o| o.head_dim = 272, Error::HeadDim(272)),
            (|o| o.key_bits = 5, Error::Bits { what: "key_bits", value: 5 }),
            (|o| o.value_bits = 16, Error::Bits { what: "value_bits", value: 16 }),
            (|o| o.group = 32, Error::Group(32)),
            (|o| o.iterations = 65, Error::Iterations(65)),
            (|o| o.sink_tokens = Some(8), Error::SinkTokens { value: 8, group: 128 }),
            (|o| o.sink_tokens = Some(144), Error::SinkTokens { value: 144, group: 128 }),
            (|o| o.recent_tokens = 513, Error::RecentTokens { value: 513, max: 512 }),
        ] {
            let mut options = options();
            change(&mut options);
            assert_eq!(Config::new(&options), Err(expected));
        }
    }
}
