//! The configurations under test: codec, shapes, and pools small enough to run out.

use std::ops::RangeInclusive;
use std::sync::Arc;

use fastrand::Rng;
use kvarn::pool::LayerShape;
use kvarn::{Config, ConfigOptions, DType};
use kvarn_cpu::Pool;

/// One configuration.
#[derive(Debug)]
pub(crate) struct Setup {
    /// Name of the codec, as [`kvarn::parse_name`] reads it.
    pub(crate) codec: &'static str,
    pub(crate) refit: bool,
    pub(crate) iterations: usize,
    pub(crate) sink_tokens: usize,
    pub(crate) recent_tokens: usize,
    /// KV heads and head dim of each layer.
    pub(crate) layers: &'static [(usize, usize)],
    /// How many pages and slots a pool may have; each pool of a run draws its own numbers.
    pub(crate) pages: RangeInclusive<usize>,
    pub(crate) slots: RangeInclusive<usize>,
    /// Element type of what is appended.
    pub(crate) input: DType,
}

impl Setup {
    pub(crate) fn config(&self) -> Config {
        let options = ConfigOptions::from_name(self.codec, self.layers[0].1).unwrap();
        Config::new(&ConfigOptions {
            refit: self.refit,
            iterations: self.iterations,
            sink_tokens: Some(self.sink_tokens),
            recent_tokens: self.recent_tokens,
            ..options
        })
        .unwrap()
    }

    pub(crate) fn pool(&self, random: &mut Rng) -> Arc<Pool> {
        let shapes: Vec<LayerShape> =
            self.layers.iter().map(|&(kv_heads, head_dim)| LayerShape { kv_heads, head_dim }).collect();
        let (pages, slots) = (random.usize(self.pages.clone()), random.usize(self.slots.clone()));
        Pool::new(self.config(), &shapes, pages, slots, self.input.slot_type()).unwrap()
    }
}
