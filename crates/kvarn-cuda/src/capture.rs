//! Graph captures: whether a stream records, and calls that must not be taken for a part of one.

use cudarc::driver::sys::{self, CUstreamCaptureMode, CUstreamCaptureStatus};

use crate::Stream;
use crate::driver::{Answer, check};

/// What becomes of work given to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capture {
    /// It is done.
    Off,
    /// It is recorded into a graph.
    On,
    /// It would wait for a stream that records, which spoils the recording: this is the legacy stream.
    Beside,
}

/// Whether `stream` records into a graph. The context must be current.
pub(crate) fn capture(stream: Stream) -> Answer<Capture> {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: a live stream of the current context; `status` is writable.
    let result = unsafe { sys::cuStreamIsCapturing(stream.raw(), &raw mut status) };
    if result == sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT {
        return Ok(Capture::Beside);
    }
    check("cuStreamIsCapturing", result)?;
    Ok(if status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
        Capture::Off
    } else {
        Capture::On
    })
}

/// This thread's calls do not break a capture of another stream as long as this lives.
///
/// By default allocating while any thread captures is an error that spoils the capture.
#[derive(Debug)]
pub(crate) struct Relaxed(CUstreamCaptureMode);

impl Relaxed {
    /// Sets the mode.
    pub(crate) fn enter() -> Answer<Self> {
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: `mode` is writable and a valid mode.
        check("cuThreadExchangeStreamCaptureMode", unsafe {
            sys::cuThreadExchangeStreamCaptureMode(&raw mut mode)
        })?;
        Ok(Self(mode))
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: the mode that was set before.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.0) };
    }
}
