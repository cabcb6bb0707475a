//! Layers of a pool, and where their pages and slots lie.

use super::PoolError;
use crate::Config;
use crate::codec::{Rotation, SlotType};
use crate::record::RecordLayout;
use crate::tables::SealRule;

/// What one layer caches per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// One layer: its shape, what follows from it, and where its pages and slots begin.
#[derive(Clone, Debug)]
pub struct Layer {
    /// KV heads and head dim.
    pub shape: LayerShape,
    /// The pool's configuration with this layer's head dim.
    pub config: Config,
    /// Layout of its records.
    pub layout: RecordLayout,
    /// Rotation of its heads.
    pub rotation: Rotation,
    /// Byte of the page memory at which its pages begin: `[pages, kv_heads, record_bytes]`.
    pub pages_at: usize,
    /// Byte of the slot memory at which its slots begin: `[slots, kv_heads, 2, group, head_dim]`, K before V.
    pub slots_at: usize,
    /// Bytes of a page in this layer.
    pub page_bytes: usize,
    /// Bytes of a slot in this layer.
    pub slot_bytes: usize,
}

/// Layers of a pool and the extent of its memory.
#[derive(Clone, Debug)]
pub struct PoolLayout {
    /// Configuration; its head dim is the caller's, each layer has its own.
    pub config: Config,
    /// When tiles are sealed.
    pub rule: SealRule,
    /// Element type of the slots.
    pub slot_type: SlotType,
    /// The layers.
    pub layers: Vec<Layer>,
    /// Pages.
    pub pages: usize,
    /// Slots.
    pub slots: usize,
    /// Bytes of all pages, all layers.
    pub page_memory: usize,
    /// Bytes of all slots, all layers.
    pub slot_memory: usize,
}

impl PoolLayout {
    /// The layout of a pool of `pages` pages and `slots` slots for `layers`.
    pub fn new(
        config: Config,
        layers: &[LayerShape],
        pages: usize,
        slots: usize,
        slot_type: SlotType,
    ) -> Result<Self, PoolError> {
        if layers.is_empty() {
            return Err(PoolError::Value {
                what: "layers",
                got: "0".into(),
                expected: "1 or more".into(),
                fix: "a pool serves at least one layer",
            });
        }
        let rule = SealRule::new(config.group(), config.sink_tokens(), config.recent_tokens())?;
        let (mut page_memory, mut slot_memory) = (0usize, 0usize);
        let mut made = Vec::with_capacity(layers.len());
        for (index, &shape) in layers.iter().enumerate() {
            if !(1..=4096).contains(&shape.kv_heads) {
                return Err(PoolError::Value {
                    what: "kv_heads",
                    got: format!("{} of layer {index}", shape.kv_heads),
                    expected: "1 to 4096".into(),
                    fix: "pass the KV heads of the layer",
                });
            }
            let config = config.with_head_dim(shape.head_dim)?;
            let layout = config.layout();
            let page_bytes = shape.kv_heads * layout.record_bytes;
            let slot_bytes = shape.kv_heads * 2 * config.group() * shape.head_dim * slot_type.bytes();
            let (pages_at, slots_at) = (page_memory, slot_memory);
            page_memory = grow(page_memory, "pages", pages, page_bytes)?;
            slot_memory = grow(slot_memory, "slots", slots, slot_bytes)?;
            let rotation = Rotation::new(shape.head_dim);
            made.push(Layer { shape, config, layout, rotation, pages_at, slots_at, page_bytes, slot_bytes });
        }
        Ok(Self { config, rule, slot_type, layers: made, pages, slots, page_memory, slot_memory })
    }

    /// A layer by its index.
    pub fn layer(&self, layer: usize) -> Result<&Layer, PoolError> {
        self.layers.get(layer).ok_or_else(|| PoolError::Value {
            what: "layer",
            got: layer.to_string(),
            expected: format!("0 to {}", self.layers.len() - 1),
            fix: "the pool was made for that many layers",
        })
    }

    /// Shape of one layer's pages, uint8 `[pages, kv_heads, record_bytes]`.
    pub fn pages_shape(&self, layer: &Layer) -> Vec<usize> {
        vec![self.pages, layer.shape.kv_heads, layer.layout.record_bytes]
    }

    /// Shape of one layer's slots, `[slots, kv_heads, 2, group, head_dim]` of the slot type.
    pub fn slots_shape(&self, layer: &Layer) -> Vec<usize> {
        vec![self.slots, layer.shape.kv_heads, 2, self.config.group(), layer.shape.head_dim]
    }

    /// Byte offset, in the page memory, of the record of one KV head.
    ///
    /// # Panics
    /// If there is no such page or head.
    pub fn record_at(&self, layer: &Layer, page: usize, head: usize) -> usize {
        assert!(page < self.pages && head < layer.shape.kv_heads);
        layer.pages_at + (page * layer.shape.kv_heads + head) * layer.layout.record_bytes
    }

    /// Byte offset, in the slot memory, of K (`side` 0) or V (1) of one KV head, `[group, head_dim]`, and its length.
    ///
    /// # Panics
    /// If there is no such slot, head or side.
    pub fn slot_at(&self, layer: &Layer, slot: usize, head: usize, side: usize) -> (usize, usize) {
        assert!(slot < self.slots && head < layer.shape.kv_heads && side < 2);
        let bytes = self.config.group() * layer.shape.head_dim * self.slot_type.bytes();
        (layer.slots_at + ((slot * layer.shape.kv_heads + head) * 2 + side) * bytes, bytes)
    }
}

fn grow(total: usize, what: &'static str, count: usize, each: usize) -> Result<usize, PoolError> {
    let sum = count.checked_mul(each).and_then(|bytes| bytes.checked_add(total));
    // Pointers and offsets are signed in places: half the address space is the limit.
    sum.filter(|&sum| isize::try_from(sum).is_ok()).ok_or(PoolError::TooLarge { what, count, each })
}
