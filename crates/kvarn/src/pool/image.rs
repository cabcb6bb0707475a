//! The image of a sequence: its records, then its slots, one behind the other, wherever they lie in the pool.
//!
//! It is what a saved file holds behind its header, and what the host keeps of an offloaded sequence:
//!
//! 1. for each layer, for each tile that has a page, by position: its records, `[kv_heads, record_bytes]`;
//! 2. for each layer, for each tile that has a slot, by position: the slot, `[kv_heads, 2, group, head_dim]`. Positions
//!    that hold no token of the sequence are zero, whatever the pool's memory holds there.

use super::PoolLayout;
use crate::tables::{Lengths, SequenceView};

/// Which memory of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMemory {
    /// The pages.
    Pages,
    /// The slots.
    Slots,
}

/// Bytes that lie together in the pool's memory and in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The memory.
    pub memory: PoolMemory,
    /// First byte in it.
    pub at: usize,
    /// First byte in the image.
    pub image_at: usize,
    /// Bytes.
    pub bytes: usize,
}

/// Bytes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// Of the records.
    pub records: usize,
    /// Of the slots, which come behind them.
    pub slots: usize,
}

impl ImageSize {
    /// Of both.
    pub const fn bytes(&self) -> usize {
        self.records + self.slots
    }
}

impl PoolLayout {
    /// Bytes of the image of a sequence; `None` if they are more than an address can tell.
    pub fn image_size(&self, lengths: &Lengths) -> Option<ImageSize> {
        let sum = |bytes: fn(&super::Layer) -> usize| {
            self.layers.iter().try_fold(0usize, |sum, layer| sum.checked_add(bytes(layer)))
        };
        let records = sum(|layer| layer.page_bytes)?.checked_mul(lengths.pages(&self.rule))?;
        let slots = sum(|layer| layer.slot_bytes)?.checked_mul(lengths.slots(&self.rule))?;
        records.checked_add(slots).filter(|&bytes| isize::try_from(bytes).is_ok())?;
        Some(ImageSize { records, slots })
    }

    /// Where the bytes of an image lie in the pool, by ascending place in the image. What lies in no piece is zero.
    pub fn pieces(&self, view: &SequenceView) -> Vec<Piece> {
        let mut pieces = Pieces::default();
        let ids = |table: &[i32]| table.iter().filter_map(|&id| usize::try_from(id).ok()).collect::<Vec<_>>();
        let pages = ids(&view.block_table);
        for layer in &self.layers {
            for page in &pages {
                pieces.add(PoolMemory::Pages, layer.pages_at + page * layer.page_bytes, layer.page_bytes);
            }
        }
        let group = self.rule.group();
        for layer in &self.layers {
            for (tile, &slot) in view.slot_table.iter().enumerate() {
                let Ok(slot) = usize::try_from(slot) else { continue };
                let stored = group.min(view.length - tile * group);
                if stored == group {
                    pieces.add(PoolMemory::Slots, layer.slots_at + slot * layer.slot_bytes, layer.slot_bytes);
                    continue;
                }
                for head in 0..layer.shape.kv_heads {
                    for side in 0..2 {
                        let (at, bytes) = self.slot_at(layer, slot, head, side);
                        let used = bytes / group * stored;
                        pieces.add(PoolMemory::Slots, at, used);
                        pieces.image_at += bytes - used;
                    }
                }
            }
        }
        pieces.list
    }
}

#[derive(Default)]
struct Pieces {
    list: Vec<Piece>,
    image_at: usize,
}

impl Pieces {
    /// The next bytes of the image; they join the piece before where they go on from it in both places.
    fn add(&mut self, memory: PoolMemory, at: usize, bytes: usize) {
        let image_at = self.image_at;
        match self.list.last_mut() {
            Some(last)
                if last.memory == memory
                    && last.at + last.bytes == at
                    && last.image_at + last.bytes == image_at =>
            {
                last.bytes += bytes;
            }
            _ => self.list.push(Piece { memory, at, image_at, bytes }),
        }
        self.image_at += bytes;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::codec::SlotType;
    use crate::pool::LayerShape;
    use crate::{Config, ConfigOptions};

    fn layout() -> PoolLayout {
        let options = ConfigOptions {
            sink_tokens: Some(16),
            ..ConfigOptions::from_name("kvarn_k4v2_g64", 32).unwrap()
        };
        let layers = [LayerShape { kv_heads: 2, head_dim: 32 }, LayerShape { kv_heads: 1, head_dim: 64 }];
        PoolLayout::new(Config::new(&options).unwrap(), &layers, 8, 8, SlotType::Float16).unwrap()
    }

    fn view(length: usize, sealed: usize, blocks: &[i32], slots: &[i32]) -> SequenceView {
        SequenceView {
            length,
            committed: length,
            sealed,
            block_table: Arc::new(blocks.to_vec()),
            slot_table: Arc::new(slots.to_vec()),
        }
    }

    #[test]
    fn neighbours_are_one_piece_and_slots_are_cut_to_their_tokens() {
        let layout = layout();
        let [a, b] = &layout.layers[..] else { panic!("two layers") };
        let view = view(3 * 64 + 5, 3, &[2, 3, 7, -1], &[4, -1, -1, 0]);
        let pieces = layout.pieces(&view);
        let size = layout.image_size(&(&view).into()).unwrap();
        assert_eq!(size.records, 3 * (a.page_bytes + b.page_bytes));
        assert_eq!(size.slots, 2 * (a.slot_bytes + b.slot_bytes));
        let piece = |memory, at, image_at, bytes| Piece { memory, at, image_at, bytes };
        let pages = |at, image_at, bytes| piece(PoolMemory::Pages, at, image_at, bytes);
        assert_eq!(pieces[0], pages(a.pages_at + 2 * a.page_bytes, 0, 2 * a.page_bytes));
        assert_eq!(pieces[1], pages(a.pages_at + 7 * a.page_bytes, 2 * a.page_bytes, a.page_bytes));
        assert_eq!(pieces[2], pages(b.pages_at + 2 * b.page_bytes, 3 * a.page_bytes, 2 * b.page_bytes));
        let slots = |at, image_at, bytes| piece(PoolMemory::Slots, at, image_at, bytes);
        assert_eq!(pieces[4], slots(a.slots_at + 4 * a.slot_bytes, size.records, a.slot_bytes));
        // Slot 0: K of head 0, V of head 0, K of head 1, V of head 1: five tokens each.
        let matrix = a.slot_bytes / 4;
        for index in 0..4 {
            let at = size.records + a.slot_bytes + index * matrix;
            assert_eq!(pieces[5 + index], slots(a.slots_at + index * matrix, at, 5 * 32 * 2));
        }
        assert_eq!(
            pieces[9],
            slots(b.slots_at + 4 * b.slot_bytes, size.records + 2 * a.slot_bytes, b.slot_bytes)
        );
        let last = pieces.last().unwrap();
        assert_eq!(last.image_at + last.bytes, size.bytes() - 59 * 64 * 2);
        assert_eq!(pieces.len(), 12);
    }

    #[test]
    fn an_empty_sequence_has_an_empty_image() {
        let layout = layout();
        assert_eq!(layout.pieces(&view(0, 0, &[], &[])), []);
        assert_eq!(layout.image_size(&Lengths::default()), Some(ImageSize { records: 0, slots: 0 }));
    }

    #[test]
    fn an_image_beyond_the_address_space_has_no_size() {
        let layers = vec![LayerShape { kv_heads: 4096, head_dim: 256 }; 1 << 16];
        let config = Config::from_name("kvarn_k8v8_g128", 256).unwrap();
        let layout = PoolLayout::new(config, &layers, 0, 0, SlotType::Float32).unwrap();
        let length = crate::tables::MAX_TOKENS;
        let lengths = Lengths { length, committed: length, sealed: layout.rule.sealed_tiles(length) };
        assert!(lengths.are_possible(&layout.rule));
        assert_eq!(layout.image_size(&lengths), None);
    }
}
