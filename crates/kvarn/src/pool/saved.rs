//! Saved sequences: a checked header, then the sequence's image (see `pool/image.rs`). Docs: `docs/format.md`.
//!
//! All integers little endian; bytes 8 to 35 are those of saved records.
//!
//! | byte | size | field |
//! |---|---|---|
//! | 0 | 8 | magic, `KVARNSEQ` |
//! | 8 | 4 | format version |
//! | 12 | 4 | header bytes: 112, and 8 for each layer |
//! | 16 | 20 | configuration, as in saved records, with the head dim of layer 0 |
//! | 36 | 4 | bytes of a slot element: 2 = float16, 4 = float32 |
//! | 40 | 4 | layers |
//! | 44 | 4 | fingerprint: CRC-32 of bytes 16 to 43 and of the layers |
//! | 48 | 8 | tokens |
//! | 56 | 8 | committed tokens |
//! | 64 | 8 | one past the last tile that has records |
//! | 72 | 8 | tiles that have records |
//! | 80 | 8 | tiles that have a slot |
//! | 88 | 8 | bytes of the records |
//! | 96 | 4 | CRC-32 of the records |
//! | 100 | 4 | CRC-32 of the slots |
//! | 104 | 4 | zeros |
//! | 108 | 4 | CRC-32 of bytes 0 to 107 |
//! | 112 | 8 · layers | of each layer: KV heads (2), head dim (2), bytes of a record (4) |

use std::io::Read;

use super::{ImageSize, LayerShape, PoolLayout};
use crate::codec::SlotType;
use crate::record::{CONFIG_AT, FORMAT_VERSION, RecordLayout, config_of, config_to_bytes};
use crate::tables::Lengths;
use crate::{Config, Error};

/// First bytes of a saved sequence.
pub const SEQUENCE_MAGIC: [u8; 8] = *b"KVARNSEQ";
/// Bytes of the header before its layers.
const FIXED_BYTES: usize = 112;
const LAYER_BYTES: usize = 8;
const HASHED: std::ops::Range<usize> = CONFIG_AT..44;

/// What the header says of pool and sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    config: Config,
    slot_type: SlotType,
    layers: Vec<LayerShape>,
    lengths: Lengths,
    /// Tiles with records and with a slot, and bytes of the records: they follow from the rest.
    counts: [u64; 3],
    checksums: [u32; 2],
}

/// The header of a saved sequence, before its `image`.
///
/// # Panics
/// If the image is not that of these lengths in this layout.
pub fn sequence_header(layout: &PoolLayout, lengths: &Lengths, image: &[u8]) -> Vec<u8> {
    let size = layout.image_size(lengths).expect("an image that exists has a size");
    assert_eq!(image.len(), size.bytes(), "the image of the sequence");
    let (records, slots) = image.split_at(size.records);
    let rule = &layout.rule;
    Header {
        config: layout.layers[0].config,
        slot_type: layout.slot_type,
        layers: layout.layers.iter().map(|layer| layer.shape).collect(),
        lengths: *lengths,
        counts: [lengths.pages(rule) as u64, lengths.slots(rule) as u64, size.records as u64],
        checksums: [crc32fast::hash(records), crc32fast::hash(slots)],
    }
    .to_bytes()
}

/// Reads a saved sequence for a pool of this layout: its lengths and its image.
///
/// Every byte is checked against the checksums, the configuration against the pool's, lengths against the rule of sealing,
/// and parameters and slots for being finite. Memory is taken as bytes arrive, never for what the header claims.
pub fn read_sequence(input: &mut impl Read, layout: &PoolLayout) -> Result<(Lengths, Vec<u8>), Error> {
    let mut head = Vec::with_capacity(FIXED_BYTES);
    input.by_ref().take(FIXED_BYTES as u64).read_to_end(&mut head).map_err(|error| io(&error))?;
    let layers = check_fixed(&head)?;
    let more = (layers * LAYER_BYTES) as u64;
    input.by_ref().take(more).read_to_end(&mut head).map_err(|error| io(&error))?;
    let header = Header::from_bytes(&head, layers)?;
    let size = header.check(layout)?;
    let mut image = Vec::new();
    // One byte more than promised, so that trailing bytes are seen.
    input.take(size.bytes() as u64 + 1).read_to_end(&mut image).map_err(|error| io(&error))?;
    if image.len() != size.bytes() {
        return Err(Error::Format(format!(
            "{} bytes or more behind the header: expected {} of {} tokens; the file is truncated or has trailing bytes",
            image.len(),
            size.bytes(),
            header.lengths.length
        )));
    }
    let (records, slots) = image.split_at(size.records);
    for (what, bytes, expected) in
        [("record", records, header.checksums[0]), ("slot", slots, header.checksums[1])]
    {
        let checksum = crc32fast::hash(bytes);
        if checksum != expected {
            return Err(Error::Format(format!(
                "{what} checksum {checksum:08x}: expected {expected:08x}; the file is corrupted"
            )));
        }
    }
    check_finite(layout, &header.lengths, records, slots)?;
    Ok((header.lengths, image))
}

/// Checks the part of a header before its layers, and returns their number.
fn check_fixed(head: &[u8]) -> Result<usize, Error> {
    let format = |text: String| Err(Error::Format(text));
    if head.len() < FIXED_BYTES {
        return format(format!(
            "file of {} bytes: expected a header of {FIXED_BYTES} bytes and more; it is truncated, or no saved sequence",
            head.len()
        ));
    }
    if head[..8] != SEQUENCE_MAGIC {
        return format(format!(
            "magic {:?}: expected {SEQUENCE_MAGIC:?} (\"KVARNSEQ\"); this is no saved sequence of kvarn",
            &head[..8]
        ));
    }
    if u32_at(head, 8) != FORMAT_VERSION {
        return format(format!(
            "format version {}: expected {FORMAT_VERSION}; read the file with the kvarn release that wrote it",
            u32_at(head, 8)
        ));
    }
    let checksum = crc32fast::hash(&head[..108]);
    if u32_at(head, 108) != checksum {
        return format(format!(
            "header checksum {:08x}: expected {checksum:08x}; the file is corrupted",
            u32_at(head, 108)
        ));
    }
    let layers = u32_at(head, 40) as usize;
    let bytes = layers * LAYER_BYTES + FIXED_BYTES;
    if layers == 0 || u32_at(head, 12) as usize != bytes || u32_at(head, 104) != 0 {
        return format(format!(
            "header of {} bytes for {layers} layers: expected {bytes}, of 1 layer or more; the file is inconsistent",
            u32_at(head, 12)
        ));
    }
    Ok(layers)
}

impl Header {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; FIXED_BYTES];
        for LayerShape { kv_heads, head_dim } in &self.layers {
            bytes.extend((*kv_heads as u16).to_le_bytes());
            bytes.extend((*head_dim as u16).to_le_bytes());
            bytes.extend((record_bytes(&self.config, *head_dim) as u32).to_le_bytes());
        }
        let header_bytes = bytes.len() as u32;
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &SEQUENCE_MAGIC);
        put(8, &FORMAT_VERSION.to_le_bytes());
        put(12, &header_bytes.to_le_bytes());
        put(CONFIG_AT, &config_to_bytes(&self.config));
        put(36, &(self.slot_type.bytes() as u32).to_le_bytes());
        put(40, &(self.layers.len() as u32).to_le_bytes());
        let Lengths { length, committed, sealed } = self.lengths;
        for (index, value) in [length, committed, sealed].into_iter().enumerate() {
            put(48 + 8 * index, &(value as u64).to_le_bytes());
        }
        for (index, value) in self.counts.into_iter().enumerate() {
            put(72 + 8 * index, &value.to_le_bytes());
        }
        for (index, value) in self.checksums.into_iter().enumerate() {
            put(96 + 4 * index, &value.to_le_bytes());
        }
        let fingerprint = fingerprint(&bytes);
        bytes[44..48].copy_from_slice(&fingerprint.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..108]);
        bytes[108..112].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a header whose fixed part is checked.
    fn from_bytes(bytes: &[u8], layers: usize) -> Result<Self, Error> {
        let format = |text: String| Err(Error::Format(text));
        if bytes.len() != FIXED_BYTES + layers * LAYER_BYTES {
            return format(format!(
                "header of {} bytes: expected {} for {layers} layers; the file is truncated",
                bytes.len(),
                FIXED_BYTES + layers * LAYER_BYTES
            ));
        }
        let found = fingerprint(bytes);
        if u32_at(bytes, 44) != found {
            return format(format!(
                "fingerprint {:08x}: expected {found:08x}, that of configuration and layers; the file is corrupted",
                u32_at(bytes, 44)
            ));
        }
        let config = config_of(bytes)?;
        let slot_type = match u32_at(bytes, 36) {
            2 => SlotType::Float16,
            4 => SlotType::Float32,
            other => {
                return format(format!(
                    "slot elements of {other} bytes: expected 2 or 4; the file is inconsistent"
                ));
            }
        };
        let mut shapes = Vec::with_capacity(layers);
        for (index, layer) in bytes[FIXED_BYTES..].chunks_exact(LAYER_BYTES).enumerate() {
            let u16_at = |at: usize| usize::from(u16::from_le_bytes([layer[at], layer[at + 1]]));
            let shape = LayerShape { kv_heads: u16_at(0), head_dim: u16_at(2) };
            let known = config.with_head_dim(shape.head_dim).is_ok();
            if !known || u32_at(layer, 4) as usize != record_bytes(&config, shape.head_dim) {
                return format(format!(
                    "layer {index} of head_dim {} with records of {} bytes: expected sizes that the format has; the file is inconsistent",
                    shape.head_dim,
                    u32_at(layer, 4)
                ));
            }
            shapes.push(shape);
        }
        if config.head_dim() != shapes[0].head_dim {
            return format(format!(
                "head_dim {} of layer 0: expected {}, as in the list of layers; the file is inconsistent",
                config.head_dim(),
                shapes[0].head_dim
            ));
        }
        let number = |at: usize| usize::try_from(u64_at(bytes, at)).unwrap_or(usize::MAX);
        Ok(Self {
            config,
            slot_type,
            layers: shapes,
            lengths: Lengths { length: number(48), committed: number(56), sealed: number(64) },
            counts: [72, 80, 88].map(|at| u64_at(bytes, at)),
            checksums: [96, 100].map(|at| u32_at(bytes, at)),
        })
    }

    /// Checks that a pool of this layout can hold such a sequence, and returns the size of its image.
    fn check(&self, layout: &PoolLayout) -> Result<ImageSize, Error> {
        let other = |what: &str, got: String, expected: String| {
            Err(Error::Format(format!(
                "{what} {got} of the saved sequence: expected {expected}, as the pool has; load it into a pool made alike"
            )))
        };
        let (ours, theirs) = (&layout.config, &self.config);
        for (what, got, expected) in [
            ("key_bits", theirs.key_bits().get(), ours.key_bits().get()),
            ("value_bits", theirs.value_bits().get(), ours.value_bits().get()),
            ("group", theirs.group(), ours.group()),
            ("refit", usize::from(theirs.refit()), usize::from(ours.refit())),
            ("iterations", theirs.iterations(), ours.iterations()),
            ("sink_tokens", theirs.sink_tokens(), ours.sink_tokens()),
            ("recent_tokens", theirs.recent_tokens(), ours.recent_tokens()),
            ("layers", self.layers.len(), layout.layers.len()),
        ] {
            if got != expected {
                return other(what, got.to_string(), expected.to_string());
            }
        }
        if self.slot_type != layout.slot_type {
            let name = |slot_type| match slot_type {
                SlotType::Float16 => "float16",
                SlotType::Float32 => "float32",
            };
            return other("dtype", name(self.slot_type).into(), name(layout.slot_type).into());
        }
        for (index, (theirs, layer)) in self.layers.iter().zip(&layout.layers).enumerate() {
            let ours = layer.shape;
            if theirs.kv_heads != ours.kv_heads {
                let got = format!("{} in layer {index}", theirs.kv_heads);
                return other("kv_heads", got, ours.kv_heads.to_string());
            }
            if theirs.head_dim != ours.head_dim {
                let got = format!("{} in layer {index}", theirs.head_dim);
                return other("head_dim", got, ours.head_dim.to_string());
            }
        }
        let Lengths { length, committed, sealed } = self.lengths;
        let rule = &layout.rule;
        let size = self.lengths.are_possible(rule).then(|| layout.image_size(&self.lengths)).flatten();
        let size = size.ok_or_else(|| {
            Error::Format(format!(
                "{length} tokens, {committed} committed, {sealed} tiles sealed: expected lengths that a sequence can have; the file is inconsistent"
            ))
        })?;
        let pages = self.lengths.pages(rule);
        let counts = [pages as u64, self.lengths.slots(rule) as u64, size.records as u64];
        if self.counts != counts {
            return Err(Error::Format(format!(
                "tiles with records, tiles with slots, bytes of records {:?}: expected {counts:?} for {length} tokens; the file is inconsistent",
                self.counts
            )));
        }
        Ok(size)
    }
}

/// Checks that all parameters of the records and all elements of the slots are finite: a backend multiplies what it skips
/// by zero.
fn check_finite(layout: &PoolLayout, lengths: &Lengths, records: &[u8], slots: &[u8]) -> Result<(), Error> {
    let format = |text: String| {
        Err(Error::Format(format!("{text}: expected finite numbers; no pool wrote this file")))
    };
    let mut rest = records;
    for (index, layer) in layout.layers.iter().enumerate() {
        let (records, after) = rest.split_at(layer.page_bytes * lengths.pages(&layout.rule));
        rest = after;
        for record in records.chunks_exact(layer.layout.record_bytes) {
            if !parameters_are_finite(&layer.layout, record) {
                return format(format!("a NaN or infinite parameter of a record of layer {index}"));
            }
        }
    }
    let finite = match layout.slot_type {
        SlotType::Float16 => halves_are_finite(slots),
        SlotType::Float32 => slots
            .chunks_exact(4)
            .all(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).is_finite()),
    };
    if finite { Ok(()) } else { format("a NaN or infinity in a slot".into()) }
}

fn parameters_are_finite(layout: &RecordLayout, record: &[u8]) -> bool {
    [&layout.key, &layout.value].into_iter().all(|matrix| {
        [&matrix.row_scale, &matrix.row_zero, &matrix.column_scale]
            .into_iter()
            .all(|range| halves_are_finite(&record[range.clone()]))
    })
}

fn halves_are_finite(bytes: &[u8]) -> bool {
    // The high byte holds sign, the five bits of the exponent and two of the fraction.
    bytes.chunks_exact(2).all(|half| half[1] & 0x7c != 0x7c)
}

fn record_bytes(config: &Config, head_dim: usize) -> usize {
    RecordLayout::new(head_dim, config.group(), config.key_bits(), config.value_bits()).record_bytes
}

fn fingerprint(header: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[HASHED]);
    hasher.update(&header[FIXED_BYTES..]);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn io(error: &std::io::Error) -> Error {
    Error::Format(format!("input or output failed: {error}"))
}

#[cfg(test)]
mod tests;
