//! A pool on a device: the core that all backends share, and device memory.

use std::any::Any;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use kvarn::codec::{EncodeCounts, SlotType};
use kvarn::pool::{Layer, LayerShape, PoolCore, PoolError, PoolLayout, check_expand};
use kvarn::tables::{SequenceId, SequenceView};
use kvarn::{Config, DType};

use crate::departures::Departures;
use crate::geometry;
use crate::params::{AppendParams, Cache, ExpandParams};
use crate::pinned::PinnedBuffers;
use crate::tensor::dtype_number;
use crate::upload::{Array, StepBuffer, StepBuffers, Words};
use crate::workspace::Workspaces;
use crate::{
    Device, DeviceMemory, DeviceTensor, Error, Kernel, MemoryView, StaticArrays, Step, Stream, check, launch,
};

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
    /// Of each layer: no name is looked up when one is launched.
    kernels: Vec<LayerKernels>,
    /// Whether the arrays of steps are checked before every launch.
    check: bool,
    buffers: Arc<StepBuffers>,
    workspaces: Workspaces,
    pinned: Arc<PinnedBuffers>,
    departures: Departures,
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

#[derive(Clone, Copy, Debug)]
struct LayerKernels {
    append: Kernel,
    expand: Kernel,
}

/// Memory of a caller.
pub struct Borrowed {
    /// First byte, at a multiple of 128.
    pub address: u64,
    /// Bytes.
    pub bytes: usize,
    /// Keeps the memory.
    pub owner: Box<dyn Any + Send + Sync>,
}

/// What a pool may be made with.
#[derive(Default)]
pub struct PoolOptions {
    /// Memory for pages and slots. `None`: the pool reserves its own.
    pub memory: Option<(Borrowed, Borrowed)>,
    /// Check the arrays of a step before every launch: their ranges, and on the device that they are as they were sent. For
    /// debugging; every launch waits for the stream.
    pub check: bool,
}

impl Pool {
    /// A pool of `pages` pages and `slots` slots for `layers` on device `device`.
    ///
    /// # Safety
    /// Borrowed memory is device memory of as many bytes as long as its owner lives, and nobody else writes to it.
    #[allow(clippy::too_many_arguments)] // what makes up a pool
    pub unsafe fn new(
        config: Config,
        layers: &[LayerShape],
        pages: usize,
        slots: usize,
        slot_type: SlotType,
        device: usize,
        options: PoolOptions,
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
        let kernels = layout.layers.iter().map(|layer| LayerKernels::find(device, &layer.config));
        let kernels = kernels.collect::<Result<Vec<_>, _>>()?;
        let (pages, slots) = match options.memory {
            None => {
                let pages = DeviceMemory::reserve(device, layout.page_memory, "pages")?;
                (pages, DeviceMemory::reserve(device, layout.slot_memory, "slots")?)
            }
            // SAFETY: the caller's promise.
            Some((pages, slots)) => unsafe {
                let pages = borrow(device, pages, layout.page_memory, "pages")?;
                let slots = borrow(device, slots, layout.slot_memory, "slots")?;
                // Kernels multiply what no token was written to by zero: it must not be NaN.
                slots.clear()?;
                (pages, slots)
            },
        };
        let counts = DeviceMemory::allocate(device, 16, "counts")?;
        let (check, provided, resident) = (options.check, Mutex::default(), Mutex::default());
        let (buffers, workspaces) = (StepBuffers::new(device, check), Workspaces::new(device));
        Ok(Arc::new(Self {
            core,
            device,
            pages,
            slots,
            counts,
            kernels,
            check,
            buffers,
            workspaces,
            pinned: PinnedBuffers::new(device),
            departures: Departures::new(device),
            provided,
            resident,
        }))
    }

    /// Sequences, tables, layout.
    pub const fn core(&self) -> &Arc<PoolCore> {
        &self.core
    }

    /// The device.
    pub const fn device(&self) -> &'static Device {
        self.device
    }

    /// Plans a step; see [`PoolCore::step`]. Provides memory for the pages and slots that it takes. With static arrays, its
    /// launches can be captured, or it can be a replay of a graph that was.
    pub fn step(
        self: &Arc<Self>,
        sequences: &[SequenceId],
        counts: &[usize],
        hold: &[usize],
        arrays: Option<&StaticArrays>,
    ) -> Result<Step, Error> {
        let lending = arrays.map(|arrays| arrays.lend(self, counts)).transpose()?;
        // An error drops the open step, which abandons it: the pool is as before.
        let open = self.with_room(|| Ok(self.core.step(sequences, counts, hold)?))?;
        self.provide_for(open.plan().sequences.iter().map(|sequence| &sequence.after))?;
        if self.check {
            check::tables(open.plan(), self.core.layout())?;
        }
        Step::new(Arc::clone(self), open, lending)
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
            self.launch_expand(at, layer, &mut self.send_tables(view, stream)?, tokens, rotated, k, v)
        })
    }

    /// Sends what the expansion of a view needs.
    pub(crate) fn send_tables(&self, view: &SequenceView, stream: Stream) -> Result<SentTables, Error> {
        let mut buffer = self.buffers.take(&[view.block_table.len(), view.slot_table.len()])?;
        let tables =
            [Array::new("block_table", &view.block_table), Array::new("slot_table", &view.slot_table)];
        let [blocks, slots] = buffer.send(stream, tables)?;
        Ok(SentTables { buffer, stream, blocks, slots })
    }

    /// Decodes `tokens`, at least one, that the tables say are stored; the arguments are checked.
    #[allow(clippy::too_many_arguments)] // one call, one launch
    pub(crate) fn launch_expand(
        &self,
        at: &Layer,
        layer: usize,
        tables: &mut SentTables,
        tokens: Range<usize>,
        rotated: bool,
        k: &DeviceTensor,
        v: &DeviceTensor,
    ) -> Result<(), Error> {
        let config = &at.config;
        let kernel = self.kernels[layer].expand;
        let stream = tables.stream;
        tables.buffer.read_by(stream)?;
        tables.buffer.verify(stream)?;
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
        let warps = (tokens.end.div_ceil(64) - tokens.start / 64) * 2 * at.shape.kv_heads;
        let grid = [warps.div_ceil(4) as u32, 1, 1];
        let parameters = &mut [ptr::from_mut(&mut params).cast::<c_void>()];
        // SAFETY: the parameter is the kernel's (its size is checked, its layout mirrored); tables and pool are kept until
        // the work has run (`read_by`, `Drop`); the tensors are as their maker promised; the stream is the caller's.
        unsafe { launch(&kernel, grid, [128, 1, 1], 0, stream, parameters) }
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

    /// Bytes of device memory that partial results of attention have on all streams, but for those of static arrays.
    pub fn workspace_bytes(&self) -> usize {
        self.workspaces.bytes()
    }

    pub(crate) const fn buffers(&self) -> &Arc<StepBuffers> {
        &self.buffers
    }

    pub(crate) const fn workspaces(&self) -> &Workspaces {
        &self.workspaces
    }

    /// Thread blocks of an attention kernel that the device holds at a time.
    pub(crate) fn resident(&self, kernel: &Kernel, shared: u32) -> Result<usize, Error> {
        let mut known = self.resident.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&(.., blocks)) = known.iter().find(|(name, _)| *name == kernel.name()) {
            return Ok(blocks);
        }
        let each = kernel.blocks_per_multiprocessor(kernel.threads(), shared)?;
        let blocks = (each * self.device.limits().multiprocessors) as usize;
        known.push((kernel.name(), blocks));
        Ok(blocks)
    }

    /// The kernel that appends to a layer.
    pub(crate) fn append_kernel(&self, layer: usize) -> Kernel {
        self.kernels[layer].append
    }

    /// Whether the arrays of steps are checked.
    pub(crate) const fn checks(&self) -> bool {
        self.check
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

    pub(crate) const fn pinned(&self) -> &Arc<PinnedBuffers> {
        &self.pinned
    }

    pub(crate) const fn departures(&self) -> &Departures {
        &self.departures
    }

    /// Addresses of pages and slots.
    pub(crate) fn addresses(&self) -> [u64; 2] {
        [self.pages.address(), self.slots.address()]
    }

    /// Provides memory for the pages and slots that `views` name. Ids are given out lowest first: what is provided is a
    /// prefix of each layer's pages and slots.
    pub(crate) fn provide_for<'a>(
        &self,
        views: impl IntoIterator<Item = &'a SequenceView>,
    ) -> Result<(), Error> {
        let (mut pages, mut slots) = (0, 0);
        for view in views {
            let most = |table: &[i32]| table.iter().max().map_or(0, |&id| (id + 1) as usize);
            pages = pages.max(most(&view.block_table));
            slots = slots.max(most(&view.slot_table));
        }
        self.provide_first(pages, slots)
    }

    /// Provides memory for the first `pages` pages and `slots` slots.
    pub(crate) fn provide_first(&self, pages: usize, slots: usize) -> Result<(), Error> {
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

impl LayerKernels {
    fn find(device: &'static Device, config: &Config) -> Result<Self, Error> {
        let (head_dim, group) = (config.head_dim(), config.group());
        let append =
            device.kernel(&format!("kvarn_append_d{head_dim}_g{group}"), &[size_of::<AppendParams>()])?;
        let expand =
            device.kernel(&format!("kvarn_expand_d{head_dim}_g{group}"), &[size_of::<ExpandParams>()])?;
        let (needs, has) = (geometry::append_shared(head_dim, group), append.dynamic_shared());
        if needs > has {
            return Err(Error::Unsupported {
                what: "tile",
                got: format!(
                    "{group} tokens of head_dim {head_dim}, for which a block needs {needs} bytes of shared memory"
                ),
                expected: format!("at most the {has} bytes of cuda:{}", device.index()),
            });
        }
        Ok(Self { append, expand })
    }
}

/// Borrows memory that must be of just the size.
///
/// # Safety
/// As [`DeviceMemory::borrow`].
unsafe fn borrow(
    device: &'static Device,
    memory: Borrowed,
    bytes: usize,
    what: &'static str,
) -> Result<Arc<DeviceMemory>, Error> {
    if memory.bytes != bytes {
        return Err(Error::Borrowed {
            what,
            got: format!("of {} bytes", memory.bytes),
            expected: format!("{bytes} bytes, those of all layers one behind the other"),
            fix: "pass a tensor of that size",
        });
    }
    // SAFETY: the caller's promise.
    unsafe { DeviceMemory::borrow(device, memory.address, bytes, memory.owner, what) }
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
