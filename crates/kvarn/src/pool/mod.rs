//! What the pools of all backends share: layers and where their bytes lie, the tables behind a lock, open steps, and the
//! checks of what callers pass. A backend adds memory and arithmetic.

mod checks;
mod core;
mod error;
mod layout;
mod references;
mod step;

pub use checks::{AttendOptions, AttendSettings, TensorShape, check_attend, check_expand, check_rows};
pub use core::{PoolCore, Stats};
pub use error::PoolError;
pub use layout::{Layer, LayerShape, PoolLayout};
pub use step::OpenStep;
