//! The arrays of a step on the device: sent once for all layers, and again for another stream or by a replay.

use kvarn::pool::Layer;

use super::Step;
use crate::arrays::{SentAppend, SentAttend};
use crate::geometry::AttendGeometry;
use crate::params::{AttendParams, ITEM_WORDS};
use crate::plan::{AppendPlan, AttendKey, AttendPlan};
use crate::share::{Cost, Grid, launches};
use crate::upload::{Array, StepBuffer, Words};
use crate::workspace::{Workspace, part_bytes};
use crate::{Error, Stream, check};

impl Step {
    /// An append's arrays on the device: sent once for all layers, and again for another stream.
    pub(super) fn sent_append<'a>(
        &self,
        sent: &'a mut Option<SentAppend>,
        stream: Stream,
        recording: bool,
    ) -> Result<&'a mut SentAppend, Error> {
        let plan = self.open.plan();
        if recording && sent.is_none() {
            return Err(not_warm("append"));
        }
        // What is recorded needs the addresses only: each replay sends its own arrays first.
        if !recording && sent.as_ref().is_none_or(|sent| sent.sent != (plan.id, stream)) {
            let layout = self.pool.core().layout();
            let mut arrays = AppendPlan::new(plan, layout.rule.group());
            if let Some(shape) = &self.shape {
                // A seal without a page is skipped.
                let most = shape.seals(&layout.rule);
                let skipped = [-1, -1, layout.rule.group() as i32, 0];
                arrays.seals.extend(skipped.repeat(most - arrays.count()));
            }
            if self.pool.checks() {
                check::append(&arrays, plan.tokens, layout)?;
            }
            let words = [Array::new("slot_of_row", &arrays.slot_of_row), Array::new("seals", &arrays.seals)];
            let now = (plan.id, stream);
            if let Some(sent) = sent {
                [sent.slot_of_row, sent.seals] = sent.buffer.send(stream, words)?;
                sent.sent = now;
            } else {
                let lengths = [arrays.slot_of_row.len(), arrays.seals.len()];
                let mut buffer = self.pool.buffers().take(&lengths)?;
                let [slot_of_row, seals] = buffer.send(stream, words)?;
                *sent = Some(SentAppend { sent: now, buffer, slot_of_row, seals, count: arrays.count() });
            }
        }
        let sent = sent.as_mut().expect("sent above");
        if !recording {
            sent.buffer.read_by(stream)?;
            sent.buffer.verify(stream)?;
        }
        Ok(sent)
    }

    /// An attention's arrays on the device: sent once for all layers that attend alike.
    pub(super) fn sent_attend<'a>(
        &self,
        sent: &'a mut Vec<SentAttend>,
        at: &Layer,
        geometry: AttendGeometry,
        key: AttendKey,
        stream: Stream,
        recording: bool,
    ) -> Result<&'a mut SentAttend, Error> {
        let same = |sent: &SentAttend| {
            sent.key == key
                && sent.head_dim == at.shape.head_dim
                && (self.shape.is_some() || sent.sent.1 == stream)
        };
        let index = match sent.iter().position(same) {
            Some(index) => index,
            None if recording => return Err(not_warm("attend")),
            None => {
                sent.push(self.new_attend(at, geometry, key, stream)?);
                sent.len() - 1
            }
        };
        let sent = &mut sent[index];
        // What is recorded needs the addresses only: each replay sends its own arrays first.
        if !recording {
            self.send_attend(sent, stream)?;
        }
        Ok(sent)
    }

    /// Room on the device for an attention's arrays, and their sending.
    fn new_attend(
        &self,
        at: &Layer,
        geometry: AttendGeometry,
        key: AttendKey,
        stream: Stream,
    ) -> Result<SentAttend, Error> {
        let rule = &self.pool.core().layout().rule;
        let arrays = AttendPlan::new(self.open.plan(), rule, key);
        let (kv_heads, head_dim, columns) = (key.kv_heads, at.shape.head_dim, arrays.columns);
        let kernel = self.pool.device().kernel(&geometry.name(&at.config), &[size_of::<AttendParams>()])?;
        let shared = geometry.shared(&at.config, kernel.threads() as usize / 32);
        let resident = self.pool.resident(&kernel, shared)?;
        let most = self.shape.as_ref().map(|shape| shape.items(rule, key));
        let (item_count, parts) = most.map_or((arrays.count(), arrays.parts), |most| (most, most));
        let cost = Cost { record: at.config.layout().record_bytes as u64, token: 4 * head_dim as u64 };
        let grid = Grid { resident, room: None };
        let grid = self.shape.as_ref().map_or(grid, |shape| {
            let total = kv_heads as u64 * shape.cost(rule, key, cost);
            grid.with_room(total, shape.largest(rule, key, cost), cost)
        });
        let (shares, blocks) = launches(&arrays, kv_heads, grid, cost);
        let bytes = parts * part_bytes(kv_heads, columns, head_dim);
        let counters = parts * kv_heads;
        let workspace = match self.shape {
            None => self.pool.workspaces().take(stream, counters, bytes)?,
            Some(_) => Workspace::own(self.pool.device(), counters, bytes)?,
        };
        let mut buffer = self.pool.buffers().take(&[item_count * ITEM_WORDS, shares.len()])?;
        let [items, shares] = self.send_work(&mut buffer, &arrays, &shares, item_count, stream)?;
        let sent = (self.open.plan().id, stream);
        Ok(SentAttend {
            key,
            head_dim,
            kernel,
            shared,
            grid,
            cost,
            sent,
            buffer,
            items,
            shares,
            blocks,
            item_count,
            columns,
            parts,
            workspace,
        })
    }

    /// Sends this step's arrays to the room of others, unless they are there.
    pub(super) fn send_attend(&self, sent: &mut SentAttend, stream: Stream) -> Result<(), Error> {
        let now = (self.open.plan().id, stream);
        if sent.sent != now {
            let arrays = AttendPlan::new(self.open.plan(), &self.pool.core().layout().rule, sent.key);
            let (shares, _) = launches(&arrays, sent.key.kv_heads, sent.grid, sent.cost);
            self.send_work(&mut sent.buffer, &arrays, &shares, sent.item_count, stream)?;
            sent.sent = now;
        }
        sent.buffer.read_by(stream)?;
        sent.buffer.verify(stream)
    }

    fn send_work(
        &self,
        buffer: &mut StepBuffer,
        arrays: &AttendPlan,
        shares: &[i32],
        room: usize,
        stream: Stream,
    ) -> Result<[Words; 2], Error> {
        if arrays.count() > room {
            let fix = "make static arrays for longer sequences, or plan the step without";
            return Err(Error::TooLarge { what: "items of attention", got: arrays.count(), most: room, fix });
        }
        if self.pool.checks() {
            check::items(&arrays.items, self.pool.core().layout())?;
        }
        let items = Array::new("items", &arrays.items).with_room(room * ITEM_WORDS);
        buffer.send(stream, [items, Array::new("shares", shares)])
    }
}

fn not_warm(what: &'static str) -> Error {
    Error::Capturing {
        what,
        expected: "a call of the same kind before, which allocates what the graph needs",
        fix: "run the step's calls once without a capture, with a step of the same static arrays",
    }
}
