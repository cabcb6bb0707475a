//! Parameters of the kernels: mirrors of the structs in `cuda/params.cuh`, passed by value.
//!
//! `Device::kernel` refuses a kernel whose parameter has another size than its mirror here.

/// A caller's tensor `[rows, heads, head_dim]`, the last dimension contiguous; strides in elements.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Tensor {
    pub data: u64,
    pub row_stride: i64,
    pub head_stride: i64,
}

/// Pages and slots of one layer.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Cache {
    pub pages: u64,
    pub slots: u64,
    pub kv_heads: i32,
    pub unused: i32,
}

/// Words of a seal: page, slot, first token that comes with the rows, row of that token.
pub(crate) const SEAL_WORDS: usize = 4;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct AppendParams {
    pub k: Tensor,
    pub v: Tensor,
    pub cache: Cache,
    pub slot_of_row: u64,
    pub seals: u64,
    pub counts: u64,
    pub rows: i32,
    pub seals_count: i32,
    pub dtype: i32,
    pub rotated: i32,
    pub refit: i32,
    pub iterations: i32,
    pub key_bits: i32,
    pub value_bits: i32,
}

/// Most record tiles of an item.
pub(crate) const ITEM_TILES: usize = 32;
/// Words of an item, the last of them pages; see `Item` in `cuda/params.cuh`.
pub(crate) const ITEM_WORDS: usize = 12 + ITEM_TILES;
/// Words of a share: item, head, count, unused, and its first item; see `Share` in `cuda/params.cuh`.
pub(crate) const SHARE_WORDS: usize = 4 + ITEM_WORDS;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct AttendParams {
    pub q: Tensor,
    pub out: Tensor,
    pub cache: Cache,
    pub items: u64,
    pub shares: u64,
    pub sink_logits: u64,
    pub lse: u64,
    pub partial_out: u64,
    pub partial_base_sum: u64,
    pub counters: u64,
    pub dtype: i32,
    pub rotated: i32,
    pub group: i32,
    pub columns: i32,
    pub window: i32,
    pub sink_tokens: i32,
    pub scale: f32,
    pub softcap: f32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct ExpandParams {
    pub k: Tensor,
    pub v: Tensor,
    pub cache: Cache,
    pub block_table: u64,
    pub slot_table: u64,
    pub first: i32,
    pub tokens: i32,
    pub dtype: i32,
    pub rotated: i32,
    pub sink_tokens: i32,
    pub key_bits: i32,
    pub value_bits: i32,
    pub unused: i32,
}
