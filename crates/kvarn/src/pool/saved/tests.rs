//! Saved sequences are read as they were written, or refused.

use super::*;
use crate::ConfigOptions;

fn options() -> ConfigOptions {
    ConfigOptions {
        sink_tokens: Some(16),
        recent_tokens: 3,
        ..ConfigOptions::from_name("kvarn_k3v2_g64", 16).unwrap()
    }
}

const LAYERS: [LayerShape; 2] =
    [LayerShape { kv_heads: 1, head_dim: 16 }, LayerShape { kv_heads: 2, head_dim: 32 }];

fn layout_of(options: &ConfigOptions, layers: &[LayerShape], slot_type: SlotType) -> PoolLayout {
    PoolLayout::new(Config::new(options).unwrap(), layers, 8, 8, slot_type).unwrap()
}

fn layout() -> PoolLayout {
    layout_of(&options(), &LAYERS, SlotType::Float16)
}

const LENGTHS: Lengths = Lengths { length: 150, committed: 140, sealed: 2 };

fn file() -> (PoolLayout, Vec<u8>, Vec<u8>) {
    let layout = layout();
    let bytes = layout.image_size(&LENGTHS).unwrap().bytes();
    // High bytes of halves below 0x7c: all are finite.
    let image: Vec<u8> = (0..bytes).map(|index| (index * 31 % 0x7b) as u8).collect();
    let mut file = sequence_header(&layout, &LENGTHS, &image);
    file.extend(&image);
    (layout, image, file)
}

/// Changes a header and makes its checksums good again.
fn forged(file: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = file.to_vec();
    change(&mut bytes);
    let layers = (u32_at(&bytes, 40) as usize).min((bytes.len() - FIXED_BYTES) / LAYER_BYTES);
    let print = fingerprint(&bytes[..FIXED_BYTES + layers * LAYER_BYTES]);
    bytes[44..48].copy_from_slice(&print.to_le_bytes());
    let checksum = crc32fast::hash(&bytes[..108]);
    bytes[108..112].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn refusal(bytes: &[u8], layout: &PoolLayout) -> String {
    match read_sequence(&mut &*bytes, layout) {
        Err(Error::Format(text)) => text,
        other => panic!("{other:?}: expected a format error"),
    }
}

#[test]
fn round_trip() {
    let (layout, image, file) = file();
    assert_eq!(file.len(), FIXED_BYTES + 2 * LAYER_BYTES + image.len());
    assert_eq!(read_sequence(&mut file.as_slice(), &layout).unwrap(), (LENGTHS, image));
    let empty = sequence_header(&layout, &Lengths::default(), &[]);
    assert_eq!(read_sequence(&mut empty.as_slice(), &layout).unwrap(), (Lengths::default(), vec![]));
}

#[test]
fn every_flipped_bit_and_every_truncation_is_refused() {
    let (layout, _, file) = file();
    for at in (0..400).chain((400..file.len()).step_by(97)).chain([file.len() - 1]) {
        let mut bad = file.clone();
        bad[at] ^= 1 << (at % 8);
        refusal(&bad, &layout);
        refusal(&file[..at], &layout);
    }
    let mut longer = file;
    longer.push(0);
    assert!(refusal(&longer, &layout).contains("trailing"));
}

#[test]
fn another_configuration_is_refused_with_both_values() {
    let (_, _, file) = file();
    let name = |name| ConfigOptions { ..ConfigOptions::from_name(name, 16).unwrap() };
    let expected = |what: &str, got: &str, ours: &str| {
        format!(
            "{what} {got} of the saved sequence: expected {ours}, as the pool has; load it into a pool made alike"
        )
    };
    for (options, text) in [
        (name("kvarn_k4v2_g64"), expected("key_bits", "3", "4")),
        (name("kvarn_k3v4_g64"), expected("value_bits", "2", "4")),
        (name("kvarn_k3v2_g128"), expected("group", "64", "128")),
        (ConfigOptions { refit: false, ..options() }, expected("refit", "1", "0")),
        (ConfigOptions { iterations: 7, ..options() }, expected("iterations", "8", "7")),
        (ConfigOptions { sink_tokens: None, ..options() }, expected("sink_tokens", "16", "64")),
        (ConfigOptions { recent_tokens: 0, ..options() }, expected("recent_tokens", "3", "0")),
    ] {
        assert_eq!(refusal(&file, &layout_of(&options, &LAYERS, SlotType::Float16)), text);
    }
    let other = layout_of(&options(), &LAYERS, SlotType::Float32);
    assert_eq!(refusal(&file, &other), expected("dtype", "float16", "float32"));
    let layers = |layers: &[LayerShape]| refusal(&file, &layout_of(&options(), layers, SlotType::Float16));
    assert_eq!(layers(&LAYERS[..1]), expected("layers", "2", "1"));
    let other = LayerShape { kv_heads: 3, head_dim: 32 };
    assert_eq!(layers(&[LAYERS[0], other]), expected("kv_heads", "2 in layer 1", "3"));
    let other = LayerShape { kv_heads: 2, head_dim: 48 };
    assert_eq!(layers(&[LAYERS[0], other]), expected("head_dim", "32 in layer 1", "48"));
}

#[test]
fn the_head_dim_of_the_pools_configuration_does_not_matter_where_layers_have_their_own() {
    let (_, image, file) = file();
    let options = ConfigOptions { head_dim: 128, ..options() };
    let other = layout_of(&options, &LAYERS, SlotType::Float16);
    assert_eq!(read_sequence(&mut file.as_slice(), &other).unwrap(), (LENGTHS, image.clone()));
    assert_eq!(sequence_header(&other, &LENGTHS, &image), file[..file.len() - image.len()]);
}

#[test]
fn forged_claims_are_refused() {
    let (layout, _, file) = file();
    let put = |at: usize, value: u64| {
        move |bytes: &mut [u8]| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes())
    };
    for (at, value) in [
        (48, 1 << 40),
        (48, u64::MAX),
        (48, 2_000_000_000),
        (56, 151),
        (56, u64::MAX),
        (64, 3),
        (64, 1),
        (64, u64::MAX),
        (72, 1),
        (80, 7),
        (88, 0),
    ] {
        refusal(&forged(&file, put(at, value)), &layout);
    }
    // Lengths that are possible, of far more than there is.
    let long = forged(&file, |bytes| {
        let length = 2_000_000_000_u64;
        let lengths = Lengths { length: length as usize, committed: length as usize, sealed: 31_249_999 };
        put(48, length)(bytes);
        put(56, length)(bytes);
        put(64, 31_249_999)(bytes);
        put(72, lengths.pages(&layout.rule) as u64)(bytes);
        put(80, lengths.slots(&layout.rule) as u64)(bytes);
        put(88, layout.image_size(&lengths).unwrap().records as u64)(bytes);
    });
    assert!(refusal(&long, &layout).contains("truncated"));
    for layers in [0, 1, 3, 1 << 20, u32::MAX] {
        let text =
            refusal(&forged(&file, |bytes| bytes[40..44].copy_from_slice(&layers.to_le_bytes())), &layout);
        assert!(text.contains("header of 128 bytes"), "{text}");
    }
    for (at, value) in
        [(36, 3_u8), (22, 0), (23, 2), (16, 15), (20, 5), (24, 65), (104, 1), (112, 0), (114, 8), (116, 1)]
    {
        refusal(&forged(&file, |bytes| bytes[at] = value), &layout);
    }
}

#[test]
fn what_is_not_finite_is_refused() {
    let (layout, image, _) = file();
    let size = layout.image_size(&LENGTHS).unwrap();
    let scale = layout.layers[0].layout.value.column_scale.start + 1;
    for (at, what) in [(scale, "record of layer 0"), (size.records + 1, "slot")] {
        let mut bad = image.clone();
        bad[at] = 0x7c;
        let mut file = sequence_header(&layout, &LENGTHS, &bad);
        file.extend(&bad);
        assert!(refusal(&file, &layout).contains(what));
    }
}
