//! What the bytes of a pool's tiles depend on besides the tokens, in 16 bytes.

use super::PoolLayout;
use crate::codec::SlotType;
use crate::record::FORMAT_VERSION;

/// Equal for pools whose pages and slots are interchangeable: format version, configuration, slot type and layer shapes are
/// those of the other. Every option of the configuration counts; the number of pages and slots, and the device, do not.
pub(super) fn fingerprint(layout: &PoolLayout) -> [u8; 16] {
    let config = &layout.config;
    let slot_type = match layout.slot_type {
        SlotType::Float16 => 0,
        SlotType::Float32 => 1,
    };
    let options = [
        FORMAT_VERSION as usize,
        config.key_bits().get(),
        config.value_bits().get(),
        config.group(),
        usize::from(config.refit()),
        config.iterations(),
        config.sink_tokens(),
        config.recent_tokens(),
        slot_type,
    ];
    let shapes = layout.layers.iter().flat_map(|layer| [layer.shape.kv_heads, layer.shape.head_dim]);
    let bytes = options.into_iter().chain(shapes).flat_map(|number| (number as u64).to_le_bytes());
    fnv_1a(bytes).to_le_bytes()
}

/// The 128-bit hash of Fowler, Noll and Vo, variant 1a: it tells configurations apart, and withstands nobody who looks for
/// collisions.
fn fnv_1a(bytes: impl Iterator<Item = u8>) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = (1 << 88) + 0x13b;
    bytes.fold(BASIS, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::pool::LayerShape;
    use crate::{Config, ConfigOptions};

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(fnv_1a(b"".iter().copied()), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv_1a(b"a".iter().copied()), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
        assert_eq!(fnv_1a(b"foobar".iter().copied()), 0x343e_1662_793c_64bf_6f0d_3597_ba44_6f18);
    }

    #[test]
    fn whatever_changes_the_bytes_changes_the_fingerprint_and_nothing_else() {
        let made = |change: fn(&mut ConfigOptions), shapes: &[(usize, usize)], slot_type, pages| {
            let mut options = ConfigOptions::from_name("kvarn_k4v2_g64", 64).unwrap();
            change(&mut options);
            let layers: Vec<LayerShape> =
                shapes.iter().map(|&(kv_heads, head_dim)| LayerShape { kv_heads, head_dim }).collect();
            let config = Config::new(&options).unwrap();
            fingerprint(&PoolLayout::new(config, &layers, pages, 2, slot_type).unwrap())
        };
        let shapes: &[(usize, usize)] = &[(2, 64), (1, 32)];
        let mut seen = BTreeMap::new();
        let changes: [fn(&mut ConfigOptions); 8] = [
            |_| (),
            |options| options.key_bits = 2,
            |options| options.value_bits = 4,
            |options| options.group = 128,
            |options| options.refit = false,
            |options| options.iterations = 7,
            |options| options.sink_tokens = Some(16),
            |options| options.recent_tokens = 1,
        ];
        for (index, change) in changes.into_iter().enumerate() {
            assert_eq!(seen.insert(made(change, shapes, SlotType::Float16, 4), index), None);
        }
        let same: fn(&mut ConfigOptions) = |_| ();
        for other in [&[(2, 64)][..], &[(1, 32), (2, 64)], &[(2, 64), (1, 48)]] {
            assert_eq!(seen.insert(made(same, other, SlotType::Float16, 4), 99), None);
        }
        assert_eq!(seen.insert(made(same, shapes, SlotType::Float32, 4), 99), None);
        assert_eq!(seen[&made(|options| options.head_dim = 128, shapes, SlotType::Float16, 9)], 0);
    }
}
