//! The codec over arrays of tiles, outside a pool.

use kvarn::Config;
use kvarn::codec::{DecodeScratch, EncodeCounts, Rotation, TileEncoder, decode_matrix};
use kvarn::pool::PoolError;
use rayon::prelude::*;

use crate::append::{encode_tile, read_row};
use crate::threads::install;
use crate::{Error, TensorRef};

/// Encodes tiles: `k` and `v` `[tiles, group, head_dim]`, of one element type, to `records`
/// `[tiles, record_bytes]`, every byte of which is written.
///
/// Values are first rounded to the slot type of their element type, so that the records are those that a pool makes.
pub fn encode_tiles(
    config: &Config,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    rotated: bool,
    records: &mut [u8],
) -> Result<EncodeCounts, Error> {
    let (group, head_dim) = (config.group(), config.head_dim());
    let tiles = k.shape()[0];
    for (what, tensor) in [("k", &k), ("v", &v)] {
        if tensor.shape() != [tiles, group, head_dim] {
            let expected = format!("[{tiles}, {group}, {head_dim}] (tiles, group, head_dim)");
            let fix = "pass whole tiles of this configuration";
            return Err(PoolError::shape(what, &tensor.shape(), expected, fix).into());
        }
    }
    if v.dtype() != k.dtype() {
        let (expected, fix) = (k.dtype().name(), "cast v to the type of k");
        return Err(PoolError::DType { what: "v", got: v.dtype(), expected, fix }.into());
    }
    let record_bytes = config.layout().record_bytes;
    if records.len() != tiles * record_bytes {
        let expected = format!("[{tiles}, {record_bytes}] bytes");
        return Err(
            PoolError::shape("records", &[records.len()], expected, "allocate tiles × record_bytes").into()
        );
    }
    let rotation = (!rotated).then(|| Rotation::new(head_dim));
    let encode = |workspace: &mut (TileEncoder, Vec<f32>, Vec<f32>), (tile, record): (usize, &mut [u8])| {
        let (encoder, k_tile, v_tile) = workspace;
        let mut counts = EncodeCounts::default();
        for (tensor, out) in [(&k, &mut *k_tile), (&v, &mut *v_tile)] {
            let slot = tensor.dtype().slot_type();
            for (token, row) in out.chunks_exact_mut(head_dim).enumerate() {
                read_row(tensor, (tile, token), rotation.as_ref(), slot, row, &mut counts);
            }
        }
        encode_tile(encoder, k_tile, v_tile, record, &mut counts);
        counts
    };
    let workspace = || (TileEncoder::new(config), vec![0.0; group * head_dim], vec![0.0; group * head_dim]);
    Ok(install(|| {
        let records = records.par_chunks_exact_mut(record_bytes).enumerate();
        records.map_init(workspace, encode).reduce(EncodeCounts::default, |mut a, b| {
            a += b;
            a
        })
    }))
}

/// Decodes `records` `[tiles, record_bytes]` to `k` and `v` `[tiles, group, head_dim]`.
pub fn decode_tiles(
    config: &Config,
    records: &[u8],
    rotated: bool,
    k: &mut [f32],
    v: &mut [f32],
) -> Result<(), Error> {
    let layout = config.layout();
    let elements = config.group() * config.head_dim();
    let tiles = records.len() / layout.record_bytes;
    for (what, got, expected) in [
        ("records", records.len(), tiles * layout.record_bytes),
        ("k", k.len(), tiles * elements),
        ("v", v.len(), tiles * elements),
    ] {
        if got != expected {
            return Err(kvarn::Error::Length { what, got, expected }.into());
        }
    }
    let rotation = (!rotated).then(|| Rotation::new(config.head_dim()));
    install(|| {
        let tiles = k.par_chunks_exact_mut(elements).zip(v.par_chunks_exact_mut(elements));
        let tiles = tiles.zip(records.par_chunks_exact(layout.record_bytes));
        tiles.for_each_init(
            || (DecodeScratch::default(), vec![0.0; elements]),
            |(scratch, transposed), ((k, v), record)| {
                decode_matrix(&layout.key, record, scratch, transposed);
                transpose(transposed, config.group(), k);
                decode_matrix(&layout.value, record, scratch, v);
                if let Some(rotation) = &rotation {
                    for row in
                        k.chunks_exact_mut(config.head_dim()).chain(v.chunks_exact_mut(config.head_dim()))
                    {
                        rotation.apply(row);
                    }
                }
            },
        );
    });
    Ok(())
}

/// `out[j][i] = m[i][j]` for `m` `[_, columns]`.
pub(crate) fn transpose(m: &[f32], columns: usize, out: &mut [f32]) {
    let rows = m.len() / columns;
    for (j, out) in out.chunks_exact_mut(rows).enumerate() {
        for (i, value) in out.iter_mut().enumerate() {
            *value = m[i * columns + j];
        }
    }
}

/// Index of the first NaN or infinity, in row-major order.
pub fn find_non_finite(tensor: TensorRef<'_>) -> Option<[usize; 3]> {
    let [outer, middle, inner] = tensor.shape();
    let mut row = vec![0.0; inner];
    (0..outer).flat_map(|i| (0..middle).map(move |j| (i, j))).find_map(|(i, j)| {
        tensor.load_row(i, j, &mut row);
        row.iter().position(|value| !value.is_finite()).map(|k| [i, j, k])
    })
}
