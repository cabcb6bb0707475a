//! The tile codec: rotation, variance normalisation, rounding, refit, range guards.
//!
//! Specification in words and formulas: `docs/codec.md`. Source: KVarN, arXiv 2606.03458; refit is ours.

mod absorb;
mod decode;
mod elementary;
mod encoder;
mod guard;
mod input;
mod lanes;
mod normalize;
mod quantize;
mod refit;
mod rotation;

pub use decode::{DecodeScratch, decode_matrix};
pub use encoder::{EncodeCounts, TileEncoder};
pub use guard::RangeGuard;
pub use input::{SlotType, finite, round_to_slot};
pub use lanes::{PlainTurn, Turn};
pub use rotation::Rotation;
