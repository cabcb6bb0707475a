//! What is read back: every element that `expand` gives, bit by bit.

use std::ops::Range;

use fastrand::Rng;
use kvarn::Side;
use kvarn_cpu::{Error, TensorMut};

use crate::codec::Layer;
use crate::floats::Floats;
use crate::sequence::{Stored, Token};
use crate::world::World;

/// One operation in so many is followed by a look at everything that is stored.
const SWEEP: u8 = 24;

impl World {
    /// Reads what the operation may have changed, now and then everything.
    pub(crate) fn check_contents(&mut self, random: &mut Rng) {
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        if random.u8(..SWEEP) == 0 {
            for sequence in self.resident() {
                self.check_sequence(sequence.id, 0..sequence.stored.length(), random);
            }
            return;
        }
        for id in touched {
            let Some(sequence) = self.resident().find(|sequence| sequence.id == id) else { continue };
            let length = sequence.stored.length();
            // The newest tokens, where most operations write, and any others.
            self.check_sequence(id, length.saturating_sub(self.rule.group + 8)..length, random);
            let first = random.usize(..=length);
            let end = length.min(first + random.usize(..=self.rule.group));
            self.check_sequence(id, first..end, random);
        }
    }

    fn check_sequence(&self, id: kvarn::tables::SequenceId, tokens: Range<usize>, random: &mut Rng) {
        let layer = random.usize(..self.codec.layers.len());
        let rotated = random.bool();
        let stored = &self.sequence(id).stored;
        check_expansion(&self.codec.layers[layer], stored, tokens, rotated, |first, k, v| {
            self.pool.expand(id, layer, first, rotated, k, v)
        });
    }
}

/// Holds an expansion of some tokens of one layer against the model.
pub(crate) fn check_expansion(
    layer: &Layer,
    stored: &Stored,
    tokens: Range<usize>,
    rotated: bool,
    expand: impl FnOnce(usize, &TensorMut<'_>, &TensorMut<'_>) -> Result<(), Error>,
) {
    let shape = [tokens.len(), layer.kv_heads, layer.head_dim];
    let (mut k, mut v) = (Floats::zeros(shape), Floats::zeros(shape));
    expand(tokens.start, &k.tensor_mut(), &v.tensor_mut()).unwrap();
    let mut row = vec![0.0; layer.head_dim];
    for (index, position) in tokens.enumerate() {
        let token: &Token = &stored.tokens[position];
        for head in 0..layer.kv_heads {
            for (side, given) in [(Side::Key, &k), (Side::Value, &v)] {
                row.copy_from_slice(layer.part(token, side, head));
                if !rotated {
                    layer.rotation.apply(&mut row);
                }
                let differs =
                    given.row(index, head).iter().zip(&row).position(|(a, b)| a.to_bits() != b.to_bits());
                if let Some(channel) = differs {
                    let (given, expected) = (given.row(index, head)[channel], row[channel]);
                    panic!(
                        "{side:?} of position {position} of {}, head {head}, channel {channel}: {given}, but the model has \
                         {expected}",
                        stored.length()
                    );
                }
            }
        }
    }
}
