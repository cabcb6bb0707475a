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
    /// Shares that work of this cost is cut into, unless it is in few pieces.
    fn count(self, total: u64, cost: Cost) -> u64 {
        let resident = self.resident as u64;
        if total <= ONE_WAVE_RECORDS * cost.record * resident {
            resident
        } else {
            total.div_ceil(SHARE_RECORDS * cost.record)
        }
    }

    /// With room for all work of up to `total` cost.
    pub(crate) fn with_room(self, total: u64, cost: Cost) -> Self {
        let room = self.count(total, cost).max(self.resident as u64);
        Self { room: Some(room as usize), ..self }
    }
}

/// Records that the share of a block may have where the device does all work at once; above, shares are
/// [`SHARE_RECORDS`] long, and a block that is done makes room for the next one.
const ONE_WAVE_RECORDS: u64 = 32;
const SHARE_RECORDS: u64 = 16;

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
///
/// Where each block of one wave has little to do, one share each: a block begins with the latency of several loads. Where it
/// has much, shorter ones: blocks do not get on equally fast.
fn shares(items: &[i32], first: usize, kv_heads: usize, grid: Grid, cost: Cost) -> Vec<i32> {
    let items: Vec<&[i32]> = items.chunks_exact(ITEM_WORDS).collect();
    let total = kv_heads as u64 * items.iter().map(|item| cost.of_item(item)).sum::<u64>();
    let count = grid.room.map_or(u64::MAX, |room| room as u64).min(grid.count(total, cost));
    // One piece each where there are few.
    let each = items.len() * kv_heads <= grid.resident;
    let mut made: Vec<i32> = Vec::new();
    let (mut before, mut share) = (0, 0); // cost of the pieces so far; share that the present piece belongs to
    let mut at = 0;
    while at < items.len() {
        let parts = items[at][5] as usize;
        for head in 0..kv_heads {
            for (index, item) in items[at..at + parts].iter().enumerate() {
                let cost = cost.of_item(item);
                // The share that the middle of the piece falls into.
                let mut begins = each || made.is_empty();
                while (2 * before + cost) * count >= 2 * total * (share + 1) {
                    share += 1;
                    begins = true;
                }
                if begins {
                    made.extend([(first + at + index) as i32, head as i32, 0, 0]);
                    made.extend_from_slice(item);
                }
                let last = made.len() - SHARE_WORDS;
                made[last + 2] += 1;
                before += cost;
            }
        }
        at += parts;
    }
    if let Some(room) = grid.room {
        made.resize(room * SHARE_WORDS, 0);
    }
    made
}

#[cfg(test)]
mod tests;
