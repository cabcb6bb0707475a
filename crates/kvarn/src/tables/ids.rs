//! Reference counted physical ids: the pages, or the slots, of a pool.

use std::collections::BTreeSet;

use super::published::Published;

/// Ids `0 .. total`, each free or held by a number of references.
///
/// The lowest free id is handed out first: allocation is deterministic and the touched part of a
/// pool stays as small as its use. The fields are a function of the references and publications alone
/// (the vector ends at the highest used id), so taking ids and giving them back restores an equal value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ids {
    total: usize,
    references: Vec<u32>,
    /// Ids below `references.len()` without a reference.
    free: BTreeSet<usize>,
    /// Ids that published tiles hold, by one reference each.
    published: Published,
}

impl Ids {
    pub(super) fn new(total: usize) -> Self {
        Self { total, references: Vec::new(), free: BTreeSet::new(), published: Published::default() }
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    pub(super) fn used(&self) -> usize {
        self.references.len() - self.free.len()
    }

    pub(super) fn unused(&self) -> usize {
        self.total - self.used()
    }

    /// Ids that are free, or can be made so by giving up what is published.
    pub(super) fn available(&self) -> usize {
        self.unused() + self.cached()
    }

    /// Published ids.
    pub(super) fn published(&self) -> usize {
        self.published.len()
    }

    /// Published ids that have no other reference.
    pub(super) fn cached(&self) -> usize {
        self.published.idle()
    }

    /// Of these, the one to give up first.
    pub(super) fn first_cached(&self) -> Option<usize> {
        self.published.first_idle()
    }

    /// Takes a reference for a published tile to an id that is held.
    pub(super) fn publish(&mut self, id: usize, rank: u64) {
        self.retain(id);
        self.published.rank(id, rank);
    }

    /// Changes when a published id is given up.
    pub(super) fn rank(&mut self, id: usize, rank: u64) {
        self.published.rank(id, rank);
    }

    /// Gives back the reference of a published tile.
    pub(super) fn unpublish(&mut self, id: usize) {
        self.published.remove(id);
        self.release(id);
    }

    /// Takes the lowest free id, with one reference. The caller has checked [`Ids::unused`].
    pub(super) fn allocate(&mut self) -> usize {
        if let Some(id) = self.free.pop_first() {
            self.references[id] = 1;
            return id;
        }
        let id = self.references.len();
        assert!(id < self.total, "allocated beyond the {} ids that were checked", self.total);
        self.references.push(1);
        id
    }

    /// Takes one more reference to an id that is held.
    pub(super) fn retain(&mut self, id: usize) {
        assert!(self.references[id] > 0, "id {id} taken while it is free");
        self.references[id] += 1;
        if self.references[id] == 2 {
            self.published.taken(id);
        }
    }

    /// Whether more than one reference is held.
    pub(super) fn is_shared(&self, id: usize) -> bool {
        self.references[id] > 1
    }

    /// Gives back one reference; the id is free when the last one is gone.
    pub(super) fn release(&mut self, id: usize) {
        assert!(self.references[id] > 0, "id {id} released more often than it was held");
        self.references[id] -= 1;
        if self.references[id] == 1 {
            self.published.left(id);
        }
        if self.references[id] > 0 {
            return;
        }
        self.free.insert(id);
        while self.references.last() == Some(&0) {
            self.references.pop();
            self.free.remove(&self.references.len());
        }
    }

    /// References held; 0 for a free id.
    pub(super) fn references(&self, id: usize) -> u32 {
        self.references.get(id).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_free_id_first() {
        let mut ids = Ids::new(4);
        assert_eq!([ids.allocate(), ids.allocate(), ids.allocate()], [0, 1, 2]);
        ids.release(1);
        ids.release(0);
        assert_eq!((ids.used(), ids.unused()), (1, 3));
        assert_eq!([ids.allocate(), ids.allocate(), ids.allocate()], [0, 1, 3]);
        assert_eq!((ids.used(), ids.unused()), (4, 0));
    }

    #[test]
    fn giving_back_restores_an_equal_value_in_any_order() {
        let mut ids = Ids::new(8);
        let kept = ids.allocate();
        let before = ids.clone();
        let taken: Vec<usize> = (0..5).map(|_| ids.allocate()).collect();
        assert_ne!(ids, before);
        for i in [2, 0, 4, 1, 3] {
            ids.release(taken[i]);
        }
        assert_eq!(ids, before);
        ids.release(kept);
        assert_eq!(ids, Ids::new(8));
    }

    #[test]
    fn a_pool_far_larger_than_its_use_costs_nothing() {
        let mut ids = Ids::new(usize::MAX);
        assert_eq!(ids.allocate(), 0);
        assert_eq!(ids.unused(), usize::MAX - 1);
    }

    #[test]
    fn an_id_is_free_when_its_last_reference_is_given_back() {
        let mut ids = Ids::new(2);
        let id = ids.allocate();
        assert!(!ids.is_shared(id));
        ids.retain(id);
        assert!(ids.is_shared(id));
        ids.release(id);
        assert_eq!((ids.used(), ids.is_shared(id)), (1, false));
        ids.release(id);
        assert_eq!(ids, Ids::new(2));
    }

    #[test]
    fn what_only_a_publication_holds_is_available_by_rank() {
        let mut ids = Ids::new(4);
        let taken = [ids.allocate(), ids.allocate(), ids.allocate()];
        for (id, rank) in taken.into_iter().zip([7, 3, 5]) {
            ids.publish(id, rank);
        }
        assert_eq!((ids.published(), ids.cached(), ids.available()), (3, 0, 1));
        for id in taken {
            ids.release(id);
        }
        assert_eq!((ids.used(), ids.unused(), ids.cached(), ids.available()), (3, 1, 3, 4));
        assert_eq!(ids.first_cached(), Some(1));
        ids.retain(1);
        assert_eq!((ids.first_cached(), ids.available()), (Some(2), 3));
        ids.rank(1, 1);
        assert_eq!(ids.first_cached(), Some(2), "an id in use stays out of the order");
        ids.release(1);
        assert_eq!(ids.first_cached(), Some(1));
        ids.rank(1, 9);
        for expected in [2, 0, 1] {
            let id = ids.first_cached().unwrap();
            assert_eq!(id, expected);
            ids.unpublish(id);
        }
        assert_eq!(ids, Ids::new(4));
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn a_second_release_is_caught() {
        let mut ids = Ids::new(2);
        let low = ids.allocate();
        ids.allocate();
        ids.release(low);
        ids.release(low);
    }

    #[test]
    #[should_panic(expected = "allocated beyond")]
    fn an_unchecked_allocation_is_caught() {
        Ids::new(0).allocate();
    }
}
