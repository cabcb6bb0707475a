//! Checks of what callers pass to a step: the same on every backend, before anything is written or launched.

use std::ops::Range;

use super::{Layer, LayerShape, PoolError};
use crate::DType;
use crate::codec::SlotType;

/// Shape and element type of a caller's tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorShape {
    /// Extents.
    pub shape: [usize; 3],
    /// Element type.
    pub dtype: DType,
}

/// Checks the keys and values of an append: `[tokens, kv_heads, head_dim]`, one type, that of the slots.
pub fn check_rows(
    layer: &Layer,
    slot_type: SlotType,
    tokens: usize,
    k: TensorShape,
    v: TensorShape,
) -> Result<(), PoolError> {
    let LayerShape { kv_heads, head_dim } = layer.shape;
    for (what, tensor) in [("k", k), ("v", v)] {
        if tensor.shape != [tokens, kv_heads, head_dim] {
            let expected = format!("[{tokens}, {kv_heads}, {head_dim}] (sum of counts, kv_heads, head_dim)");
            let fix = "pass the rows of all sequences of the step";
            return Err(PoolError::shape(what, &tensor.shape, expected, fix));
        }
        if tensor.dtype.slot_type() != slot_type {
            let (expected, fix) = match slot_type {
                SlotType::Float16 => ("float16 or bfloat16", "make the pool with dtype=\"float32\""),
                SlotType::Float32 => ("float32", "make the pool with dtype=\"float16\""),
            };
            return Err(PoolError::DType { what, got: tensor.dtype, expected, fix });
        }
    }
    if k.dtype != v.dtype {
        let (expected, fix) = (k.dtype.name(), "cast v to the type of k");
        return Err(PoolError::DType { what: "v", got: v.dtype, expected, fix });
    }
    Ok(())
}

/// Checks an expansion of the tokens from `first` on, of `stored` ones, to outputs `[count, kv_heads, head_dim]`, and
/// returns their range.
pub fn check_expand(
    layer: &Layer,
    stored: usize,
    first: usize,
    k: [usize; 3],
    v: [usize; 3],
) -> Result<Range<usize>, PoolError> {
    let LayerShape { kv_heads, head_dim } = layer.shape;
    let count = k[0];
    for (what, shape) in [("k", k), ("v", v)] {
        if shape != [count, kv_heads, head_dim] {
            let expected = format!("[{count}, {kv_heads}, {head_dim}] (count, kv_heads, head_dim)");
            return Err(PoolError::shape(
                what,
                &shape,
                expected,
                "allocate both outputs for the same tokens",
            ));
        }
    }
    match first.checked_add(count) {
        Some(end) if end <= stored => Ok(first..end),
        _ => Err(PoolError::Value {
            what: "tokens",
            got: format!("{first} and the {count} from there"),
            expected: format!("some of the {stored} that are stored"),
            fix: "pass a smaller first or count",
        }),
    }
}

/// How to attend.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttendOptions {
    /// Factor of the logits; `None`: 1 / sqrt(head dim).
    pub scale: Option<f32>,
    /// Sliding window: the query at position `i` sees key `j` if `i - j < window` (sinks too).
    pub window: Option<usize>,
    /// Logits become `softcap · tanh(logit / softcap)`.
    pub softcap: Option<f32>,
    /// `q` comes rotated and the output stays so.
    pub rotated: bool,
}

/// Checked options, with what follows from the shapes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttendSettings {
    /// Factor of the logits.
    pub scale: f32,
    /// Window, `usize::MAX` for none.
    pub window: usize,
    /// Soft cap.
    pub softcap: Option<f32>,
    /// Whether queries and outputs are in the rotated frame.
    pub rotated: bool,
    /// Query heads per KV head.
    pub group: usize,
}

/// Checks a call of attend: `q` and `out` `[tokens, heads, head_dim]`, `lse` of `tokens · heads`, `sink_logits` of `heads`
/// elements.
pub fn check_attend(
    layer: &Layer,
    tokens: usize,
    q: [usize; 3],
    out: [usize; 3],
    lse: Option<usize>,
    sink_logits: Option<usize>,
    options: &AttendOptions,
) -> Result<AttendSettings, PoolError> {
    let LayerShape { kv_heads, head_dim } = layer.shape;
    let [rows, heads, _] = q;
    if rows != tokens || heads == 0 || !heads.is_multiple_of(kv_heads) || q[2] != head_dim {
        let expected =
            format!("[{tokens}, a multiple of {kv_heads}, {head_dim}] (sum of counts, heads, head_dim)");
        return Err(PoolError::shape("q", &q, expected, "pass the queries of all sequences of the step"));
    }
    if out != q {
        return Err(PoolError::shape("out", &out, format!("{q:?}, as q"), "allocate the output like q"));
    }
    if let Some(lse) = lse
        && lse != rows * heads
    {
        let expected = format!("[{rows}, {heads}] (sum of counts, heads)");
        return Err(PoolError::shape("lse", &[lse], expected, "allocate float32 [sum of counts, heads]"));
    }
    if let Some(logits) = sink_logits
        && logits != heads
    {
        let expected = format!("[{heads}] (heads)");
        return Err(PoolError::shape("sink_logits", &[logits], expected, "one logit per query head"));
    }
    let value = |what, got: f32, expected: &str, fix| {
        Err(PoolError::Value { what, got: got.to_string(), expected: expected.into(), fix })
    };
    let scale = options.scale.unwrap_or((1.0 / (head_dim as f64).sqrt()) as f32);
    if !scale.is_finite() {
        return value("scale", scale, "a finite number", "leave it out for 1/sqrt(head_dim)");
    }
    if let Some(softcap) = options.softcap
        && !(softcap.is_finite() && softcap > 0.0)
    {
        return value("softcap", softcap, "a positive number", "leave it out for none");
    }
    if options.window == Some(0) {
        return value("window", 0.0, "1 or more tokens", "leave it out for none");
    }
    Ok(AttendSettings {
        scale,
        window: options.window.unwrap_or(usize::MAX),
        softcap: options.softcap,
        rotated: options.rotated,
        group: heads / kv_heads,
    })
}
