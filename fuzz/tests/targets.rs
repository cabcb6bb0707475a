//! Every target with random input: some thousand cases each, or `PROPTEST_CASES` of them. What fails is made small and
//! printed; `PROPTEST_RNG_SEED` repeats a run.

use std::sync::OnceLock;

use kvarn::{ConfigOptions, GROUPS};
use kvarn_fuzz::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// The environment's number of cases, or so many.
fn cases(usual: u32) -> ProptestConfig {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    ProptestConfig { cases: if asked { config.cases } else { usual }, ..config }
}

/// Places near the beginning, where headers are, and anywhere.
fn place() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0..144_usize, 1 => any::<usize>()]
}

/// Numbers that are likely to matter: small, around powers of two, any.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => 0..400_u32,
        2 => (0..32_u32, -2..3_i64).prop_map(|(bit, more)| ((1_i64 << bit) + more) as u32),
        1 => any::<u32>(),
    ]
}

/// Valid files of sequences: empty, all in slots, and with records; made once.
fn sequence_files() -> &'static [Vec<u8>] {
    static FILES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    FILES
        .get_or_init(|| [(0, 0), (70, 3), (300, 0), (330, 12)].map(|(n, hold)| sequence_file(n, hold)).into())
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|(at, value)| Edit::Set(at, value)),
        4 => (place(), 0..8_u8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        6 => (place(), number()).prop_map(|(at, value)| Edit::Number(at, value)),
        1 => place().prop_map(Edit::Cut),
        1 => (any::<usize>(), any::<u8>()).prop_map(|(count, value)| Edit::Extend(count, value)),
        1 => (place(), any::<usize>()).prop_map(|(at, count)| Edit::Remove(at, count)),
    ];
    vec(edit, 0..5)
}

fn config() -> impl Strategy<Value = ConfigOptions> {
    let bits = || select(vec![2_usize, 3, 4, 8]);
    (1..=16_usize, bits(), bits(), select(GROUPS.to_vec())).prop_map(
        |(sixteens, key_bits, value_bits, group)| ConfigOptions {
            head_dim: 16 * sixteens,
            key_bits,
            value_bits,
            group,
            ..ConfigOptions::from_name("kvarn", 16).unwrap()
        },
    )
}

/// Sizes, strides and offsets: sensible, negative, huge.
fn size() -> impl Strategy<Value = i64> {
    prop_oneof![
        6 => 0..5_i64,
        1 => -3..1_i64,
        2 => (0..64_u32, -2..3_i64).prop_map(|(bit, more)| (1_i64 << bit).wrapping_add(more)),
        1 => any::<i64>(),
    ]
}

fn lent() -> impl Strategy<Value = LentTensor> {
    let sizes = || prop_oneof![4 => prop::array::uniform8(size()).prop_map(Some), 1 => Just(None)];
    let dtype = prop_oneof![
        6 => select(vec![(2_u8, 16_u8, 1_u16), (4, 16, 1), (2, 32, 1), (1, 8, 1), (0, 32, 1)]),
        1 => (0..16_u8, select(vec![0_u8, 1, 4, 8, 16, 32, 64, 128]), 0..3_u16),
        1 => any::<(u8, u8, u16)>(),
    ];
    let address =
        prop_oneof![1 => Just(0_usize), 4 => (1..1_usize << 40).prop_map(|at| at * 64), 2 => any::<usize>()];
    let version = prop_oneof![
        2 => Just(None), 4 => (Just(1_u32), 0..9_u32).prop_map(Some), 1 => any::<(u32, u32)>().prop_map(Some)
    ];
    let device = (
        prop_oneof![4 => Just(1), 1 => 0..20_i32, 1 => any::<i32>()],
        prop_oneof![3 => Just(0), 1 => any::<i32>()],
    );
    let ndim = prop_oneof![6 => 0..5_i32, 1 => -2..12_i32, 1 => any::<i32>()];
    let offset = prop_oneof![4 => (0..9_u64).prop_map(|at| at * 4), 1 => any::<u64>()];
    (device, ndim, dtype, (sizes(), sizes()), offset, address, version, any::<u64>()).prop_map(
        |(device, ndim, dtype, (shape, strides), byte_offset, address, version, flags)| LentTensor {
            device,
            ndim,
            dtype,
            shape,
            strides,
            byte_offset,
            address,
            version,
            flags,
        },
    )
}

proptest! {
    #![proptest_config(cases(4096))]

    #[test]
    fn any_bytes_are_no_file(file in vec(any::<u8>(), 0..300), magic in 0..3_usize) {
        let magic: &[u8] = [&b""[..], b"KVARNSEQ\x01\0\0\0", b"KVARNREC\x01\0\0\0"][magic];
        let file = [magic, &file].concat();
        saved_sequence(&file);
        saved_records(&file);
    }

    #[test]
    fn damaged_sequences(
        file in select(sequence_files()),
        edits in edits(),
        forge in any::<bool>(),
    ) {
        let mut bad = damaged(file.clone(), &edits);
        if forge {
            forge_sequence(&mut bad);
        }
        let read = saved_sequence(&bad);
        prop_assert!(read || bad != file);
        prop_assert!(forge || !read || bad == file);
    }

    #[test]
    fn damaged_records(edits in edits(), forge in any::<bool>()) {
        let file = records_file();
        let mut bad = damaged(file.clone(), &edits);
        if forge {
            forge_records(&mut bad);
        }
        let read = saved_records(&bad);
        prop_assert!(read || bad != file);
        prop_assert!(forge || !read || bad == file);
    }

    #[test]
    fn lent_tensors(lent in lent()) {
        lent_tensor(&lent);
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn published_records(config in config(), seed in any::<u64>(), off in prop_oneof![8 => Just(0_isize), 1 => -9..9_isize]) {
        let bytes = kvarn::Config::new(&config).ok().and_then(|config| kvarn::record::published_bytes(&config).ok());
        let count = bytes.unwrap_or(100).saturating_add_signed(off);
        // A small generator of our own: vectors of this length are slow to make and to shrink.
        let mut state = seed | 1;
        let random = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        let mut bytes: Vec<u8> = (0..count).map(random).collect();
        let read = published_record(&config, &bytes);
        // The same with parameters that are finite.
        for byte in &mut bytes {
            *byte &= 0xbb;
        }
        prop_assert_eq!(published_record(&config, &bytes), read);
    }
}

#[test]
fn the_generators_reach_what_is_accepted() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut draw = |count: usize, accept: &mut dyn FnMut(&mut TestRunner) -> bool| {
        (0..count).filter(|_| accept(&mut runner)).count()
    };
    let tensors = draw(2000, &mut |runner| lent_tensor(&lent().new_tree(runner).unwrap().current()));
    let files = draw(2000, &mut |runner| {
        let file = &sequence_files()[3];
        let mut bad = damaged(file.clone(), &edits().new_tree(runner).unwrap().current());
        let changed = bad != *file;
        forge_sequence(&mut bad);
        changed && saved_sequence(&bad)
    });
    assert!(tensors > 100, "{tensors} of 2000 tensors are granted");
    assert!(files > 100, "{files} of 2000 changed files are accepted");
}
