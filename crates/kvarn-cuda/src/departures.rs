//! Pages and slots of offloaded sequences: given back once they are copied, and not before.

use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;
use kvarn::pool::Snapshot;

use crate::capture::Relaxed;
use crate::driver::Answer;
use crate::staging::Event;
use crate::{Device, Error, Stream};

/// What is being copied out of a pool.
#[derive(Debug)]
pub(crate) struct Departures {
    device: &'static Device,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    leaving: Vec<(Event, Snapshot)>,
    spare: Vec<Event>,
}

impl Departures {
    pub(crate) fn new(device: &'static Device) -> Self {
        Self { device, state: Mutex::default() }
    }

    /// Keeps `snapshot` until what was given to `stream` so far is done.
    pub(crate) fn add(&self, stream: Stream, snapshot: Snapshot) -> Result<(), Error> {
        let _current = self.device.enter()?;
        let mut state = self.state();
        let noted = state
            .spare
            .pop()
            .map_or_else(Event::new, Ok)
            .and_then(|event| event.record(stream).map(|()| event));
        let noted = self.device.told(noted).inspect_err(|_| {
            // Without an event the stream itself is waited for, before the snapshot is dropped. A device that refuses is lost.
            // SAFETY: the caller's stream, of the current context.
            let _ = unsafe { sys::cuStreamSynchronize(stream.raw()) };
        })?;
        state.leaving.push((noted, snapshot));
        Ok(())
    }

    /// Gives back what is copied by now.
    pub(crate) fn settle(&self) -> Result<(), Error> {
        self.settle_if(Event::has_happened)
    }

    /// Waits until all is copied, and gives it back. Returns whether there was any.
    pub(crate) fn wait(&self) -> Result<bool, Error> {
        if self.state().leaving.is_empty() {
            return Ok(false);
        }
        self.settle_if(|event| event.wait().map(|()| true))?;
        Ok(true)
    }

    fn settle_if(&self, done: impl Fn(&Event) -> Answer<bool>) -> Result<(), Error> {
        let mut state = self.state();
        if state.leaving.is_empty() {
            return Ok(());
        }
        let _current = self.device.enter()?;
        let _relaxed = self.device.told(Relaxed::enter())?;
        let (mut gone, mut answer, mut index) = (Vec::new(), Ok(()), 0);
        while index < state.leaving.len() {
            match done(&state.leaving[index].0) {
                Ok(true) => {
                    let (event, snapshot) = state.leaving.swap_remove(index);
                    state.spare.push(event);
                    gone.push(snapshot);
                }
                Ok(false) => index += 1,
                Err(failure) => {
                    answer = Err(failure);
                    break;
                }
            }
        }
        // A snapshot takes the lock of the tables when it goes.
        drop(state);
        drop(gone);
        self.device.told(answer)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Departures {
    fn drop(&mut self) {
        let State { leaving, spare } =
            mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        let events =
            leaving.iter().map(|(event, _)| event).chain(&spare).map(Event::held).collect::<Vec<_>>();
        if !events.is_empty() {
            self.device.release(events);
        }
    }
}
