//! Truncating a sequence, and decoding a record back into a slot where the cut lies in one.

use kvarn::DType;
use kvarn::pool::Layer;
use kvarn::tables::{SequenceId, SequenceView, Unseal};

use crate::capture::{Capture, capture};
use crate::{DeviceTensor, Error, Pool, Stream};

impl Pool {
    /// Keeps the first `keep` tokens of a sequence. A cut into a record decodes it into a free slot, in the rotated frame
    /// and rounded to half: one launch a layer on `stream`, which must not be captured. Other cuts are exact and launch
    /// nothing. See [`Tables::plan_truncation`](kvarn::tables::Tables::plan_truncation).
    ///
    /// The sequence's next steps go to `stream`, or after its work. Provides memory for the slot.
    pub fn truncate(&self, sequence: SequenceId, keep: usize, stream: Stream) -> Result<(), Error> {
        if self.is_captured(stream)? {
            // Refused before anything is allocated or waited for, which could spoil the capture.
            let refuse = Error::Capturing {
                what: "a cut into a record",
                expected: "it outside of the capture, as a graph would decode the same record for ever",
                fix: "truncate before or after",
            };
            return self.core().truncate(sequence, keep, |_, _| Err(refuse));
        }
        self.with_room(|| {
            self.core().truncate(sequence, keep, |view, unseal| self.unseal(view, unseal, stream))
        })
    }

    fn is_captured(&self, stream: Stream) -> Result<bool, Error> {
        let _current = self.device().enter()?;
        Ok(self.device().told(capture(stream))? != Capture::Off)
    }

    /// Decodes a tile into its slot, in every layer. An error leaves the slot free: nobody reads what was written.
    fn unseal(&self, view: &SequenceView, unseal: Unseal, stream: Stream) -> Result<(), Error> {
        self.provide_first(0, unseal.slot + 1)?;
        let first = unseal.tile * self.core().layout().rule.group();
        let mut tables = self.send_tables(view, stream)?;
        for (index, layer) in self.core().layout().layers.iter().enumerate() {
            let [k, v] = self.slot_rows(layer, unseal.slot, unseal.tokens);
            self.launch_expand(layer, index, &mut tables, first..first + unseal.tokens, true, &k, &v)?;
        }
        Ok(())
    }

    /// The first `tokens` rows of K and of V of a slot, `[tokens, kv_heads, head_dim]`.
    fn slot_rows(&self, layer: &Layer, slot: usize, tokens: usize) -> [DeviceTensor; 2] {
        let (layout, cache) = (self.core().layout(), self.cache(layer));
        let (kv_heads, head_dim) = (layer.shape.kv_heads, layer.shape.head_dim);
        let matrix = layout.rule.group() * head_dim;
        let strides = [head_dim as isize, 2 * matrix as isize, 1];
        [0, 1].map(|side| {
            let address = cache.slots + (slot * layer.slot_bytes + side * matrix * 2) as u64;
            // SAFETY: rows of one slot, `[kv_heads, 2, group, head_dim]`, in memory that is provided and kept as long as the
            // pool; the slot is free, so nobody else reads or writes it.
            unsafe { DeviceTensor::from_raw(address, DType::Float16, [tokens, kv_heads, head_dim], strides) }
        })
    }
}
