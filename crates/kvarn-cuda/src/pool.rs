//! A pool on a device: the core that all backends share, and device memory.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use kvarn::codec::{EncodeCounts, SlotType};
use kvarn::pool::{Layer, LayerShape, PoolCore, PoolError, PoolLayout, check_expand};
use kvarn::tables::{SequenceId, SequenceView, StepPlan};
use kvarn::{Config, DType};

use crate::geometry::{self, AttendGeometry};
use crate::params::{Cache, ExpandParams};
use crate::tensor::dtype_number;
use crate::upload::{StepBuffer, StepBuffers, Words};
use crate::workspace::Workspaces;
use crate::{Device, DeviceMemory, DeviceTensor, Error, Kernel, MemoryView, Step, Stream, launch};

/// The cache memory of one model on one device.
///
/// Every method may be called from any thread. Address space is reserved at once, memory provided as pages and slots are
/// used.
#[derive(Debug)]
pub struct Pool {
    core: Arc<PoolCore>,
    device: &'static Device,
    pages: Arc<DeviceMemory>,
    slots: Arc<DeviceMemory>,
    /// Two 64-bit words: non-finite and saturated values, added to by kernels.
    counts: Arc<DeviceMemory>,
    buffers: Arc<StepBuffers>,
    workspaces: Workspaces,
    /// Pages and slots, from the first, whose memory is provided.
    provided: Mutex<(usize, usize)>,
    /// Thread blocks of each attention kernel that the device holds at a time, by its name.
    resident: Mutex<Vec<(&'static str, usize)>>,
}

/// Tables of one sequence on the device.
#[derive(Debug)]
pub(crate) struct SentTables {
    buffer: StepBuffer,
    stream: Stream,
    blocks: Words,
    slots: Words,
}

impl SentTables {
    /// The stream that they were sent on, whose work may read them.
    pub(crate) const fn stream(&self) -> Stream {
        self.stream
    }
}

impl Pool {
    /// Reserves a pool of `pages` pages and `slots` slots for `layers` on device `device`.
    pub fn new(
        config: Config,
        layers: &[LayerShape],
        pages: usize,
        slots: usize,
        slot_type: SlotType,
        device: usize,
    ) -> Result<Arc<Self>, Error> {
        let core = PoolCore::new(PoolLayout::new(config, layers, pages, slots, slot_type)?)?;
        if slot_type != SlotType::Float16 {
            return Err(Error::Unsupported {
                what: "dtype",
                got: "float32".into(),
                expected: "float16 or bfloat16".into(),
            });
        }
        for layer in &core.layout().layers {
            geometry::check(&layer.config)?;
        }
        let device = Device::open(device)?;
        let layout = core.layout();
        let pages = DeviceMemory::reserve(device, layout.page_memory, "pages")?;
        let slots = DeviceMemory::reserve(device, layout.slot_memory, "slots")?;
        let counts = DeviceMemory::allocate(device, 16, "counts")?;
        let (buffers, workspaces) = (StepBuffers::new(device), Workspaces::new(device));
        let (provided, resident) = (Mutex::default(), Mutex::default());
        Ok(Arc::new(Self { core, device, pages, slots, counts, buffers, workspaces, provided, resident }))
    }

    /// Sequences, tables, layout.
    pub const fn core(&self) -> &Arc<PoolCore> {
        &self.core
    }

    /// The device.
    pub const fn device(&self) -> &'static Device {
        self.device
    }

    /// Plans a step; see [`PoolCore::step`]. Provides memory for the pages and slots that it takes.
    pub fn step(
        self: &Arc<Self>,
        sequences: &[SequenceId],
        counts: &[usize],
        hold: &[usize],
    ) -> Result<Step, Error> {
        // An error drops the open step, which abandons it: the pool is as before.
        let open = self.core.step(sequences, counts, hold)?;
        self.provide(open.plan())?;
        Ok(Step::new(Arc::clone(self), open))
    }

    /// Non-finite and saturated values since the pool was made. Waits for the device.
    pub fn counts(&self) -> Result<EncodeCounts, Error> {
        let words = self.counts.read_words::<2>()?;
        Ok(EncodeCounts { non_finite: words[0], saturated: words[1] })
    }

    /// Decodes the tokens of a sequence from `first` on, in one layer, to `k` and `v`, `[count, kv_heads, head_dim]`.
    #[allow(clippy::too_many_arguments)] // one call, one launch
    pub fn expand(
        &self,
        sequence: SequenceId,
        layer: usize,
        first: usize,
        rotated: bool,
        k: &DeviceTensor,
        v: &DeviceTensor,
        stream: Stream,
    ) -> Result<(), Error> {
        let at = self.core.layout().layer(layer)?;
        self.core.while_stored(sequence, |view| {
            let tokens = check_expand_on_device(at, view, first, k, v)?;
            if tokens.is_empty() {
                return Ok(());
            }
            self.launch_expand(at, &mut self.send_tables(view, stream)?, tokens, rotated, k, v)
        })
    }

    /// Sends what the expansion of a view needs.
    pub(crate) fn send_tables(&self, view: &SequenceView, stream: Stream) -> Result<SentTables, Error> {
        let mut buffer = self.buffers.take(&[view.block_table.len(), view.slot_table.len()])?;
        let [blocks, slots] = buffer.send(stream, [&view.block_table, &view.slot_table])?;
        Ok(SentTables { buffer, stream, blocks, slots })
    }

    /// Decodes `tokens`, at least one, that the tables say are stored; the arguments are checked.
    pub(crate) fn launch_expand(
        &self,
        at: &Layer,
        tables: &mut SentTables,
        tokens: Range<usize>,
        rotated: bool,
        k: &DeviceTensor,
        v: &DeviceTensor,
    ) -> Result<(), Error> {
        let config = &at.config;
        let name = format!("kvarn_expand_d{}_g{}", config.head_dim(), config.group());
        let kernel = self.device.kernel(&name, &[size_of::<ExpandParams>()])?;
        let stream = tables.stream;
        let sinks = config.sink_tokens();
        let mut params = ExpandParams {
            k: k.parameter(),
            v: v.parameter(),
            cache: self.cache(at),
            block_table: tables.blocks.address,
            slot_table: tables.slots.address,
            first: tokens.start as i32,
            tokens: tokens.len() as i32,
            dtype: dtype_number(k.dtype()),
            rotated: i32::from(rotated),
            sink_tokens: sinks as i32,
            key_bits: config.key_bits().get() as i32,
            value_bits: config.value_bits().get() as i32,
            unused: 0,
        };
        let blocks = tokens.end.div_ceil(64) - tokens.start / 64;
        let grid = [blocks as u32, 2 * at.shape.kv_heads as u32, 1];
        let parameters = &mut [ptr::from_mut(&mut params).cast::<c_void>()];
        // SAFETY: the parameter is the kernel's (its size is checked, its layout mirrored); tables and pool are kept until
        // the work has run (`done`, `Drop`); the tensors are as their maker promised; the stream is the caller's.
        let launched = unsafe { launch(&kernel, grid, [128, 1, 1], 0, stream, parameters) };
        tables.buffer.done(stream)?;
        launched
    }

    /// Pages of one layer: uint8 `[pages, kv_heads, record_bytes]`. All their memory is provided.
    pub fn pages(&self, layer: usize) -> Result<MemoryView, Error> {
        let at = self.core.layout().layer(layer)?;
        MemoryView::new(Arc::clone(&self.pages), at.pages_at, self.core.layout().pages_shape(at), 1)
    }

    /// Slots of one layer: half `[slots, kv_heads, 2, group, head_dim]`. All their memory is provided.
    pub fn slots(&self, layer: usize) -> Result<MemoryView, Error> {
        let at = self.core.layout().layer(layer)?;
        MemoryView::new(Arc::clone(&self.slots), at.slots_at, self.core.layout().slots_shape(at), 2)
    }

    /// Bytes of device memory that pages and slots take now.
    pub fn provided_bytes(&self) -> usize {
        self.pages.provided() + self.slots.provided()
    }

    pub(crate) const fn buffers(&self) -> &Arc<StepBuffers> {
        &self.buffers
    }

    pub(crate) const fn workspaces(&self) -> &Workspaces {
        &self.workspaces
    }

    /// Thread blocks of an attention kernel that the device holds at a time: its grid.
    pub(crate) fn resident(&self, kernel: &Kernel, geometry: &AttendGeometry) -> Result<usize, Error> {
        let mut known = self.resident.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&(.., blocks)) = known.iter().find(|(name, _)| *name == kernel.name()) {
            return Ok(blocks);
        }
        let each = kernel.blocks_per_multiprocessor(geometry.threads, geometry.shared)?;
        let blocks = (each * self.device.limits().multiprocessors) as usize;
        known.push((kernel.name(), blocks));
        Ok(blocks)
    }

    pub(crate) fn counts_address(&self) -> u64 {
        self.counts.address()
    }

    pub(crate) fn cache(&self, layer: &Layer) -> Cache {
        Cache {
            pages: self.pages.address() + layer.pages_at as u64,
            slots: self.slots.address() + layer.slots_at as u64,
            kv_heads: layer.shape.kv_heads as i32,
            unused: 0,
        }
    }

    /// Ids are given out lowest first: what is provided is a prefix of each layer's pages and slots.
    fn provide(&self, plan: &StepPlan) -> Result<(), Error> {
        let most = |table: &dyn Fn(&SequenceView) -> &[i32]| {
            let ids = plan.sequences.iter().flat_map(|sequence| table(&sequence.after).iter().copied());
            ids.max().map_or(0, |id| (id + 1) as usize)
        };
        let (pages, slots) = (most(&|view| &view.block_table), most(&|view| &view.slot_table));
        let mut provided = self.provided.lock().unwrap_or_else(PoisonError::into_inner);
        if pages <= provided.0 && slots <= provided.1 {
            return Ok(());
        }
        for layer in &self.core.layout().layers {
            let (pages_at, slots_at) = (layer.pages_at, layer.slots_at);
            self.pages.ensure(pages_at..pages_at + pages.max(provided.0) * layer.page_bytes)?;
            self.slots.ensure(slots_at..slots_at + slots.max(provided.1) * layer.slot_bytes)?;
        }
        *provided = (pages.max(provided.0), slots.max(provided.1));
        Ok(())
    }
}

/// Checks the arguments of an expansion of what a view says is stored, from `first` on, and returns the range.
pub(crate) fn check_expand_on_device(
    at: &Layer,
    view: &SequenceView,
    first: usize,
    k: &DeviceTensor,
    v: &DeviceTensor,
) -> Result<Range<usize>, Error> {
    let tokens = check_expand(at, view.length, first, k.shape(), v.shape())?;
    check_type("k", k, None, 8)?;
    check_type("v", v, Some(k.dtype()), 8)?;
    Ok(tokens)
}

/// Checks type and alignment of a tensor: half or bfloat16, like `other`, rows at multiples of `alignment`.
pub(crate) fn check_type(
    what: &'static str,
    tensor: &DeviceTensor,
    other: Option<DType>,
    alignment: usize,
) -> Result<(), Error> {
    let got = tensor.dtype();
    if got == DType::Float32 {
        let (expected, fix) = ("float16 or bfloat16", "cast it first");
        return Err(PoolError::DType { what, got, expected, fix }.into());
    }
    if let Some(other) = other
        && got != other
    {
        let fix = "cast it to the type of the other tensor";
        return Err(PoolError::DType { what, got, expected: other.name(), fix }.into());
    }
    if !tensor.is_aligned(alignment) {
        return Err(PoolError::Value {
            what: "alignment",
            got: format!("of {what}, whose rows do not all start at multiples of {alignment} bytes"),
            expected: format!("rows at multiples of {alignment} bytes"),
            fix: "pass a contiguous tensor",
        }
        .into());
    }
    Ok(())
}
