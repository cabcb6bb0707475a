//! Pools against a plain model, over random operations.
//!
//! The model of a sequence is a list of float32 rows, one for each token, which the reference codec rewrites when a tile
//! is sealed. After every operation the pool's references, bytes, lengths and tables are those of the model; what it reads
//! back is the model's, bit by bit; attention is compared with float64.
//!
//! `KVARN_MODEL_OPERATIONS` sets the operations of all configurations together, `KVARN_MODEL_SEED` the seed of the first
//! pool, `KVARN_MODEL_ONLY` numbers of operations on that pool.

mod accounting;
mod attention;
mod codec;
mod contents;
mod floats;
mod open_step;
mod operations;
mod prefix;
mod quiet;
mod report;
mod rule;
mod run;
mod sequence;
mod setup;
mod shrink;
mod values;
mod world;

use kvarn::DType;

use run::{Order, run};
use setup::Setup;

/// Operations of the suite, all configurations together.
const OPERATIONS: u64 = 108_000;

/// What a user asked for, a share of the default where nothing is said.
fn order(index: u64) -> Order {
    let number = |name: &str| -> Option<u64> {
        let text = std::env::var(name).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{name} {text}: expected a number")))
    };
    let only = std::env::var("KVARN_MODEL_ONLY").ok().map(|list| {
        let number = |text: &str| {
            text.parse().unwrap_or_else(|_| panic!("KVARN_MODEL_ONLY {text}: expected a number"))
        };
        list.split(',').map(number).collect()
    });
    Order {
        operations: number("KVARN_MODEL_OPERATIONS").unwrap_or(OPERATIONS).div_ceil(NAMES.len() as u64),
        // No two configurations run the same operations.
        seed: number("KVARN_MODEL_SEED").unwrap_or(1 + 1_000_000 * index),
        only,
    }
}

/// One test for each configuration, so that they run side by side and are named when they fail.
macro_rules! setups {
    ($($name:ident: $setup:expr;)*) => {
        const NAMES: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                static SETUP: Setup = $setup;
                let index = NAMES.iter().position(|&name| name == stringify!($name)).unwrap();
                run(stringify!($name), &SETUP, &order(index as u64));
            }
        )*
    };
}

const BASE: Setup = Setup {
    codec: "kvarn_k4v2_g64",
    refit: true,
    iterations: 8,
    sink_tokens: 64,
    recent_tokens: 0,
    layers: &[(1, 64)],
    pages: 4..=40,
    slots: 4..=24,
    input: DType::Float16,
};

setups! {
    k4v2_g64: BASE;
    k4v2_g64_two_heads: Setup { layers: &[(2, 64)], sink_tokens: 0, iterations: 2, ..BASE };
    k4v2_g64_partial_sinks: Setup { sink_tokens: 16, recent_tokens: 20, iterations: 1, ..BASE };
    k4v2_g64_float32: Setup { input: DType::Float32, sink_tokens: 32, layers: &[(2, 32)], ..BASE };
    k4v4_g64_recent: Setup { codec: "kvarn_k4v4_g64", recent_tokens: 100, slots: 6..=40, sink_tokens: 0, ..BASE };
    k2v2_g64_two_layers: Setup { codec: "kvarn_k2v2_g64", layers: &[(1, 64), (2, 16)], iterations: 2, ..BASE };
    k8v8_g64_as_published: Setup {
        codec: "kvarn_k8v8_g64", refit: false, sink_tokens: 48, recent_tokens: 64, input: DType::BFloat16, ..BASE
    };
    k3v3_g64_float32: Setup {
        codec: "kvarn_k3v3_g64", input: DType::Float32, layers: &[(1, 32), (1, 48)], sink_tokens: 0, iterations: 1, ..BASE
    };
    k4v2_g128: Setup { codec: "kvarn_k4v2_g128", sink_tokens: 128, layers: &[(1, 32)], iterations: 2, pages: 2..=20, ..BASE };
    k4v4_g128_as_published: Setup {
        codec: "kvarn_k4v4_g128", refit: false, sink_tokens: 16, layers: &[(1, 64)], iterations: 2, pages: 2..=20, ..BASE
    };
    k2v2_g128_longest_window: Setup {
        codec: "kvarn_k2v2_g128", sink_tokens: 0, recent_tokens: 512, layers: &[(1, 16)], slots: 6..=48, pages: 2..=16, ..BASE
    };
    k8v4_g128_bfloat16: Setup {
        codec: "kvarn_k8v4_g128", sink_tokens: 128, recent_tokens: 1, layers: &[(2, 16), (1, 16)], input: DType::BFloat16,
        pages: 2..=20, ..BASE
    };
}

#[test]
fn pools_of_several_threads_do_not_disturb_each_other() {
    static SETUP: Setup = BASE;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let order = Order { operations: 1500, seed: 1000 + 100 * thread, only: None };
                run("several_threads", &SETUP, &order);
            });
        }
    });
}
