//! A step on a device.

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;
use kvarn::pool::{AttendOptions, Layer, OpenStep, PoolError, check_attend, check_rows};
use kvarn::tables::SlotCopy;

use crate::arrays::{Arrays, Lending, StepShape};
use crate::capture::{Capture, capture};
use crate::context::Current;
use crate::driver;
use crate::geometry::{self, AttendGeometry};
use crate::launch::launch_early;
use crate::params::{AppendParams, AttendParams, SHARE_WORDS};
use crate::plan::AttendKey;
use crate::pool::{SentTables, check_expand_on_device, check_type};
use crate::tensor::dtype_number;
use crate::workspace::most_parts;
use crate::{DeviceTensor, Error, Pool, Stream};

mod sent;

/// An open step. Dropped without a finish, it is abandoned: the pool is as before.
#[derive(Debug)]
pub struct Step {
    pool: Arc<Pool>,
    open: OpenStep,
    arrays: Arc<Arrays>,
    /// The shape of all steps that use the arrays, if they are static.
    shape: Option<StepShape>,
    /// Tables for expansion: place in the batch, whether after append, what was sent.
    tables: Mutex<Vec<(usize, bool, SentTables)>>,
}

impl Step {
    pub(crate) fn new(pool: Arc<Pool>, open: OpenStep, lending: Option<Lending<'_>>) -> Result<Self, Error> {
        let Some(lending) = lending else {
            return Ok(Self { pool, open, arrays: Arc::default(), shape: None, tables: Mutex::default() });
        };
        let (arrays, shape) = lending.to(open.plan().id);
        let too_large = |what, got: usize, most: usize| {
            let fix = "make static arrays for larger steps, or plan this one without";
            let (got, expected) = (format!("{got} with static arrays"), format!("at most {most}"));
            Err(PoolError::Value { what, got, expected, fix }.into())
        };
        let longest = open.plan().sequences.iter().map(|sequence| sequence.after.length).max().unwrap_or(0);
        if longest > shape.tokens {
            return too_large("tokens of a sequence", longest, shape.tokens);
        }
        let seals = open.plan().sequences.iter().map(|sequence| sequence.seals.len()).sum();
        let most = shape.seals(&pool.core().layout().rule);
        if seals > most {
            return too_large("tiles to seal", seals, most);
        }
        Ok(Self { pool, open, arrays, shape: Some(shape), tables: Mutex::default() })
    }

    /// Plan, progress, finish and abandon.
    pub const fn open(&self) -> &OpenStep {
        &self.open
    }

    /// The pool it belongs to.
    pub const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Stores the step's keys and values of one layer, `[tokens, kv_heads, head_dim]`, and seals the tiles that this step
    /// seals: one launch on `stream`. Once per layer.
    pub fn append(
        &self,
        layer: usize,
        k: &DeviceTensor,
        v: &DeviceTensor,
        rotated: bool,
        stream: Stream,
    ) -> Result<(), Error> {
        let plan = self.open.plan();
        let slot_type = self.pool.core().layout().slot_type;
        let current = self.pool.device().enter()?;
        let recording = self.recording(stream)?;
        let fits = |at: &Layer| {
            check_rows(at, slot_type, plan.tokens, k.description(), v.description())?;
            check_type("k", k, None, 16)?;
            check_type("v", v, Some(k.dtype()), 16)
        };
        let work = |at: &Layer| self.launch_append(&current, at, layer, k, v, rotated, stream, recording);
        if recording {
            self.open.record_append(layer, fits, work)
        } else {
            self.open.append(layer, fits, work)
        }
    }

    #[allow(clippy::too_many_arguments)] // one call, one launch
    fn launch_append(
        &self,
        current: &Current,
        at: &Layer,
        layer: usize,
        k: &DeviceTensor,
        v: &DeviceTensor,
        rotated: bool,
        stream: Stream,
        recording: bool,
    ) -> Result<(), Error> {
        let config = &at.config;
        let plan = self.open.plan();
        let mut sent = self.arrays.append();
        let sent = self.sent_append(&mut sent, stream, recording)?;
        // What is recorded is replayed by other steps, which copy other slots: `send` does.
        if !recording {
            self.copy_slots(current, at, stream)?;
        }
        let kv_heads = at.shape.kv_heads;
        let kernel = self.pool.append_kernel(layer);
        let vectors = kernel.threads() as usize / geometry::append_lanes(config.head_dim());
        let blocks = 2 * sent.count * kv_heads + (2 * plan.tokens * kv_heads).div_ceil(vectors);
        if blocks == 0 {
            return Ok(());
        }
        let shared =
            if sent.count > 0 { geometry::append_shared(config.head_dim(), config.group()) } else { 0 };
        let mut params = AppendParams {
            k: k.parameter(),
            v: v.parameter(),
            cache: self.pool.cache(at),
            slot_of_row: sent.slot_of_row.address,
            seals: sent.seals.address,
            counts: self.pool.counts_address(),
            rows: plan.tokens as i32,
            seals_count: sent.count as i32,
            dtype: dtype_number(k.dtype()),
            rotated: i32::from(rotated),
            refit: i32::from(config.refit()),
            iterations: config.iterations() as i32,
            key_bits: config.key_bits().get() as i32,
            value_bits: config.value_bits().get() as i32,
        };
        let parameters = &mut [ptr::from_mut(&mut params).cast::<c_void>()];
        let (grid, block) = ([blocks as u32, 1, 1], [kernel.threads(), 1, 1]);
        // SAFETY: the parameter is the kernel's (size checked, layout mirrored); the arrays are kept until the work has run
        // (`read_by`), the pool's memory as long as it exists; the tensors are as their maker promised.
        unsafe { launch_early(current, &kernel, grid, block, shared, stream, parameters) }
    }

    /// Copies the slots of one layer that the step would write to and that other sequences share.
    fn copy_slots(&self, _current: &Current, at: &Layer, stream: Stream) -> Result<(), Error> {
        let slots = self.pool.cache(at).slots;
        for SlotCopy { from, to } in self.open.plan().sequences.iter().filter_map(|sequence| sequence.copy) {
            let [from, to] = [from, to].map(|slot| slots + (slot * at.slot_bytes) as u64);
            // SAFETY: two slots of the pool's memory, provided when the step was planned, which do not overlap; the context
            // is current. The stream is the caller's, as is what it was given before.
            let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, at.slot_bytes, stream.raw()) };
            self.pool.device().told(driver::check("cuMemcpyDtoDAsync", result))?;
        }
        Ok(())
    }

    /// Whether `stream` records what it is given. The context must be current.
    fn recording(&self, stream: Stream) -> Result<bool, Error> {
        let refuse = |expected, fix| Err(Error::Capturing { what: "append or attend", expected, fix });
        match self.pool.device().told(capture(stream))? {
            Capture::Off => Ok(false),
            Capture::On if self.shape.is_some() => Ok(true),
            Capture::On => refuse(
                "a step with static arrays, which stay where the graph reads them",
                "make them with Pool.static_arrays and plan the step with Pool.step(…, arrays=…)",
            ),
            Capture::Beside => refuse(
                "no work on the default stream, which would wait for the stream that is captured",
                "use another stream",
            ),
        }
    }

    /// Attention of `q` `[tokens, heads, head_dim]` over what is stored, to `out` of the same shape and type, in one launch
    /// on `stream`. `sink_logits`, float32 `[heads]`, and `lse`, float32 `[tokens, heads]`, are device addresses with their
    /// lengths. Sequences with more query columns (new tokens times query heads per KV head) than `most_columns` are left
    /// out: their rows of `out` and `lse` are not written. Returns whether there are such.
    ///
    /// # Safety
    /// `sink_logits` and `lse` lie in memory of the pool's device until the work has run.
    #[allow(clippy::too_many_arguments)] // one call, one launch
    pub unsafe fn attend(
        &self,
        layer: usize,
        q: &DeviceTensor,
        options: &AttendOptions,
        sink_logits: Option<(u64, usize)>,
        out: &DeviceTensor,
        lse: Option<(u64, usize)>,
        most_columns: usize,
        stream: Stream,
    ) -> Result<bool, Error> {
        let plan = self.open.plan();
        let current = self.pool.device().enter()?;
        let recording = self.recording(stream)?;
        let work = |at: &Layer, appended| {
            let lengths = (lse.map(|(_, length)| length), sink_logits.map(|(_, length)| length));
            let settings =
                check_attend(at, plan.tokens, q.shape(), out.shape(), lengths.0, lengths.1, options)?;
            check_type("q", q, None, 2)?;
            check_type("out", out, Some(q.dtype()), 2)?;
            let most_tokens = most_columns / settings.group;
            let counts = || plan.sequences.iter().map(|sequence| sequence.count);
            let left_out = counts().any(|count| count > most_tokens);
            if recording && left_out {
                return Err(Error::Capturing {
                    what: "attend to a long chunk",
                    expected: "chunks that one kernel attends to, as more would read what no replay sends",
                    fix: "capture shorter steps",
                });
            }
            let most = counts().filter(|&count| count <= most_tokens).max().unwrap_or(0);
            if most == 0 {
                return Ok(left_out);
            }
            let geometry = AttendGeometry::new(&at.config, settings.group, settings.group * most);
            let geometry = geometry.ok_or_else(|| Error::Unsupported {
                what: "query heads per KV head",
                got: settings.group.to_string(),
                expected: "at most 16, at head dim 256 at most 8".into(),
            })?;
            let query_tokens = geometry.query_tokens(settings.group);
            let columns = query_tokens.min(most) * settings.group;
            let key = AttendKey {
                appended,
                kv_heads: at.shape.kv_heads,
                group: settings.group,
                query_tokens,
                window: settings.window,
                most_tokens,
                // A graph has the launches of its capture.
                most_parts: match self.shape {
                    None => most_parts(at.shape.kv_heads, columns, at.shape.head_dim),
                    Some(_) => usize::MAX,
                },
            };
            let mut sent = self.arrays.attend();
            let sent = self.sent_attend(&mut sent, at, geometry, key, stream, recording)?;
            let sinks = at.config.sink_tokens();
            let results = sent.workspace.results();
            let mut params = AttendParams {
                q: q.parameter(),
                out: out.parameter(),
                cache: self.pool.cache(at),
                items: sent.items.address,
                shares: sent.shares.address,
                sink_logits: sink_logits.map_or(0, |(address, _)| address),
                lse: lse.map_or(0, |(address, _)| address),
                partial_out: results,
                partial_base_sum: results + 4 * sent.outputs() as u64,
                counters: sent.workspace.counters(),
                dtype: dtype_number(q.dtype()),
                rotated: i32::from(settings.rotated),
                group: settings.group as i32,
                columns: sent.columns as i32,
                window: i32::try_from(settings.window).unwrap_or(i32::MAX),
                sink_tokens: if sinks < at.config.group() { sinks as i32 } else { 0 },
                scale: settings.scale,
                softcap: settings.softcap.unwrap_or(0.0),
            };
            let block = [sent.kernel.threads(), 1, 1];
            for &blocks in &sent.blocks {
                let grid = [blocks as u32, 1, 1];
                let parameters = &mut [ptr::from_mut(&mut params).cast::<c_void>()];
                // SAFETY: as in `launch_append`; the workspace is this stream's, whose launches run one after the other.
                unsafe {
                    launch_early(&current, &sent.kernel, grid, block, sent.shared, stream, parameters)
                }?;
                params.shares += (4 * SHARE_WORDS * blocks) as u64;
            }
            Ok(left_out)
        };
        if recording { self.open.record_read(layer, work) } else { self.open.read(layer, work) }
    }

    /// Sends the arrays of this step to where a graph reads them, which was captured with a step of the same static arrays and
    /// is given to `stream` next. Then [`replayed`](Self::replayed).
    pub fn send(&self, stream: Stream) -> Result<(), Error> {
        self.open.check_replay()?;
        let (mut append, mut attend) = (self.arrays.append(), self.arrays.attend());
        if self.shape.is_none() || append.is_none() {
            return Err(PoolError::Order(
                "a step without what a graph reads: expected one whose static arrays served a captured step; capture one, and \
                 plan this one with the same arrays"
                    .into(),
            )
            .into());
        }
        let current = self.pool.device().enter()?;
        self.sent_append(&mut append, stream, false)?;
        for layer in &self.pool.core().layout().layers {
            self.copy_slots(&current, layer, stream)?;
        }
        for sent in attend.iter_mut() {
            self.send_attend(sent, stream)?;
        }
        Ok(())
    }

    /// The graph was given to the stream: every layer counts as appended to.
    pub fn replayed(&self) {
        self.open.replayed();
    }

    /// Decodes tokens from `first` on, of the sequence at `index` of the batch in one layer, to `k` and `v`,
    /// `[count, kv_heads, head_dim]`; what is stored is what [`Step::attend`] sees, [`OpenStep::stored`] tokens.
    #[allow(clippy::too_many_arguments)] // one call, one launch
    pub fn expand(
        &self,
        layer: usize,
        index: usize,
        first: usize,
        rotated: bool,
        k: &DeviceTensor,
        v: &DeviceTensor,
        stream: Stream,
    ) -> Result<(), Error> {
        let _current = self.pool.device().enter()?;
        if self.recording(stream)? {
            return Err(Error::Capturing {
                what: "expand",
                expected: "append and attend, whose arrays every replay sends again",
                fix: "expand outside of the capture",
            });
        }
        self.open.read(layer, |at, appended| {
            let view = self.open.view(index, appended)?;
            let tokens = check_expand_on_device(at, view, first, k, v)?;
            if tokens.is_empty() {
                return Ok(());
            }
            let mut sent = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
            let same = |(at, after, tables): &(usize, bool, SentTables)| {
                (*at, *after, tables.stream()) == (index, appended, stream)
            };
            // Sent once for all layers.
            let found = if let Some(found) = sent.iter().position(same) {
                found
            } else {
                sent.push((index, appended, self.pool.send_tables(view, stream)?));
                sent.len() - 1
            };
            self.pool.launch_expand(at, layer, &mut sent[found].2, tokens, rotated, k, v)
        })
    }
}
