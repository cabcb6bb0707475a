//! Which thread block does which part of an attention: pure, tested without a GPU.
//!
//! All work has one order: the items of a block of queries for KV head 0, then for head 1 …, then those of the next block.
//! Each thread block does a run of it, of about the same number of bytes. How items are merged does not depend on who did
//! them: results are the same whatever the number of thread blocks.

use crate::params::{ITEM_WORDS, SHARE_WORDS};
use crate::plan::AttendPlan;

/// Bytes that items read, per KV head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cost {
    /// Of a record tile.
    pub record: u64,
    /// Of a token in a slot.
    pub token: u64,
}

impl Cost {
    /// Of items with so many record tiles and tokens in slots.
    pub(crate) const fn of(self, items: usize, tiles: usize, tokens: usize) -> u64 {
        // One more record each: what an item costs by itself.
        (tiles + items) as u64 * self.record + tokens as u64 * self.token
    }

    /// Of the item with these words.
    pub(crate) fn of_item(self, item: &[i32]) -> u64 {
        self.of(1, item[1] as usize, item[3] as usize)
    }
}

/// Thread blocks of the launch: one for each share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Blocks that the device holds at a time.
    pub resident: usize,
    /// Shares in all, the last ones perhaps without work, so that a captured launch serves every step. `None`: as many as there
    /// is work for.
    pub room: Option<usize>,
}

impl Grid {
    /// With room for work of up to `total` cost, in pieces of up to `largest`.
    pub(crate) fn with_room(self, total: u64, largest: u64, cost: Cost) -> Self {
        Self { room: Some(self.waves(total, largest, cost) * self.resident), ..self }
    }

    /// Waves of blocks, each as many as the device holds at a time: one, which shares work out evenly, or several, of shares that
    /// become smaller.
    ///
    /// A block begins with the latency of several loads, so shares should be few. But blocks do not get on equally fast,
    /// and where a share is two pieces or less, even shares differ much.
    fn waves(self, total: u64, largest: u64, cost: Cost) -> usize {
        let even = total / self.resident as u64;
        let small = even <= FEW_RECORDS * cost.record || 2 * largest <= even;
        match (even <= ONE_WAVE_RECORDS * cost.record, small) {
            (true, true) => 1,
            (true, false) => 2,
            (false, _) => MOST_WAVES,
        }
    }
}

/// Records that the share of a block may have where the device does all work in one wave.
const ONE_WAVE_RECORDS: u64 = 32;
/// Records of a share that is never too uneven.
const FEW_RECORDS: u64 = 8;
/// Most waves, what each takes of what is left, and the records of the smallest share.
const MOST_WAVES: usize = 4;
const WAVE_PERCENT: u64 = 90;
const LEAST_RECORDS: u64 = 4;

/// Where shares begin.
enum Cuts {
    /// One wave: a piece belongs to the share that its middle falls into. `next`: where the middle of the next share's first
    /// piece is at least, times `shares`.
    Even {
        shares: u64,
        next: u64,
    },
    Waves(Waves),
}

/// A first wave takes most of the work, the next one most of what is left, and so on.
struct Waves {
    resident: u64,
    count: u64,
    /// Cost of the largest piece and of the smallest share.
    largest: u64,
    least: u64,
    made: u64,
    /// Cost of the share at work, and what shares of this wave may have.
    share: u64,
    most: u64,
}

impl Cuts {
    fn new(grid: Grid, total: u64, largest: u64, cost: Cost) -> Self {
        let resident = grid.resident;
        let waves =
            grid.waves(total, largest, cost).min(grid.room.map_or(MOST_WAVES, |room| room / resident));
        let (resident, waves) = (resident as u64, waves as u64);
        if waves == 1 {
            return Self::Even { shares: resident, next: 0 };
        }
        let least = LEAST_RECORDS * cost.record;
        Self::Waves(Waves { resident, count: waves, largest, least, made: 0, share: 0, most: 0 })
    }

    /// Whether a piece of this cost begins a share; `left` is the cost of the work from this piece on, of `total`.
    fn begin(&mut self, piece: u64, left: u64, total: u64) -> bool {
        match self {
            Self::Even { shares, next } => {
                let middle = (2 * (total - left) + piece) * *shares;
                let begins = middle >= *next;
                if begins {
                    *next = (middle / (2 * total) + 1) * 2 * total;
                }
                begins
            }
            Self::Waves(waves) => waves.begin(piece, left),
        }
    }
}

impl Waves {
    fn begin(&mut self, piece: u64, left: u64) -> bool {
        if self.made > 0 && self.share + piece <= self.most {
            self.share += piece;
            return false;
        }
        if self.made.is_multiple_of(self.resident) {
            let even = left.div_ceil(self.resident);
            self.most = if self.made / self.resident + 1 == self.count {
                even + self.largest // each share takes an even part of the rest or more
            } else {
                (even * WAVE_PERCENT / 100).max(self.least)
            };
        }
        self.made += 1;
        self.share = piece;
        true
    }
}

/// Shares of all launches, one behind the other, `[shares, SHARE_WORDS]`, and how many each launch has.
pub(crate) fn launches(plan: &AttendPlan, kv_heads: usize, grid: Grid, cost: Cost) -> (Vec<i32>, Vec<usize>) {
    let (mut all, mut blocks) = (Vec::new(), Vec::new());
    let ends = plan.launches.iter().copied().skip(1).chain([plan.count()]);
    for (&first, end) in plan.launches.iter().zip(ends) {
        let items = &plan.items[first * ITEM_WORDS..end * ITEM_WORDS];
        let made = shares(items, first, kv_heads, grid, cost);
        blocks.push(made.len() / SHARE_WORDS);
        all.extend(made);
    }
    (all, blocks)
}

/// Shares of the items of a launch, the first of which has index `first`: `[shares, SHARE_WORDS]`.
fn shares(items: &[i32], first: usize, kv_heads: usize, grid: Grid, cost: Cost) -> Vec<i32> {
    let items: Vec<&[i32]> = items.chunks_exact(ITEM_WORDS).collect();
    let total = kv_heads as u64 * items.iter().map(|item| cost.of_item(item)).sum::<u64>();
    let largest = items.iter().map(|item| cost.of_item(item)).max().unwrap_or(0);
    let mut cuts = Cuts::new(grid, total, largest, cost);
    // One piece each where there are few.
    let each = items.len() * kv_heads <= grid.resident;
    let mut made: Vec<i32> = Vec::new();
    let (mut left, mut at) = (total, 0); // cost of the pieces that are left; first item of the query block
    while at < items.len() {
        let parts = items[at][5] as usize;
        for head in 0..kv_heads {
            for (index, item) in items[at..at + parts].iter().enumerate() {
                let cost = cost.of_item(item);
                if cuts.begin(cost, left, total) || each {
                    made.extend([(first + at + index) as i32, head as i32, 0, 0]);
                    made.extend_from_slice(item);
                }
                let last = made.len() - SHARE_WORDS;
                made[last + 2] += 1;
                left -= cost;
            }
        }
        at += parts;
    }
    if let Some(room) = grid.room {
        debug_assert!(made.len() <= room * SHARE_WORDS);
        made.resize(room * SHARE_WORDS, 0);
    }
    made
}

#[cfg(test)]
mod tests;
