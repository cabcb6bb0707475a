//! Sequences out of the pool and into it: saved, loaded, offloaded, restored.

use std::io::Read;
use std::sync::Arc;

use kvarn::pool::{PoolError, PoolMemory, Whereabouts, read_sequence, sequence_header};
use kvarn::tables::{HostImage, SequenceId, SequenceView, TableErrorKind};

use crate::pinned::{PinnedImage, Place};
use crate::{Error, Pool, Stream};

/// A saved sequence: its bytes in a file are the header, then the image.
#[derive(Debug)]
pub struct SavedSequence {
    /// The header.
    pub header: Vec<u8>,
    /// The image.
    pub image: Arc<PinnedImage>,
}

impl Pool {
    /// A sequence as it is saved, held tokens included; nothing is changed, nor committed. One that is offloaded is saved from
    /// where it is. Refused in an open step.
    ///
    /// The copy comes after what `stream` was given before, and is waited for. Other calls may run meanwhile; a step of the
    /// sequence itself then takes one slot more, for a copy of its last one if that is not full.
    pub fn save(&self, sequence: SequenceId, stream: Stream) -> Result<SavedSequence, Error> {
        self.pinned().check(stream)?;
        let (lengths, image) = match self.core().whereabouts(sequence)? {
            Whereabouts::Pool(snapshot) => {
                let image = self.gather(snapshot.view(), stream)?;
                // The snapshot goes when the copy is done.
                image.bytes()?;
                (snapshot.view().into(), Arc::new(image))
            }
            Whereabouts::Host(lengths, image) => (lengths, pinned(&image)),
        };
        let header = sequence_header(self.core().layout(), &lengths, image.bytes()?);
        Ok(SavedSequence { header, image })
    }

    /// A new sequence from what [`save`](Self::save) gave, of a pool of the same layers and configuration, on any device.
    /// All or nothing. It can be used by work given to `stream` afterwards.
    pub fn load(&self, input: &mut impl Read, stream: Stream) -> Result<SequenceId, Error> {
        self.pinned().check(stream)?;
        let (lengths, bytes) = read_sequence(input, self.core().layout()).map_err(PoolError::from)?;
        let mut image = self.pinned().take(bytes.len())?;
        image.fill(&bytes);
        drop(bytes);
        self.with_room(|| self.core().load(&lengths, |view| self.scatter(view, &image, stream)))
    }

    /// Moves a sequence to pinned host memory. Refused in an open step.
    ///
    /// `stream` copies, after what it was given before, and the host does not wait. Pages and slots are taken again once they
    /// are copied: whoever needs them earlier waits.
    pub fn offload(&self, sequence: SequenceId, stream: Stream) -> Result<(), Error> {
        self.pinned().check(stream)?;
        self.settle()?;
        let snapshot = self.core().offload(sequence, |view| {
            let image = self.gather(view, stream)?;
            Ok::<_, Error>(HostImage(Arc::new(image)))
        })?;
        self.departures().add(stream, snapshot)
    }

    /// Brings an offloaded sequence back. All or nothing. It can be used by work given to `stream` afterwards; the host does
    /// not wait.
    pub fn restore(&self, sequence: SequenceId, stream: Stream) -> Result<(), Error> {
        self.pinned().check(stream)?;
        let fill = |view: &SequenceView, image: &HostImage| self.scatter(view, &pinned(image), stream);
        self.with_room(|| self.core().restore(sequence, fill)).map(drop)
    }

    /// Gives back the pages and slots of offloaded sequences that are copied by now.
    pub fn settle(&self) -> Result<(), Error> {
        self.departures().settle()
    }

    /// Runs `work`, which takes pages or slots; again, if there were too few and some are on their way out.
    pub(crate) fn with_room<R>(&self, work: impl Fn() -> Result<R, Error>) -> Result<R, Error> {
        self.settle()?;
        match work() {
            Err(Error::Pool(PoolError::Table(error)))
                if error.kind() == TableErrorKind::Capacity && self.departures().wait()? =>
            {
                work()
            }
            done => done,
        }
    }

    fn gather(&self, view: &SequenceView, stream: Stream) -> Result<PinnedImage, Error> {
        let size = self.core().layout().image_size(&view.into()).expect("what is stored has a size");
        let mut image = self.pinned().take(size.bytes())?;
        image.gather(stream, &self.places(view))?;
        Ok(image)
    }

    /// Writes an image to pages and slots that were taken for it.
    fn scatter(&self, view: &SequenceView, image: &PinnedImage, stream: Stream) -> Result<(), Error> {
        self.provide_for([view])?;
        image.scatter(stream, &self.places(view))
    }

    fn places(&self, view: &SequenceView) -> Vec<Place> {
        let [pages, slots] = self.addresses();
        let pieces = self.core().layout().pieces(view).into_iter();
        pieces
            .map(|piece| {
                let memory = match piece.memory {
                    PoolMemory::Pages => pages,
                    PoolMemory::Slots => slots,
                };
                Place { address: memory + piece.at as u64, at: piece.image_at, bytes: piece.bytes }
            })
            .collect()
    }
}

fn pinned(image: &HostImage) -> Arc<PinnedImage> {
    Arc::clone(&image.0).downcast().expect("an image of this backend")
}
