//! Constants of the headers in `cuda/`, printed by a program that the host's compiler makes of them, against those here.

use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use kvarn::record::{ParameterOrder, RecordLayout};
use kvarn::{Bits, Config, ConfigOptions};

use super::*;
use crate::params::{
    AppendParams, AttendParams, Cache, ExpandParams, ITEM_TILES, ITEM_WORDS, SEAL_WORDS, SHARE_WORDS, Tensor,
};

const GROUPS: [usize; 2] = [64, 128];

/// Compiles `body` as the program's main function, with the host headers; gives the lines it prints.
fn printed(name: &str, body: &str) -> Vec<String> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda");
    let folder = Path::new(env!("OUT_DIR")).join("host");
    std::fs::create_dir_all(&folder).unwrap();
    let (source, program) = (folder.join(format!("{name}.cpp")), folder.join(name));
    let text = format!(
        "#include <cstddef>\n#include <cstdio>\n#include \"params.cuh\"\n#include \"shape.cuh\"\n\
         using namespace kvarn;\nint main() {{\n{body}}}\n"
    );
    std::fs::write(&source, text).unwrap();
    let compiled = Command::new("c++")
        .args(["-std=c++17", "-Wall", "-I"])
        .args([&sources, Path::new("-o"), &program, &source])
        .output()
        .expect("c++ is needed for this test");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let output = Command::new(&program).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect()
}

fn line(numbers: &[usize]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn bits(number: usize) -> Bits {
    Bits::new(number, "bits").unwrap()
}

fn config(head_dim: usize, group: usize, (key_bits, value_bits): (usize, usize)) -> Config {
    let defaults = ConfigOptions::from_name("kvarn_k4v2_g128", head_dim).unwrap();
    Config::new(&ConfigOptions { group, key_bits, value_bits, ..defaults }).unwrap()
}

#[test]
fn records_have_the_same_offsets() {
    let (mut body, mut expected) = (String::new(), Vec::new());
    for head_dim in HEAD_DIMS {
        for group in GROUPS {
            for (k, v) in BITS {
                let _ = writeln!(
                    body,
                    "{{ using L = Layout<{head_dim}, {group}, {k}, {v}>;\n\
                     std::printf(\"%d %d %d %d %d %d %d %d %d %d %d %d\\n\", L::key_codes, L::key_channel_scale, \
                     L::key_channel_zero, L::key_token_scale, L::key_end, L::value_codes, L::value_channel_scale, \
                     L::value_token_scale, L::value_token_zero, L::value_end, L::record_bytes, \
                     code_words({head_dim}, {group}, {k})); }}"
                );
                let layout = RecordLayout::new(head_dim, group, bits(k), bits(v));
                let (key, value) = (&layout.key, &layout.value);
                expected.push(line(&[
                    key.codes.start,
                    key.row_scale.start,
                    key.row_zero.start,
                    key.column_scale.start,
                    key.column_scale.end,
                    value.codes.start,
                    value.column_scale.start,
                    value.row_scale.start,
                    value.row_zero.start,
                    value.row_zero.end,
                    layout.record_bytes,
                    key.code_order.words(),
                ]));
            }
        }
    }
    assert_eq!(printed("records", &body), expected);
}

#[test]
fn parameters_and_words_have_the_same_order() {
    let (mut body, mut expected) = (String::new(), Vec::new());
    for count in [64, 96, 128, 256] {
        let _ = writeln!(
            body,
            "for (int i = 0; i < {count}; i++) std::printf(\"%d %d\\n\", row_order(i, {count}), k_order(i, {count}));"
        );
        expected.extend((0..count).map(|index| {
            line(&[ParameterOrder::output(count).byte(index), ParameterOrder::reduction(count).byte(index)])
        }));
    }
    for (head_dim, width) in [(64, 2), (96, 3), (128, 4), (256, 8), (96, 2)] {
        let order = RecordLayout::new(head_dim, 64, bits(width), bits(width)).key.code_order;
        let words = order.words();
        let _ = writeln!(
            body,
            "for (int lane = 0; lane < 32; lane++) for (int word = 0; word < {words}; word++) \
             std::printf(\"%d\\n\", code_word_byte({words}, lane, word));"
        );
        for lane in 0..32 {
            expected.extend((0..words).map(|word| line(&[order.word_byte(lane, word)])));
        }
    }
    assert_eq!(printed("orders", &body), expected);
}

#[test]
fn appends_have_the_same_shared_memory_and_whole_vectors() {
    let mut body = String::new();
    let shapes: Vec<(usize, usize)> =
        HEAD_DIMS.into_iter().flat_map(|d| GROUPS.map(|group| (d, group))).collect();
    for (head_dim, group) in &shapes {
        let _ = writeln!(
            body,
            "std::printf(\"%d %d\\n\", append_shared_bytes<{head_dim}, {group}>, append_threads<{head_dim}, {group}>);"
        );
    }
    for (found, (head_dim, group)) in printed("appends", &body).iter().zip(shapes) {
        let (shared, threads) = found.split_once(' ').unwrap();
        assert_eq!(shared.parse::<u32>().unwrap(), append_shared(head_dim, group), "{head_dim} {group}");
        let (threads, lanes): (usize, _) = (threads.parse().unwrap(), append_lanes(head_dim));
        assert!(threads <= 1024 && threads % lanes == 0, "{head_dim} {group}");
        assert!(8 * lanes >= head_dim && 32 % lanes == 0);
    }
}

/// Lines of the C++ program and of this one: the size of a struct, then the offsets of its fields.
macro_rules! compare {
    ($body:ident, $expected:ident, $type:ident { $($field:ident),* }) => {
        let _ = writeln!($body, "std::printf(\"{0} %zu\\n\", sizeof({0}));", stringify!($type));
        $expected.push(format!("{} {}", stringify!($type), size_of::<$type>()));
        $(
            let theirs = stringify!($field);
            let _ = writeln!($body, "std::printf(\"{theirs} %zu\\n\", offsetof({}, {theirs}));", stringify!($type));
            $expected.push(format!("{theirs} {}", offset_of!($type, $field)));
        )*
    };
}

#[test]
fn parameters_have_the_same_sizes_and_offsets() {
    let (mut body, mut expected) = (String::new(), Vec::new());
    compare!(body, expected, Tensor { data, row_stride, head_stride });
    compare!(body, expected, Cache { pages, slots, kv_heads, unused });
    compare!(
        body,
        expected,
        AppendParams {
            k,
            v,
            cache,
            slot_of_row,
            seals,
            counts,
            rows,
            seals_count,
            dtype,
            rotated,
            refit,
            iterations,
            key_bits,
            value_bits
        }
    );
    compare!(
        body,
        expected,
        AttendParams {
            q,
            out,
            cache,
            items,
            shares,
            sink_logits,
            lse,
            partial_out,
            partial_base_sum,
            counters,
            dtype,
            rotated,
            group,
            columns,
            window,
            sink_tokens,
            scale,
            softcap
        }
    );
    compare!(
        body,
        expected,
        ExpandParams {
            k,
            v,
            cache,
            block_table,
            slot_table,
            first,
            tokens,
            dtype,
            rotated,
            sink_tokens,
            key_bits,
            value_bits,
            unused
        }
    );
    // The words that plan.rs writes, in its order.
    for (index, field) in ["page", "slot", "from_row_token", "row"].iter().enumerate() {
        let _ = writeln!(body, "std::printf(\"{field} %zu\\n\", offsetof(Seal, {field}));");
        expected.push(format!("{field} {}", 4 * index));
    }
    let item = [
        "first_tile",
        "tiles",
        "slot",
        "slot_tokens",
        "part",
        "parts",
        "query_row",
        "query_tokens",
        "position",
        "stored",
        "first_part",
        "unused",
        "pages",
    ];
    for (index, field) in item.iter().enumerate() {
        let _ = writeln!(body, "std::printf(\"{field} %zu\\n\", offsetof(Item, {field}));");
        expected.push(format!("{field} {}", 4 * index));
    }
    for (index, field) in ["item", "head", "count", "unused", "first"].iter().enumerate() {
        let _ = writeln!(body, "std::printf(\"{field} %zu\\n\", offsetof(Share, {field}));");
        expected.push(format!("{field} {}", 4 * index));
    }
    body += "std::printf(\"%zu %zu %zu %d\\n\", sizeof(Seal), sizeof(Item), sizeof(Share), kItemTiles);\n";
    expected.push(line(&[4 * SEAL_WORDS, 4 * ITEM_WORDS, 4 * SHARE_WORDS, ITEM_TILES]));
    assert_eq!(printed("params", &body), expected);
}

#[test]
fn attention_takes_the_memory_worked_out_by_hand() {
    // D 128, G 128, k4v2: K 8192 + 512 + 256, V 4096 + 256 + 512 bytes, more than the results of eight columns, 8 · 132 · 4,
    // but less than those of sixteen; 16 of barriers. Then 4096 of fragments for each eight columns, four shares of
    // 48 words, a unit and as many words as columns, a flag.
    let four = config(128, 128, (4, 2));
    let made = |columns| AttendGeometry::new(&four, 4, columns).unwrap();
    assert_eq!((made(4).blocks, made(9).blocks), (1, 2));
    assert_eq!(made(4).shared(&four, 4), 4 * (8_960 + 4_864 + 16) + 4_096 + 768 + 48);
    assert_eq!(made(9).shared(&four, 4), 4 * (8_960 + 8_448 + 16) + 2 * 4_096 + 768 + 80);
    assert_eq!((made(4).query_tokens(4), made(9).query_tokens(4), made(9).query_tokens(3)), (2, 4, 5));
    assert_eq!(made(9).name(&four), "kvarn_attend_d128_g128_k4v2_n2");

    // D 256, G 128, k8v8: a warp's buffers are 2 · 32 768 + 1280 + 1024 bytes; one block of columns only.
    let large = config(256, 128, (8, 8));
    let wide = AttendGeometry::new(&large, 2, 64).unwrap();
    assert_eq!((wide.blocks, wide.shared(&large, 2)), (1, 2 * (67_840 + 16) + 8_192 + 768 + 48));

    // D 128, G 128, k4v4: three blocks fit a multiprocessor of 228 KB, where each takes 1 KB more than it asks for.
    let both = config(128, 128, (4, 4));
    let most = AttendGeometry::new(&both, 4, 4).unwrap().shared(&both, 4);
    assert!(3 * (most + 1_024) <= 228 * 1_024, "{most}");
}

#[test]
fn attention_fits_every_device_and_every_ratio_that_is_promised() {
    for head_dim in HEAD_DIMS {
        for group in GROUPS {
            for pair in BITS {
                let config = config(head_dim, group, pair);
                check(&config).unwrap();
                let most = if head_dim == 256 { 8 } else { 16 };
                for ratio in 1..=most {
                    let geometry = AttendGeometry::new(&config, ratio, 1000).unwrap();
                    assert!(geometry.query_tokens(ratio) >= 1);
                    // One warp fits the devices with the least shared memory, two those with more.
                    assert!(geometry.shared(&config, 1) <= 99 * 1024, "{geometry:?}");
                    assert!(geometry.shared(&config, 2) <= 163 * 1024, "{geometry:?}");
                }
                assert_eq!(AttendGeometry::new(&config, most + 1, 1), None);
            }
        }
    }
}

#[test]
fn configurations_without_kernels_are_refused() {
    for refused in [config(80, 128, (4, 2)), config(128, 128, (2, 4))] {
        assert!(matches!(check(&refused), Err(Error::Unsupported { .. })));
    }
}
