//! The model of one sequence: a plain list of what each token reads as, and names for the pieces of memory behind it.

use std::rc::Rc;

use kvarn::pool::PoolError;
use kvarn::tables::{SequenceId, TableError};

use crate::rule::Rule;

/// K and V of one token in every layer, rotated, of slot precision or decoded: `[layers][2][kv_heads][head_dim]`.
pub(crate) type Token = Rc<[f32]>;

/// Name of a page or a slot of the model. Names are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Piece(pub(crate) u64);

/// The next free name.
#[derive(Debug, Default)]
pub(crate) struct Names(u64);

impl Names {
    pub(crate) fn next(&mut self) -> Piece {
        self.0 += 1;
        Piece(self.0)
    }
}

/// Where one tile lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) page: Option<Piece>,
    pub(crate) slot: Option<Piece>,
}

/// What is stored of a sequence.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stored {
    /// What each token reads as.
    pub(crate) tokens: Vec<Token>,
    pub(crate) committed: usize,
    pub(crate) tiles: Vec<Tile>,
    /// What was appended to tile 0, where it is sealed and keeps its slot.
    pub(crate) sink_tile: Vec<Token>,
    /// The largest hold of any step that led here.
    pub(crate) largest_hold: usize,
}

/// What may be done with a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Everything.
    Idle,
    /// It is in an open step.
    Open,
    /// It is offloaded: its tiles are named, but hold nothing of the pool.
    Away,
}

/// A sequence of the pool, and what the pool must hold of it.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) stored: Stored,
    pub(crate) state: State,
}

impl Sequence {
    /// Holds a refusal against the state of the sequence, which must forbid the call; returns a word for the report.
    pub(crate) fn check_refusal(&self, error: &PoolError) -> &'static str {
        match (self.state, error) {
            (State::Open, PoolError::Table(TableError::SequenceInStep { sequence, .. })) => {
                assert_eq!(*sequence, self.id);
                "refused: in a step"
            }
            (State::Away, PoolError::Table(TableError::OffloadedSequence { sequence })) => {
                assert_eq!(*sequence, self.id);
                "refused: offloaded"
            }
            (state, error) => panic!("{error}, for a sequence that is {state:?}"),
        }
    }
}

/// What a step makes of a sequence, but for its tokens.
pub(crate) struct Growth {
    pub(crate) tiles: Vec<Tile>,
    pub(crate) committed: usize,
    /// Tiles to encode.
    pub(crate) seals: Vec<usize>,
    pub(crate) new_pages: usize,
    pub(crate) new_slots: usize,
}

impl Stored {
    pub(crate) fn length(&self) -> usize {
        self.tokens.len()
    }

    /// The same in other pages and slots.
    pub(crate) fn moved(&self, names: &mut Names) -> Self {
        let mut moved = self.clone();
        for tile in &mut moved.tiles {
            tile.page = tile.page.map(|_| names.next());
            tile.slot = tile.slot.map(|_| names.next());
        }
        moved
    }

    /// Pages and slots that it has.
    pub(crate) fn extent(&self) -> (usize, usize) {
        let count = |pick: fn(&Tile) -> Option<Piece>| self.tiles.iter().filter_map(pick).count();
        (count(|tile| tile.page), count(|tile| tile.slot))
    }

    /// One past the last tile that has a page.
    pub(crate) fn sealed(&self) -> usize {
        self.tiles.iter().rposition(|tile| tile.page.is_some()).map_or(0, |last| last + 1)
    }

    /// A step of `count` tokens of which `hold` stay uncommitted. `is_shared` tells which slots somebody else holds too.
    pub(crate) fn grow(
        &self,
        rule: Rule,
        (count, hold): (usize, usize),
        is_shared: impl Fn(Piece) -> bool,
        names: &mut Names,
    ) -> Growth {
        let length = self.length() + count;
        let mut growth = Growth {
            tiles: self.tiles.clone(),
            committed: length - hold,
            seals: Vec::new(),
            new_pages: 0,
            new_slots: 0,
        };
        growth.tiles.resize(length.div_ceil(rule.group), Tile::default());
        for (index, tile) in growth.tiles.iter_mut().enumerate() {
            if tile.page.is_none() && rule.is_due(index, growth.committed) {
                tile.page = Some(names.next());
                growth.seals.push(index);
                growth.new_pages += 1;
            }
            let first = index * rule.group;
            let in_slot = tile.page.is_none() || rule.keeps_slot(index);
            let grows = count > 0 && first < self.length() && self.length() < first + rule.group;
            let copied = grows && tile.slot.is_some_and(&is_shared);
            if !in_slot {
                tile.slot = None;
            } else if tile.slot.is_none() || copied {
                tile.slot = Some(names.next());
                growth.new_slots += 1;
            }
        }
        growth
    }
}
