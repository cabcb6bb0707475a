//! Options of an attention call.

use crate::Error;
use crate::error::shape;

/// How to attend.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttendOptions<'a> {
    /// Factor of the logits; `None`: 1 / sqrt(head dim).
    pub scale: Option<f32>,
    /// Sliding window: the query at position `i` sees key `j` if `i - j < window` (sinks too).
    pub window: Option<usize>,
    /// Logits become `softcap · tanh(logit / softcap)`.
    pub softcap: Option<f32>,
    /// One logit per query head that takes part in the softmax and has no value, `[heads]`.
    pub sink_logits: Option<&'a [f32]>,
    /// `q` comes rotated and the output stays so.
    pub rotated: bool,
}

/// Checked options.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checked<'a> {
    pub scale: f32,
    pub window: usize,
    pub softcap: Option<f32>,
    pub sink_logits: Option<&'a [f32]>,
    pub rotated: bool,
}

impl<'a> AttendOptions<'a> {
    pub(super) fn check(&self, heads: usize, head_dim: usize) -> Result<Checked<'a>, Error> {
        let value = |what, got: f32, expected: &str, fix| {
            Err(Error::Value { what, got: got.to_string(), expected: expected.into(), fix })
        };
        let scale = self.scale.unwrap_or((1.0 / (head_dim as f64).sqrt()) as f32);
        if !scale.is_finite() {
            return value("scale", scale, "a finite number", "leave it out for 1/sqrt(head_dim)");
        }
        if let Some(softcap) = self.softcap
            && !(softcap.is_finite() && softcap > 0.0)
        {
            return value("softcap", softcap, "a positive number", "leave it out for none");
        }
        if self.window == Some(0) {
            return value("window", 0.0, "1 or more tokens", "leave it out for none");
        }
        if let Some(logits) = self.sink_logits
            && logits.len() != heads
        {
            return Err(shape(
                "sink_logits",
                &[logits.len()],
                format!("[{heads}] (heads)"),
                "one logit per query head",
            ));
        }
        Ok(Checked {
            scale,
            window: self.window.unwrap_or(usize::MAX),
            softcap: self.softcap,
            sink_logits: self.sink_logits,
            rotated: self.rotated,
        })
    }
}
