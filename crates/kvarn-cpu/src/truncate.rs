//! Truncating a sequence, and decoding a record back into a slot where the cut lies in one.

use kvarn::tables::{Place, SequenceId, Span, Unseal};

use crate::Error;
use crate::dtype::{slot_dtype, store};
use crate::pool::Pool;
use crate::read::{TileBuffer, Want};
use crate::threads::install;

impl Pool {
    /// Keeps the first `keep` tokens of a sequence. A cut into a record decodes it into a free slot, in the rotated frame
    /// and rounded to the slot type; other cuts are exact. See [`Tables::plan_truncation`](kvarn::tables::Tables::plan_truncation).
    pub fn truncate(&self, sequence: SequenceId, keep: usize) -> Result<(), Error> {
        self.core().truncate(sequence, keep, |_, unseal| {
            self.unseal(unseal);
            Ok(())
        })
    }

    /// Decodes a tile into its slot, in every layer.
    fn unseal(&self, Unseal { page, slot, tokens, .. }: Unseal) {
        let layers = &self.layout().layers;
        let heads = layers.iter().flat_map(|layer| (0..layer.shape.kv_heads).map(move |head| (layer, head)));
        let heads: Vec<_> = heads.collect();
        let record = [Span { position: 0, offset: 0, count: tokens, place: Place::Page(page) }];
        let dtype = slot_dtype(self.layout().slot_type);
        install(|| {
            use rayon::prelude::*;
            heads.par_iter().for_each_init(TileBuffer::default, |buffer, &(layer, head)| {
                let mut row = vec![0.0; layer.shape.head_dim];
                for (side, want) in [Want::Keys, Want::Values].into_iter().enumerate() {
                    buffer.read(self, layer, head, &record, want);
                    let base = self.slot(layer, slot, head, side);
                    for token in 0..tokens {
                        buffer.row(want, token, &mut row);
                        // SAFETY: token < group, so the row lies within the slot's matrix. The slot is free, and stays so as
                        // long as the tables are locked: nobody else reads or writes it.
                        unsafe { store(dtype, &row, base.add(token * row.len() * dtype.bytes())) };
                    }
                }
            });
        });
    }
}
