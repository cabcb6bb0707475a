//! Which kernels there are, and the shapes of their launches. Mirrors constants of `cuda/`; a test compiles those headers
//! for the host and compares.

use kvarn::Config;

use crate::Error;
use crate::params::SHARE_WORDS;

/// Head dims with kernels.
pub(crate) const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];
/// `(key_bits, value_bits)` with attention kernels.
pub(crate) const BITS: [(usize, usize); 6] = [(4, 4), (4, 2), (3, 3), (2, 2), (8, 4), (8, 8)];

/// Refuses a layer's configuration that no kernel serves.
pub(crate) fn check(config: &Config) -> Result<(), Error> {
    let bits = (config.key_bits().get(), config.value_bits().get());
    if !BITS.contains(&bits) {
        return Err(Error::Unsupported {
            what: "bits",
            got: format!("k{}v{}", bits.0, bits.1),
            expected: "k4v4, k4v2, k3v3, k2v2, k8v4 or k8v8".into(),
        });
    }
    if !HEAD_DIMS.contains(&config.head_dim()) {
        return Err(Error::Unsupported {
            what: "head_dim",
            got: config.head_dim().to_string(),
            expected: format!("one of {HEAD_DIMS:?}"),
        });
    }
    Ok(())
}

/// Lanes that share a head vector when rows are appended (`vector_lanes` in `cuda/rotate.cuh`).
pub(crate) const fn append_lanes(head_dim: usize) -> usize {
    match head_dim {
        0..=64 => 8,
        65..=128 => 16,
        _ => 32,
    }
}

/// Dynamic shared memory of a block that seals (`append_shared_bytes` in `cuda/shape.cuh`).
pub(crate) fn append_shared(head_dim: usize, group: usize) -> u32 {
    match (head_dim, group) {
        (64, 128) => 32_880,
        (64, 64) => 14_656,
        (96, 128) => 47_904,
        (96, 64) => 21_840,
        (128, 128) => 62_928,
        (128, 64) => 28_240,
        (256, 128) => 137_232,
        _ => 70_288,
    }
}

/// The attention kernel for one layer and a number of query columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttendGeometry {
    /// Blocks of eight query columns (NT).
    pub blocks: usize,
}

impl AttendGeometry {
    /// For `columns` query columns of one sequence (query tokens × query heads per KV head); more than the kernel holds are
    /// done in passes. `None` where a single token's columns are more than any kernel holds.
    pub(crate) fn new(config: &Config, group: usize, columns: usize) -> Option<Self> {
        let most = if config.head_dim() == 256 { 1 } else { 2 };
        if group > 8 * most {
            return None;
        }
        Some(Self { blocks: if columns <= 8 { 1 } else { most } })
    }

    /// Dynamic shared memory of a block of so many warps, which is what the kernel was compiled for: as in `AttendMemory` of
    /// `cuda/attend.cuh`, per warp K, V or results, barriers; then fragments, four descriptions of work, a unit and a word for
    /// each column, a flag.
    pub(crate) fn shared(self, config: &Config, warps: usize) -> u32 {
        let (d, layout) = (config.head_dim(), config.layout());
        let keys = layout.key.column_scale.end - layout.key.codes.start;
        let values = layout.value.row_zero.end - layout.value.codes.start;
        let buffers = keys + values.max(8 * self.blocks * (d + 4) * 4) + 16;
        let fragments = self.blocks * (d / 16) * 512;
        let rest = (fragments + 4 * 4 * SHARE_WORDS + 4 * (8 * self.blocks + 2)).next_multiple_of(16);
        (warps * buffers + rest) as u32
    }

    /// Query tokens of one pass.
    pub(crate) const fn query_tokens(self, group: usize) -> usize {
        8 * self.blocks / group
    }

    /// Name of the kernel.
    pub(crate) fn name(self, config: &Config) -> String {
        let (k, v) = (config.key_bits().get(), config.value_bits().get());
        format!("kvarn_attend_d{}_g{}_k{k}v{v}_n{}", config.head_dim(), config.group(), self.blocks)
    }
}

#[cfg(test)]
mod tests;
