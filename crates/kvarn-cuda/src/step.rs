//! A step on a device.

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use kvarn::pool::{AttendOptions, Layer, OpenStep, check_attend, check_rows};

use crate::geometry::{self, AttendGeometry};
use crate::params::{AppendParams, AttendParams, SHARE_WORDS};
use crate::plan::{AppendPlan, AttendKey, AttendPlan};
use crate::pool::{SentTables, check_expand_on_device, check_type};
use crate::share::{Cost, Grid, shares};
use crate::tensor::dtype_number;
use crate::upload::{StepBuffer, Words};
use crate::workspace::Workspace;
use crate::{DeviceTensor, Error, Pool, Stream, launch};

/// An open step. Dropped without a finish, it is abandoned: the pool is as before.
#[derive(Debug)]
pub struct Step {
    pool: Arc<Pool>,
    open: OpenStep,
    append: Mutex<Option<SentAppend>>,
    attend: Mutex<Vec<SentAttend>>,
    /// Tables for expansion: place in the batch, whether after append, what was sent.
    tables: Mutex<Vec<(usize, bool, SentTables)>>,
}

/// An append's arrays on the device.
#[derive(Debug)]
struct SentAppend {
    buffer: StepBuffer,
    stream: Stream,
    slot_of_row: Words,
    seals: Words,
    count: usize,
}

/// An attention's arrays on the device, and room for its partial results.
#[derive(Debug)]
struct SentAttend {
    key: AttendKey,
    kv_heads: usize,
    head_dim: usize,
    thread_blocks: usize,
    buffer: StepBuffer,
    stream: Stream,
    items: Words,
    shares: Words,
    columns: usize,
    /// Elements of all partial outputs.
    outputs: usize,
    workspace: Workspace,
}

impl Step {
    pub(crate) fn new(pool: Arc<Pool>, open: OpenStep) -> Self {
        Self { pool, open, append: Mutex::default(), attend: Mutex::default(), tables: Mutex::default() }
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
        self.open.append(
            layer,
            |at| {
                check_rows(at, slot_type, plan.tokens, k.description(), v.description())?;
                check_type("k", k, None, 16)?;
                check_type("v", v, Some(k.dtype()), 16)
            },
            |at| self.launch_append(at, k, v, rotated, stream),
        )
    }

    fn launch_append(
        &self,
        at: &Layer,
        k: &DeviceTensor,
        v: &DeviceTensor,
        rotated: bool,
        stream: Stream,
    ) -> Result<(), Error> {
        let config = &at.config;
        let plan = self.open.plan();
        let mut sent = self.append.lock().unwrap_or_else(PoisonError::into_inner);
        if sent.as_ref().is_none_or(|sent| sent.stream != stream) {
            let arrays = AppendPlan::new(plan, config.group());
            let mut buffer = self.pool.buffers().take(&[arrays.slot_of_row.len(), arrays.seals.len()])?;
            let [slot_of_row, seals] = buffer.send(stream, [&arrays.slot_of_row, &arrays.seals])?;
            *sent = Some(SentAppend { buffer, stream, slot_of_row, seals, count: arrays.count() });
        }
        let sent = sent.as_mut().expect("sent above");
        let kv_heads = at.shape.kv_heads;
        let name = format!("kvarn_append_d{}_g{}", config.head_dim(), config.group());
        let kernel = self.pool.device().kernel(&name, &[size_of::<AppendParams>()])?;
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
        // SAFETY: the parameter is the kernel's (size checked, layout mirrored); the arrays are kept until the work has run
        // (`done`), the pool's memory as long as it exists; the tensors are as their maker promised.
        let launched = unsafe {
            launch(&kernel, [blocks as u32, 1, 1], [kernel.threads(), 1, 1], shared, stream, parameters)
        };
        sent.buffer.done(stream)?;
        launched
    }

    /// Attention of `q` `[tokens, heads, head_dim]` over what is stored, to `out` of the same shape and type, in one launch
    /// on `stream`. `sink_logits`, float32 `[heads]`, and `lse`, float32 `[tokens, heads]`, are device addresses with their
    /// lengths. Sequences with more query columns (new tokens times query heads per KV head) than `most_columns` are left
    /// out: their rows of `out` and `lse` stay as they are.
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
    ) -> Result<(), Error> {
        let plan = self.open.plan();
        self.open.read(layer, |at, appended| {
            let lengths = (lse.map(|(_, length)| length), sink_logits.map(|(_, length)| length));
            let settings =
                check_attend(at, plan.tokens, q.shape(), out.shape(), lengths.0, lengths.1, options)?;
            check_type("q", q, None, 2)?;
            check_type("out", out, Some(q.dtype()), 2)?;
            let most_tokens = most_columns / settings.group;
            let counts = plan.sequences.iter().map(|sequence| sequence.count);
            let most = counts.filter(|&count| count <= most_tokens).max().unwrap_or(0);
            if most == 0 {
                return Ok(());
            }
            let geometry = AttendGeometry::new(&at.config, settings.group, settings.group * most);
            let geometry = geometry.ok_or_else(|| Error::Unsupported {
                what: "query heads per KV head",
                got: settings.group.to_string(),
                expected: "at most 16, at head dim 256 at most 8".into(),
            })?;
            let key = AttendKey {
                appended,
                group: settings.group,
                query_tokens: geometry.query_tokens(settings.group),
                window: settings.window,
                most_tokens,
            };
            let mut sent = self.attend.lock().unwrap_or_else(PoisonError::into_inner);
            let kernel =
                self.pool.device().kernel(&geometry.name(&at.config), &[size_of::<AttendParams>()])?;
            let thread_blocks = self.pool.resident(&kernel, &geometry)?;
            let sent = self.sent(&mut sent, at, key, thread_blocks, stream)?;
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
                partial_base_sum: results + 4 * sent.outputs as u64,
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
            let grid = [(sent.shares.count / SHARE_WORDS) as u32, 1, 1];
            let parameters = &mut [ptr::from_mut(&mut params).cast::<c_void>()];
            // SAFETY: as in `launch_append`; the workspace is this stream's, whose launches run one after the other.
            let launched = unsafe {
                launch(&kernel, grid, [geometry.threads, 1, 1], geometry.shared, stream, parameters)
            };
            sent.buffer.done(stream)?;
            launched
        })
    }

    /// The arrays of this attention on the device: sent once for all layers that attend alike.
    fn sent<'a>(
        &self,
        sent: &'a mut Vec<SentAttend>,
        at: &Layer,
        key: AttendKey,
        thread_blocks: usize,
        stream: Stream,
    ) -> Result<&'a mut SentAttend, Error> {
        let (kv_heads, head_dim) = (at.shape.kv_heads, at.shape.head_dim);
        let same = |sent: &SentAttend| {
            sent.key == key
                && sent.stream == stream
                && (sent.kv_heads, sent.head_dim, sent.thread_blocks) == (kv_heads, head_dim, thread_blocks)
        };
        if let Some(index) = sent.iter().position(same) {
            return Ok(&mut sent[index]);
        }
        let arrays = AttendPlan::new(self.open.plan(), &self.pool.core().layout().rule, key);
        let token = 2 * head_dim * 2;
        let cost = Cost { record: at.config.layout().record_bytes as u64, token: token as u64 };
        let shares = shares(&arrays, kv_heads, Grid::Resident(thread_blocks), cost);
        let outputs = arrays.parts * kv_heads * arrays.columns * head_dim;
        let bytes = 4 * (outputs + 2 * arrays.parts * kv_heads * arrays.columns);
        let workspace = self.pool.workspaces().take(stream, arrays.counters * kv_heads, bytes)?;
        let mut buffer = self.pool.buffers().take(&[arrays.items.len(), shares.len()])?;
        let [items, shares] = buffer.send(stream, [&arrays.items, &shares])?;
        sent.push(SentAttend {
            key,
            kv_heads,
            head_dim,
            thread_blocks,
            buffer,
            stream,
            items,
            shares,
            columns: arrays.columns,
            outputs,
            workspace,
        });
        Ok(sent.last_mut().expect("pushed above"))
    }

    /// Decodes the tokens from `first` on, of the sequence at `index` of the batch in one layer, to `k` and `v`,
    /// `[count, kv_heads, head_dim]`, in one launch on `stream`; what is stored is what [`Step::attend`] sees,
    /// [`OpenStep::stored`] tokens.
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
            // Sent once for all layers: then a captured graph can hold the launch.
            let found = if let Some(found) = sent.iter().position(same) {
                found
            } else {
                sent.push((index, appended, self.pool.send_tables(view, stream)?));
                sent.len() - 1
            };
            self.pool.launch_expand(at, &mut sent[found].2, tokens, rotated, k, v)
        })
    }
}
