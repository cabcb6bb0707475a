//! What the tables refuse, and why.

use super::rule::MAX_TOKENS;
use super::{PrefixKey, SequenceId, StepId};

/// What kind of mistake a [`TableError`] is, for callers that map errors to classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableErrorKind {
    /// Arguments that are wrong whatever the pool holds, or do not fit together.
    Shape,
    /// A sequence or step that is not in the state the call needs.
    State,
    /// The pool is too small, or too full at the moment.
    Capacity,
}

/// What one sequence of a refused step needs, and what was left when its turn came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack {
    /// The sequence.
    pub sequence: SequenceId,
    /// Its index in the batch.
    pub index: usize,
    /// Pages it needs for this step.
    pub pages_needed: usize,
    /// Pages left by the sequences before it.
    pub pages_free: usize,
    /// Slots it needs for this step.
    pub slots_needed: usize,
    /// Slots left by the sequences before it.
    pub slots_free: usize,
}

/// A refused call; nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Tokens per tile out of range.
    #[error("group {group}: expected 1 to {MAX_TOKENS} tokens per tile; 64 and 128 are usual")]
    Group {
        /// What was given.
        group: usize,
    },
    /// More sinks than a tile holds.
    #[error(
        "sink_tokens {sink_tokens}: expected 0 to {group} (the group); use fewer sinks or a larger group"
    )]
    SinkTokens {
        /// What was given.
        sink_tokens: usize,
        /// Tokens per tile.
        group: usize,
    },
    /// A recent window that is too long.
    #[error(
        "recent_tokens {recent_tokens}: expected 0 to {most} (four groups); use a shorter recent window or a larger group"
    )]
    RecentTokens {
        /// What was given.
        recent_tokens: usize,
        /// The longest window.
        most: usize,
    },
    /// More pages than an int32 table can name.
    #[error(
        "{pages} pages: expected at most {MAX_TOKENS}, which an int32 table can name; make the pool smaller"
    )]
    TooManyPages {
        /// What was given.
        pages: usize,
    },
    /// More slots than an int32 table can name.
    #[error(
        "{slots} slots: expected at most {MAX_TOKENS}, which an int32 table can name; make the pool smaller"
    )]
    TooManySlots {
        /// What was given.
        slots: usize,
    },
    /// A step of nothing.
    #[error("0 sequences: expected at least one; leave the step out")]
    NoSequences,
    /// Lists of a batch that differ in length.
    #[error(
        "{counts} counts and {hold} hold for {sequences} sequences: expected one of each per sequence; pass {sequences}"
    )]
    BatchLengths {
        /// Sequences given.
        sequences: usize,
        /// Counts given.
        counts: usize,
        /// Holds given.
        hold: usize,
    },
    /// A sequence that is in the batch twice.
    #[error(
        "{sequence} at {first} and {second} of the batch: expected each sequence once; append its tokens with one count"
    )]
    DuplicateSequence {
        /// The sequence.
        sequence: SequenceId,
        /// Its first index in the batch.
        first: usize,
        /// Its second index in the batch.
        second: usize,
    },
    /// More tokens held back than appended.
    #[error("hold {hold} for {sequence}: expected at most its count, {count}; hold fewer tokens")]
    HoldExceedsCount {
        /// The sequence.
        sequence: SequenceId,
        /// Tokens to hold back.
        hold: usize,
        /// Tokens appended.
        count: usize,
    },
    /// A sequence that would grow too long.
    #[error(
        "{count} tokens after {length} of {sequence}: expected at most {MAX_TOKENS} in all; start another sequence"
    )]
    SequenceTooLong {
        /// The sequence.
        sequence: SequenceId,
        /// Tokens stored.
        length: usize,
        /// Tokens to append.
        count: usize,
    },
    /// More rows than int32 offsets can name.
    #[error(
        "counts that add up to more than {MAX_TOKENS}: expected at most so many rows in a step; make several steps"
    )]
    StepTooLong,
    /// A handle of another pool.
    #[error("{sequence} of another pool: expected a sequence of this pool; use the pool that created it")]
    ForeignSequence {
        /// The sequence.
        sequence: SequenceId,
    },
    /// A handle of a sequence that was freed.
    #[error("{sequence}, which was freed: expected a live sequence; create one")]
    FreedSequence {
        /// The sequence.
        sequence: SequenceId,
    },
    /// A sequence that an open step is working on.
    #[error(
        "{sequence}, which is in open {step}: expected a sequence outside open steps; finish or abandon the step first"
    )]
    SequenceInStep {
        /// The sequence.
        sequence: SequenceId,
        /// The open step.
        step: StepId,
    },
    /// A sequence whose bytes are on the host.
    #[error("{sequence}, which is offloaded: expected a sequence in the pool; restore it first")]
    OffloadedSequence {
        /// The sequence.
        sequence: SequenceId,
    },
    /// A sequence that was to be restored, and is not offloaded.
    #[error("{sequence}, which is in the pool: expected an offloaded sequence; use it as it is")]
    ResidentSequence {
        /// The sequence.
        sequence: SequenceId,
    },
    /// Too few free pages or slots for a sequence that comes from a file or from the host.
    #[error(
        "{length} tokens of a saved or offloaded sequence, which need {pages_needed} pages with {pages_free} free and {slots_needed} slots with {slots_free} free: expected them to fit the pool of {pages} pages and {slots} slots; free or offload other sequences, or make the pool larger"
    )]
    ImageCapacity {
        /// Tokens of the sequence.
        length: usize,
        /// Pages it needs.
        pages_needed: usize,
        /// Pages that are free.
        pages_free: usize,
        /// Slots it needs.
        slots_needed: usize,
        /// Slots that are free.
        slots_free: usize,
        /// All pages of the pool.
        pages: usize,
        /// All slots of the pool.
        slots: usize,
    },
    /// A step of another pool.
    #[error("{step} of another pool: expected a step of this pool; use the pool that planned it")]
    ForeignStep {
        /// The step.
        step: StepId,
    },
    /// A step that was finished or abandoned before.
    #[error("{step}, which was finished or abandoned: expected an open step; plan a new one")]
    ClosedStep {
        /// The step.
        step: StepId,
    },
    /// Truncation to more than is stored.
    #[error("{keep} tokens of {sequence}: expected at most its length, {length}; append tokens with a step")]
    TruncateBeyondLength {
        /// The sequence.
        sequence: SequenceId,
        /// Tokens to keep.
        keep: usize,
        /// Tokens stored.
        length: usize,
    },
    /// Truncation into a sealed tile.
    #[error(
        "{keep} tokens of {sequence}: expected at least {boundary}, its sealed boundary; keep more, or hold back tokens that may be rejected"
    )]
    TruncateBelowSealed {
        /// The sequence.
        sequence: SequenceId,
        /// Tokens to keep.
        keep: usize,
        /// First position after the sealed tiles.
        boundary: usize,
    },
    /// An order for another number of sequences.
    #[error("order of {order} for {sequences} sequences: expected one index per sequence; pass {sequences}")]
    OrderLength {
        /// Indices given.
        order: usize,
        /// Sequences given.
        sequences: usize,
    },
    /// An order that names no sequence of the list.
    #[error(
        "order {from} at {index}: expected 0 to {}, an index into the sequences; pass one of these",
        .sequences - 1
    )]
    OrderIndex {
        /// Which index.
        index: usize,
        /// What was given.
        from: usize,
        /// Sequences given.
        sequences: usize,
    },
    /// More keys than tiles that can be shared.
    #[error(
        "{keys} keys for {sequence}: expected at most {tiles}, its sealed tiles; pass fewer, or publish once more are sealed"
    )]
    TooManyKeys {
        /// The sequence.
        sequence: SequenceId,
        /// Keys given.
        keys: usize,
        /// Tiles that can be published.
        tiles: usize,
    },
    /// A key that is given twice.
    #[error(
        "key {key} at {first} and {second}: expected each key once; derive the key of a tile from that of the tile before it"
    )]
    RepeatedKey {
        /// The key.
        key: PrefixKey,
        /// Its first index.
        first: usize,
        /// Its second index.
        second: usize,
    },
    /// A tile that is published under another key.
    #[error(
        "tile {tile} of {sequence}, which is published under other keys: expected the keys it was published with; pass these"
    )]
    PublishedTile {
        /// The sequence.
        sequence: SequenceId,
        /// The tile.
        tile: usize,
    },
    /// Too few free pages or slots for a step.
    ///
    /// Sequences are served in batch order, and one that does not fit takes nothing: without those
    /// listed the step fits.
    #[error(
        "{}: expected the step to fit the pool of {pages} pages and {slots} slots; free sequences, append fewer tokens, or make the pool larger",
        listed(.lacking)
    )]
    Capacity {
        /// The sequences that do not fit, in batch order.
        lacking: Vec<Lack>,
        /// All pages of the pool.
        pages: usize,
        /// All slots of the pool.
        slots: usize,
    },
}

impl TableError {
    /// What kind of mistake this is.
    pub fn kind(&self) -> TableErrorKind {
        match self {
            Self::Group { .. }
            | Self::SinkTokens { .. }
            | Self::RecentTokens { .. }
            | Self::TooManyPages { .. }
            | Self::TooManySlots { .. }
            | Self::NoSequences
            | Self::BatchLengths { .. }
            | Self::DuplicateSequence { .. }
            | Self::HoldExceedsCount { .. }
            | Self::SequenceTooLong { .. }
            | Self::StepTooLong
            | Self::OrderLength { .. }
            | Self::OrderIndex { .. }
            | Self::TooManyKeys { .. }
            | Self::RepeatedKey { .. }
            | Self::TruncateBeyondLength { .. } => TableErrorKind::Shape,
            Self::ForeignSequence { .. }
            | Self::FreedSequence { .. }
            | Self::SequenceInStep { .. }
            | Self::OffloadedSequence { .. }
            | Self::ResidentSequence { .. }
            | Self::ForeignStep { .. }
            | Self::ClosedStep { .. }
            | Self::PublishedTile { .. }
            | Self::TruncateBelowSealed { .. } => TableErrorKind::State,
            Self::Capacity { .. } | Self::ImageCapacity { .. } => TableErrorKind::Capacity,
        }
    }
}

/// Sequences named in an error text; a batch of hundreds would drown the rest of the sentence.
const NAMED: usize = 4;

fn listed(lacking: &[Lack]) -> String {
    let mut parts: Vec<String> = lacking.iter().take(NAMED).map(described).collect();
    if lacking.len() > NAMED {
        parts.push(format!("{} more sequences", lacking.len() - NAMED));
    }
    parts.join("; ")
}

fn described(lack: &Lack) -> String {
    let parts: Vec<String> =
        [(lack.pages_needed, lack.pages_free, "page"), (lack.slots_needed, lack.slots_free, "slot")]
            .into_iter()
            .filter(|(needed, free, _)| needed > free)
            .map(|(needed, free, noun)| {
                format!("{needed} {noun}{} with {free} free", if needed == 1 { "" } else { "s" })
            })
            .collect();
    format!("{} needs {}", lack.sequence, parts.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lack(serial: u64, pages: (usize, usize), slots: (usize, usize)) -> Lack {
        Lack {
            sequence: SequenceId { pool: 0, serial },
            index: 0,
            pages_needed: pages.0,
            pages_free: pages.1,
            slots_needed: slots.0,
            slots_free: slots.1,
        }
    }

    #[test]
    fn a_capacity_error_names_who_lacked_what() {
        let error = TableError::Capacity {
            lacking: vec![lack(3, (2, 0), (1, 0)), lack(5, (1, 1), (2, 1))],
            pages: 16,
            slots: 8,
        };
        assert_eq!(error.kind(), TableErrorKind::Capacity);
        assert_eq!(
            error.to_string(),
            "sequence 3 needs 2 pages with 0 free and 1 slot with 0 free; sequence 5 needs 2 slots with 1 free: \
             expected the step to fit the pool of 16 pages and 8 slots; \
             free sequences, append fewer tokens, or make the pool larger"
        );
    }

    #[test]
    fn a_long_list_is_cut_in_the_text_only() {
        let lacking = (0..9).map(|serial| lack(serial, (1, 0), (0, 0))).collect();
        let text = TableError::Capacity { lacking, pages: 0, slots: 0 }.to_string();
        assert!(text.contains("sequence 3 needs 1 page with 0 free; 5 more sequences: expected"), "{text}");
    }
}
