//! The tables of one pool: which page and which slot holds which tokens of which sequence.
//!
//! This is bookkeeping only: no bytes, no threads, no device. A backend owns the memory and carries
//! out what a [`StepPlan`] says, layer by layer; one page id and one slot id serve every layer.
//!
//! - A **tile** is `group` consecutive tokens of a sequence; tile `i` covers positions
//!   `[i·group, (i+1)·group)`.
//! - A **page** holds the records of one sealed tile, a **slot** the 16-bit K and V of one tile
//!   that is a sink or part of the tail. Both are reference counted by physical id; nothing is
//!   keyed by request.
//! - A **fork** of a sequence shares its pages and slots. Pages and full slots never change; a slot that is not full is
//!   copied by the first step that would write to it.
//! - A **sequence** owns a block table (page of each tile) and a slot table (slot of each tile), -1
//!   where there is none. Tables are handed out as shared snapshots that never change.
//! - A **step** is one forward pass of a batch: [`Tables::plan_step`] reserves all it needs or
//!   changes nothing, [`Tables::finish`] makes it the state of its sequences, [`Tables::abandon`]
//!   takes it back.
//! - An **offloaded** sequence has lengths, and an image on the host, but no pages and slots.
//! - A **published** tile is found by its [`PrefixKey`] and those before it: a new sequence starts from
//!   what is found, in the same pages and sink slot. What nobody else holds is given up when room is
//!   needed, the least recently used first.
//!
//! [`SealRule`] says when a tile is sealed; [`SequenceView::spans`] says where a stored token is
//! read.

mod batch;
mod error;
mod handle;
mod ids;
mod images;
mod lengths;
mod plan;
mod pool;
mod prefix;
mod published;
mod references;
mod rule;
mod stats;
mod step;
#[cfg(test)]
mod tests;
mod view;

pub use batch::BatchView;
pub use error::{Lack, TableError, TableErrorKind};
pub use handle::{SequenceId, StepId};
pub use images::HostImage;
pub use lengths::Lengths;
pub use pool::Tables;
pub use prefix::{PrefixCounts, PrefixKey};
pub use references::References;
pub use rule::{MAX_TOKENS, SealRule};
pub use stats::{Stats, Usage};
pub use step::{Seal, SealSource, SequencePlan, SlotCopy, SlotWrite, StepPlan};
pub use view::{Place, SequenceView, Span};
