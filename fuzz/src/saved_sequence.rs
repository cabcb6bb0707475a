//! Saved sequences, read by a pool.

use std::cell::OnceCell;
use std::sync::Arc;

use kvarn::codec::SlotType;
use kvarn::pool::{LayerShape, PoolError, read_sequence, sequence_header};
use kvarn::tables::SequenceId;
use kvarn::{Config, ConfigOptions, DType};
use kvarn_cpu::{Error, Pool, TensorRef};

use crate::most_allocated;

const LAYERS: [LayerShape; 2] =
    [LayerShape { kv_heads: 2, head_dim: 16 }, LayerShape { kv_heads: 1, head_dim: 32 }];
const PAGES: usize = 6;

thread_local! {
    static POOL: OnceCell<Arc<Pool>> = const { OnceCell::new() };
}

fn made() -> Arc<Pool> {
    let options = ConfigOptions {
        sink_tokens: Some(16),
        recent_tokens: 9,
        ..ConfigOptions::from_name("kvarn_k2v3_g64", 16).unwrap()
    };
    Pool::new(Config::new(&options).unwrap(), &LAYERS, PAGES, 6, SlotType::Float16).unwrap()
}

/// The pool that reads; one on each thread.
fn pool() -> Arc<Pool> {
    POOL.with(|pool| Arc::clone(pool.get_or_init(made)))
}

/// A valid file of a sequence of `tokens` tokens, the newest `hold` held.
pub fn sequence_file(tokens: usize, hold: usize) -> Vec<u8> {
    let pool = made();
    let sequence = pool.core().create();
    if tokens > 0 {
        let step = pool.step(&[sequence], &[tokens], &[hold]).unwrap();
        for (layer, LayerShape { kv_heads, head_dim }) in LAYERS.into_iter().enumerate() {
            let halves: Vec<u16> = (0..tokens * kv_heads * head_dim)
                .map(|index| 0x3000 + (index * 7919 % 0x1000) as u16 + (index as u16 & 1) * 0x8000)
                .collect();
            let strides = [(kv_heads * head_dim) as isize, head_dim as isize, 1];
            let shape = [tokens, kv_heads, head_dim];
            // SAFETY: shape and strides describe the vector.
            let rows = unsafe { TensorRef::from_raw(halves.as_ptr().cast(), DType::Float16, shape, strides) };
            step.append(layer, &rows, &rows, false).unwrap();
        }
        step.open().finish().unwrap();
    }
    saved(&pool, sequence)
}

fn saved(pool: &Pool, sequence: SequenceId) -> Vec<u8> {
    let saved = pool.save(sequence).unwrap();
    [&saved.header[..], &saved.image].concat()
}

/// Makes the checksums right, as far as there is a header and what it says is there.
pub fn forge_sequence(file: &mut [u8]) {
    if file.len() < 112 {
        return;
    }
    let number =
        |at: usize| u32::from_le_bytes([file[at], file[at + 1], file[at + 2], file[at + 3]]) as usize;
    let header = (112 + number(40).saturating_mul(8)).min(file.len());
    let records = number(88).min(file.len() - header);
    let mut fingerprint = crc32fast::Hasher::new();
    fingerprint.update(&file[16..44]);
    fingerprint.update(&file[112..header]);
    let image = &file[header..];
    let checksums =
        [fingerprint.finalize(), crc32fast::hash(&image[..records]), crc32fast::hash(&image[records..])];
    for (at, checksum) in [44, 96, 100].into_iter().zip(checksums) {
        file[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
    }
    let checksum = crc32fast::hash(&file[..108]);
    file[108..112].copy_from_slice(&checksum.to_le_bytes());
}

/// Reads any bytes and loads them into a pool: a file that is accepted is the one that would be written, and what is loaded is
/// saved and loaded again the same. Returns whether it was read.
///
/// # Panics
/// If it is not, the error is of another kind, something was left in the pool, or more memory was taken than the file is
/// worth.
pub fn saved_sequence(file: &[u8]) -> bool {
    let pool = pool();
    let layout = pool.core().layout();
    let (result, most) = most_allocated(|| read_sequence(&mut &*file, layout));
    assert!(most <= 4 * file.len() + 4096, "{most} bytes allocated for {}", file.len());
    let empty = pool.core().stats();
    match (result, pool.load(&mut &*file)) {
        (Ok((lengths, image)), Ok(sequence)) => {
            let header = sequence_header(layout, &lengths, &image);
            assert_eq!([&header[..], &image].concat(), file);
            assert_eq!(pool.core().view(sequence).unwrap().length, lengths.length);
            let again = saved(&pool, sequence);
            assert_eq!(again.len(), file.len());
            pool.core().free(sequence).unwrap();
            let sequence = pool.load(&mut &again[..]).unwrap();
            assert_eq!(saved(&pool, sequence), again);
            pool.core().free(sequence).unwrap();
            assert_eq!(pool.core().stats(), empty);
            true
        }
        (Ok((lengths, _)), Err(Error::Pool(PoolError::Table(_)))) => {
            assert!(lengths.length > 64 * PAGES.min(5), "{lengths:?}: refused though it fits");
            assert_eq!(pool.core().stats(), empty);
            true
        }
        (Err(kvarn::Error::Format(text)), Err(Error::Pool(PoolError::Codec(error)))) => {
            assert_eq!(error.to_string(), text);
            assert_eq!(pool.core().stats(), empty);
            false
        }
        other => panic!("{other:?}: expected the same answer twice"),
    }
}
