//! References to what a sequence stores while it is copied out of the pool or into it, and sequences that are offloaded.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::pool::{Sequence, release_missing};
use super::{Lengths, SequenceId, SequenceView, TableError, Tables};

/// What a backend keeps of an offloaded sequence, on the host.
#[derive(Clone)]
pub struct HostImage(pub Arc<dyn Any + Send + Sync>);

impl PartialEq for HostImage {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for HostImage {}

impl fmt::Debug for HostImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HostImage")
    }
}

impl Tables {
    /// Whether a sequence is offloaded: it has lengths, but no pages and slots.
    pub fn is_offloaded(&self, id: SequenceId) -> Result<bool, TableError> {
        Ok(self.sequence(id)?.offloaded.is_some())
    }

    /// What a sequence in the pool stores, outside open steps.
    pub fn idle_view(&self, id: SequenceId) -> Result<&SequenceView, TableError> {
        self.idle(id).map(|sequence| &sequence.view)
    }

    /// What a sequence in the pool stores; what was stored before, if it is in an open step.
    pub fn resident_view(&self, id: SequenceId) -> Result<&SequenceView, TableError> {
        let sequence = self.sequence(id)?;
        match sequence.offloaded {
            Some(_) => Err(TableError::OffloadedSequence { sequence: id }),
            None => Ok(&sequence.view),
        }
    }

    /// Lengths of every offloaded sequence.
    pub fn offloaded_lengths(&self) -> impl Iterator<Item = Lengths> + '_ {
        let offloaded = self.sequences.values().filter(|sequence| sequence.offloaded.is_some());
        offloaded.map(|sequence| (&sequence.view).into())
    }

    /// What an offloaded sequence is, and its image.
    pub fn offloaded(&self, id: SequenceId) -> Result<(Lengths, &HostImage), TableError> {
        let sequence = self.sequence(id)?;
        let image = sequence.offloaded.as_ref().ok_or(TableError::ResidentSequence { sequence: id })?;
        Ok(((&sequence.view).into(), image))
    }

    /// One more reference to each page and slot of a sequence, for [`release`](Self::release) to give back. Nothing
    /// writes to them until then.
    pub fn hold(&mut self, id: SequenceId) -> Result<SequenceView, TableError> {
        let view = self.idle(id)?.view.clone();
        self.retain(&view);
        Ok(view)
    }

    /// Gives back one reference to each page and slot of a view.
    pub fn release(&mut self, view: &SequenceView) {
        let nothing = Arc::default();
        release_missing(&mut self.pages, &view.block_table, &nothing);
        release_missing(&mut self.slots, &view.slot_table, &nothing);
    }

    /// The sequence is what `image` holds from now on. Its references to pages and slots pass to the caller, for
    /// [`release`](Self::release).
    pub fn offload(&mut self, id: SequenceId, image: HostImage) -> Result<SequenceView, TableError> {
        self.idle(id)?;
        let sequence = self.existing(id);
        sequence.offloaded = Some(image);
        let nowhere = Arc::new(vec![-1; sequence.view.block_table.len()]);
        let away =
            SequenceView { block_table: Arc::clone(&nowhere), slot_table: nowhere, ..sequence.view.clone() };
        Ok(std::mem::replace(&mut sequence.view, away))
    }

    /// Takes the pages and slots of a sequence with these lengths, which are possible. Its references are the caller's:
    /// for [`adopt`](Self::adopt), [`restore`](Self::restore) or [`release`](Self::release).
    pub fn allocate(&mut self, lengths: &Lengths) -> Result<SequenceView, TableError> {
        let rule = self.rule;
        let (pages_needed, slots_needed) = (lengths.pages(&rule), lengths.slots(&rule));
        let (pages_free, slots_free) = (self.pages.available(), self.slots.available());
        if pages_needed > pages_free || slots_needed > slots_free {
            return Err(TableError::ImageCapacity {
                length: lengths.length,
                pages_needed,
                pages_free,
                slots_needed,
                slots_free,
                pages: self.pages.total(),
                slots: self.slots.total(),
            });
        }
        self.make_room(pages_needed, slots_needed);
        let tiles = rule.tiles(lengths.length);
        let mut table = |page: bool| {
            let (ids, has): (_, fn(&Lengths, &_, _) -> bool) = if page {
                (&mut self.pages, Lengths::has_page)
            } else {
                (&mut self.slots, Lengths::has_slot)
            };
            let entry = |tile| if has(lengths, &rule, tile) { ids.allocate() as i32 } else { -1 };
            Arc::new((0..tiles).map(entry).collect())
        };
        Ok(SequenceView {
            length: lengths.length,
            committed: lengths.committed,
            sealed: lengths.sealed,
            block_table: table(true),
            slot_table: table(false),
        })
    }

    /// A new sequence that stores what `view` says; the references of [`allocate`](Self::allocate) are its own.
    pub fn adopt(&mut self, view: SequenceView) -> SequenceId {
        let id = self.create();
        *self.existing(id) = Sequence { view, ..Sequence::default() };
        id
    }

    /// An offloaded sequence is in the pool again, where `view` says; the references of [`allocate`](Self::allocate) are its
    /// own. Returns the image.
    ///
    /// # Panics
    /// If the view was allocated for other lengths.
    pub fn restore(&mut self, id: SequenceId, view: SequenceView) -> Result<HostImage, TableError> {
        let (lengths, _) = self.offloaded(id)?;
        assert_eq!(lengths, (&view).into(), "a view allocated for the sequence");
        let sequence = self.existing(id);
        sequence.view = view;
        Ok(sequence.offloaded.take().expect("an offloaded sequence has an image"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::SealRule;

    fn tables(pages: usize, slots: usize) -> Tables {
        Tables::new(SealRule::new(8, 3, 0).unwrap(), pages, slots).unwrap()
    }

    fn appended(tables: &mut Tables, count: usize, hold: usize) -> SequenceId {
        let id = tables.create();
        let plan = tables.plan_step(&[id], &[count], &[hold]).unwrap();
        tables.finish(plan.id).unwrap();
        id
    }

    fn image() -> HostImage {
        HostImage(Arc::new(()))
    }

    #[test]
    fn an_offloaded_sequence_has_lengths_and_nothing_else() {
        let mut tables = tables(8, 8);
        let id = appended(&mut tables, 29, 7);
        let before = tables.view(id).unwrap().clone();
        let held = tables.offload(id, image()).unwrap();
        assert_eq!(held, before);
        assert_eq!((tables.stats().pages.used, tables.stats().slots.used), (2, 3));
        tables.release(&held);
        assert_eq!((tables.stats().pages.used, tables.stats().slots.used), (0, 0));
        let view = tables.view(id).unwrap().clone();
        assert_eq!((view.length, view.committed, view.sealed), (29, 22, 2));
        assert_eq!((&*view.block_table, &*view.slot_table), (&vec![-1; 4], &vec![-1; 4]));
        let error = TableError::OffloadedSequence { sequence: id };
        assert_eq!(tables.plan_step(&[id], &[1], &[0]).unwrap_err(), error);
        assert_eq!(tables.fork(id).unwrap_err(), error);
        assert_eq!(tables.truncate(id, 28).unwrap_err(), error);
        assert_eq!(tables.reorder(&[id], &[0]).unwrap_err(), error);
        assert_eq!(tables.offload(id, image()).unwrap_err(), error);
        assert_eq!(tables.hold(id).unwrap_err(), error);
        assert_eq!(tables.view(id).unwrap(), &view);

        let lengths = (&view).into();
        let view = tables.allocate(&lengths).unwrap();
        tables.restore(id, view).unwrap();
        assert_eq!(tables.view(id).unwrap(), &before);
        assert_eq!(tables.offloaded(id).unwrap_err(), TableError::ResidentSequence { sequence: id });
    }

    #[test]
    fn forks_keep_what_an_offloaded_one_gives_up() {
        let mut tables = tables(8, 8);
        let id = appended(&mut tables, 29, 0);
        let fork = tables.fork(id).unwrap();
        let held = tables.offload(id, image()).unwrap();
        tables.release(&held);
        assert_eq!(tables.view(fork).unwrap(), &held);
        assert_eq!((tables.stats().pages.used, tables.stats().slots.used), (3, 2));
        tables.free(id).unwrap();
        tables.free(fork).unwrap();
        assert_eq!((tables.stats().pages.used, tables.stats().slots.used), (0, 0));
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut tables = tables(2, 8);
        let lengths = Lengths { length: 29, committed: 29, sealed: 3 };
        let before = tables.stats();
        assert_eq!(
            tables.allocate(&lengths).unwrap_err().to_string(),
            "29 tokens of a saved or offloaded sequence, which need 3 pages with 2 free and 2 slots with 8 free: expected \
             them to fit the pool of 2 pages and 8 slots; free or offload other sequences, or make the pool larger"
        );
        assert_eq!(tables.stats(), before);
    }

    #[test]
    fn what_is_held_outlives_its_sequence() {
        let mut tables = tables(8, 8);
        let id = appended(&mut tables, 29, 0);
        let held = tables.hold(id).unwrap();
        tables.free(id).unwrap();
        assert_eq!((tables.stats().pages.used, tables.stats().slots.used), (3, 2));
        tables.release(&held);
        assert_eq!((tables.stats().pages.used, tables.stats().slots.used), (0, 0));
    }
}
