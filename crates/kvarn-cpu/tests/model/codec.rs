//! The reference: the portable codec of the core crate, applied to the tokens of one tile.

use std::rc::Rc;

use kvarn::Side;
use kvarn::codec::{DecodeScratch, EncodeCounts, PlainTurn, Rotation, SlotType, TileEncoder, decode_matrix};
use kvarn::record::RecordLayout;

use crate::sequence::Token;
use crate::setup::Setup;
use crate::values::Rows;

/// What is needed to store and seal in one layer.
pub(crate) struct Layer {
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rotation: Rotation,
    /// Where the layer begins in a [`Token`].
    at: usize,
    layout: RecordLayout,
    encoder: TileEncoder,
}

impl Layer {
    /// Where K or V of one head lies in a [`Token`].
    fn range(&self, side: Side, head: usize) -> std::ops::Range<usize> {
        let side = usize::from(side == Side::Value);
        let at = self.at + (side * self.kv_heads + head) * self.head_dim;
        at..at + self.head_dim
    }

    pub(crate) fn part<'a>(&self, token: &'a Token, side: Side, head: usize) -> &'a [f32] {
        &token[self.range(side, head)]
    }
}

/// The codec of every layer.
pub(crate) struct Codec {
    pub(crate) layers: Vec<Layer>,
    group: usize,
    slot_type: SlotType,
    scratch: DecodeScratch,
}

impl Codec {
    pub(crate) fn new(setup: &Setup) -> Self {
        let config = setup.config();
        let mut at = 0;
        let mut layers = Vec::new();
        for &(kv_heads, head_dim) in setup.layers {
            let config = config.with_head_dim(head_dim).unwrap();
            let (layout, encoder) = (config.layout(), TileEncoder::new(&config));
            layers.push(Layer { kv_heads, head_dim, rotation: Rotation::new(head_dim), at, layout, encoder });
            at += 2 * kv_heads * head_dim;
        }
        let slot_type = setup.input.slot_type();
        Self { layers, group: config.group(), slot_type, scratch: DecodeScratch::default() }
    }

    /// The rows of a step as slots hold them, and what was met on the way in each layer, to which it is added.
    pub(crate) fn store(&self, rows: &[Rows], count: usize, counts: &mut [EncodeCounts]) -> Vec<Token> {
        let last = self.layers.last().unwrap();
        let mut token = vec![0.0; last.at + 2 * last.kv_heads * last.head_dim];
        let mut tokens = Vec::with_capacity(count);
        for index in 0..count {
            for ((layer, rows), counts) in self.layers.iter().zip(rows).zip(&mut *counts) {
                let rotation = (!rows.rotated).then_some(&layer.rotation);
                for head in 0..layer.kv_heads {
                    for (side, tensor) in [(Side::Key, &rows.k), (Side::Value, &rows.v)] {
                        let out = &mut token[layer.range(side, head)];
                        *counts += tensor.stored_row((index, head), rotation, self.slot_type, out);
                    }
                }
            }
            tokens.push(Rc::from(token.as_slice()));
        }
        tokens
    }

    /// A tile's tokens, encoded and decoded again.
    pub(crate) fn seal(&mut self, tile: &[Token], counts: &mut [EncodeCounts]) -> Vec<Token> {
        let mut decoded: Vec<Vec<f32>> = tile.iter().map(|token| token.to_vec()).collect();
        for (layer, counts) in self.layers.iter_mut().zip(counts) {
            let elements = self.group * layer.head_dim;
            let mut record = vec![0; layer.layout.record_bytes];
            let mut matrix = vec![0.0; elements];
            for head in 0..layer.kv_heads {
                let gather = |side| -> Vec<f32> {
                    tile.iter().flat_map(|token| layer.part(token, side, head)).copied().collect()
                };
                let (k, v) = (gather(Side::Key), gather(Side::Value));
                *counts += layer.encoder.encode::<PlainTurn>(&k, &v, &mut record);
                for side in [Side::Key, Side::Value] {
                    decode_matrix(layer.layout.matrix(side), &record, &mut self.scratch, &mut matrix);
                    for (index, token) in decoded.iter_mut().enumerate() {
                        for (channel, value) in token[layer.range(side, head)].iter_mut().enumerate() {
                            *value = match side {
                                Side::Key => matrix[channel * self.group + index],
                                Side::Value => matrix[index * layer.head_dim + channel],
                            };
                        }
                    }
                }
            }
        }
        decoded.into_iter().map(Rc::from).collect()
    }
}
