//! What the pools of all backends share: layers and where their bytes lie, the tables behind a lock, open steps, and the
//! checks of what callers pass. A backend adds memory and arithmetic.

mod checks;
mod core;
mod error;
mod fingerprint;
mod image;
mod images;
mod layout;
mod prefix;
mod references;
mod saved;
mod step;

pub use checks::{AttendOptions, AttendSettings, TensorShape, check_attend, check_expand, check_rows};
pub use core::{PoolCore, Stats};
pub use error::PoolError;
pub use image::{ImageSize, Piece, PoolMemory};
pub use images::{Offloaded, Snapshot, Whereabouts};
pub use layout::{Layer, LayerShape, PoolLayout};
pub use prefix::TileKey;
pub use saved::{SEQUENCE_MAGIC, read_sequence, sequence_header};
pub use step::OpenStep;
