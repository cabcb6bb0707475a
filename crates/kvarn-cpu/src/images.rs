//! Sequences out of the pool and into it: saved, loaded, offloaded, restored.

use std::io::Read;
use std::sync::Arc;

use kvarn::pool::{Piece, PoolError, PoolMemory, Whereabouts, read_sequence, sequence_header};
use kvarn::tables::{HostImage, SequenceId, SequenceView};

use crate::{Error, Pool};

/// A saved sequence: its bytes in a file are the header, then the image.
#[derive(Clone, Debug)]
pub struct SavedSequence {
    /// The header.
    pub header: Vec<u8>,
    /// The image.
    pub image: Arc<Vec<u8>>,
}

impl Pool {
    /// A sequence as it is saved, held tokens included; nothing is changed, nor committed. One that is offloaded is saved from
    /// where it is. Refused in an open step.
    ///
    /// Other calls may run meanwhile. A step of the sequence itself then copies the slot of its last tile if that is not full,
    /// and takes one slot more.
    pub fn save(&self, sequence: SequenceId) -> Result<SavedSequence, Error> {
        let (lengths, image) = match self.core().whereabouts(sequence)? {
            Whereabouts::Pool(snapshot) => (snapshot.view().into(), Arc::new(self.gather(snapshot.view())?)),
            Whereabouts::Host(lengths, image) => (lengths, bytes_of(&image)),
        };
        Ok(SavedSequence { header: sequence_header(self.layout(), &lengths, &image), image })
    }

    /// A new sequence from what [`save`](Self::save) gave, of a pool of the same layers and configuration, on any device.
    /// All or nothing.
    pub fn load(&self, input: &mut impl Read) -> Result<SequenceId, Error> {
        let (lengths, image) = read_sequence(input, self.layout())?;
        self.core().load(&lengths, |view| {
            self.scatter(view, &image);
            Ok(())
        })
    }

    /// Moves a sequence to memory of its own and gives back its pages and slots. Refused in an open step.
    pub fn offload(&self, sequence: SequenceId) -> Result<(), Error> {
        let copy = |view: &SequenceView| Ok::<_, Error>(HostImage(Arc::new(self.gather(view)?)));
        self.core().offload(sequence, copy).map(drop)
    }

    /// Brings an offloaded sequence back. All or nothing.
    pub fn restore(&self, sequence: SequenceId) -> Result<(), Error> {
        let fill = |view: &SequenceView, image: &HostImage| {
            self.scatter(view, &bytes_of(image));
            Ok::<_, PoolError>(())
        };
        self.core().restore(sequence, fill).map(drop).map_err(Error::from)
    }

    /// The image of what a view says is stored; nobody writes to it meanwhile.
    fn gather(&self, view: &SequenceView) -> Result<Vec<u8>, Error> {
        let size = self.layout().image_size(&view.into()).expect("what is stored has a size").bytes();
        let mut image = Vec::new();
        image.try_reserve_exact(size).map_err(|_| Error::Image { bytes: size })?;
        image.resize(size, 0);
        for piece in self.layout().pieces(view) {
            let to = &mut image[piece.image_at..piece.image_at + piece.bytes];
            // SAFETY: as many bytes of the pool's mapping as `at` checks, and as the slice has; they are stored tokens, which
            // nobody writes.
            unsafe { std::ptr::copy_nonoverlapping(self.at(&piece), to.as_mut_ptr(), piece.bytes) };
        }
        Ok(image)
    }

    /// Writes an image to pages and slots that were taken for it.
    fn scatter(&self, view: &SequenceView, image: &[u8]) {
        for piece in self.layout().pieces(view) {
            let from = &image[piece.image_at..piece.image_at + piece.bytes];
            // SAFETY: as in `gather`; pages and slots are the caller's alone.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at(&piece), piece.bytes) };
        }
    }

    fn at(&self, piece: &Piece) -> *mut u8 {
        match piece.memory {
            PoolMemory::Pages => self.page_memory().at(piece.at, piece.bytes),
            PoolMemory::Slots => self.slot_memory().at(piece.at, piece.bytes),
        }
    }
}

fn bytes_of(image: &HostImage) -> Arc<Vec<u8>> {
    Arc::clone(&image.0).downcast().expect("an image of this backend")
}
