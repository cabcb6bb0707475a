use half::f16;
use kvarn::codec::{DecodeScratch, decode_matrix};
use kvarn::record::{EncodedMatrix, RecordLayout};

use super::*;

/// Numbers that look random, from -1 to 1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn number(&mut self) -> f32 {
        (self.next() % 20_001) as f32 / 10_000.0 - 1.0
    }
}

fn levels() -> Vec<Level> {
    Level::ALL.into_iter().filter(|&level| level <= Level::found()).collect()
}

/// A matrix of random codes and parameters within a record.
fn random_record(layout: &RecordLayout, matrix: &MatrixLayout, random: &mut Random) -> Vec<u8> {
    let mut encoded = EncodedMatrix::zeros(matrix);
    let codes = 1 << matrix.code_order.bits().get();
    encoded.codes.iter_mut().for_each(|code| *code = (random.next() % codes) as u8);
    for values in [&mut encoded.row_scale, &mut encoded.row_zero, &mut encoded.column_scale] {
        for value in values.iter_mut() {
            *value = f16::from_f32(random.number());
        }
    }
    // Subnormal and zero.
    encoded.row_scale[1] = f16::from_bits(3);
    encoded.column_scale[0] = f16::ZERO;
    let mut record = vec![0; layout.record_bytes];
    encoded.write(matrix, &mut record);
    record
}

/// Relative error of each column's product against float64 over the decoded matrix.
fn errors(matrix: &MatrixLayout, record: &[u8], x: &[f32], out: &[f32], before: &[f32]) -> Vec<f64> {
    let mut decoded = vec![0.0; matrix.rows * matrix.columns];
    decode_matrix(matrix, record, &mut DecodeScratch::default(), &mut decoded);
    let (x, out) = (x.chunks_exact(matrix.rows), out.chunks_exact(matrix.columns));
    x.zip(out.zip(before.chunks_exact(matrix.columns)))
        .map(|(x, (out, before))| {
            let (mut error, mut size) = (0.0, 0.0);
            for column in 0..matrix.columns {
                let exact: f64 = (0..matrix.rows)
                    .map(|row| f64::from(x[row]) * f64::from(decoded[row * matrix.columns + column]))
                    .sum();
                error += (f64::from(out[column]) - f64::from(before[column]) - exact).powi(2);
                size += exact.powi(2);
            }
            (error / size).sqrt()
        })
        .collect()
}

#[test]
fn products_agree_with_decoded_records_and_between_instruction_sets() {
    let (mut served, mut scratch) = (0, Scratch::default());
    for bits in Bits::ALL {
        for head_dim in (16..=256).step_by(16) {
            for group in [64, 128] {
                let layout = RecordLayout::new(head_dim, group, bits, bits);
                let mut random = Random(head_dim as u64 * 1000 + group as u64 + bits.get() as u64);
                for matrix in [&layout.key, &layout.value] {
                    let record = random_record(&layout, matrix, &mut random);
                    for columns in [1, 2, 3, 5, 8] {
                        if !serves(matrix) {
                            continue;
                        }
                        served += 1;
                        let x: Vec<f32> = (0..columns * matrix.rows).map(|_| random.number()).collect();
                        let before: Vec<f32> =
                            (0..columns * matrix.columns).map(|_| random.number()).collect();
                        let mut outs = levels().into_iter().map(|level| {
                            let mut out = before.clone();
                            let x = Matrix { values: &x, stride: matrix.rows };
                            let mut to = MatrixMut { values: &mut out, stride: matrix.columns };
                            assert!(multiply(level, matrix, &record, x, &mut to, columns, &[], &mut scratch));
                            out
                        });
                        let out = outs.next().unwrap();
                        // Keys set what values are added to.
                        let zeros = vec![0.0; before.len()];
                        let from = if matrix == &layout.key { &zeros } else { &before };
                        let found = errors(matrix, &record, &x, &out, from);
                        assert!(
                            found.iter().all(|error| *error < 5e-4),
                            "{bits:?} {head_dim} {group} {:?}: {found:?}",
                            matrix.code_order.side()
                        );
                        for other in outs {
                            for (a, b) in out.iter().zip(other) {
                                assert!((a - b).abs() <= 3e-5 * a.abs().max(1.0), "{a} {b}");
                            }
                        }
                    }
                }
            }
        }
    }
    // All but a few head dims, at 3 bits.
    assert!(served >= 1000, "{served}");
}

#[test]
fn what_is_zero_tiny_huge_or_not_finite() {
    let layout = RecordLayout::new(128, 128, Bits::Four, Bits::Two);
    let mut random = Random(7);
    for matrix in [&layout.key, &layout.value] {
        let record = random_record(&layout, matrix, &mut random);
        let mut scratch = Scratch::default();
        for level in levels() {
            for (factor, finite) in [
                (0.0, true),
                (1e-37, true),
                (1e-30, true),
                (1e30, true),
                (f32::NAN, false),
                (f32::INFINITY, false),
            ] {
                let mut x: Vec<f32> = (0..matrix.rows).map(|_| random.number() * 1e-3).collect();
                x[5] = factor;
                let mut out = vec![1.0; matrix.columns];
                let before = out.clone();
                let made = multiply(
                    level,
                    matrix,
                    &record,
                    Matrix { values: &x, stride: matrix.rows },
                    &mut MatrixMut { values: &mut out, stride: matrix.columns },
                    1,
                    &[],
                    &mut scratch,
                );
                assert_eq!(made, finite, "{factor}");
                if finite {
                    assert!(out.iter().all(|value| value.is_finite()));
                } else {
                    assert_eq!(out, before);
                }
            }
            let (mut out, zeros) = (vec![1.0; matrix.columns], vec![0.0; matrix.rows]);
            let (x, mut to) = (
                Matrix { values: &zeros, stride: matrix.rows },
                MatrixMut { values: &mut out, stride: matrix.columns },
            );
            assert!(multiply(level, matrix, &record, x, &mut to, 1, &[], &mut scratch));
            let expected = if matrix == &layout.key { 0.0 } else { 1.0 };
            assert_eq!(out, vec![expected; matrix.columns]);
        }
    }
}

#[test]
fn a_column_is_the_same_alone_and_beside_others() {
    for (bits, head_dim) in [(Bits::Two, 128), (Bits::Three, 64), (Bits::Four, 96), (Bits::Eight, 256)] {
        let layout = RecordLayout::new(head_dim, 128, bits, bits);
        let mut random = Random(11);
        for matrix in [&layout.key, &layout.value] {
            let record = random_record(&layout, matrix, &mut random);
            // Logits of some columns need a second product, those of others do not.
            let sizes = [1e-4, 1.0, 1e-3, 100.0, 1e-5];
            let columns = sizes.len();
            let x: Vec<f32> = sizes
                .iter()
                .flat_map(|size| vec![*size; matrix.rows])
                .map(|size| size * random.number())
                .collect();
            for level in levels() {
                let product = |x: &[f32], columns: usize| {
                    let mut out = vec![0.0; columns * matrix.columns];
                    let x = Matrix { values: x, stride: matrix.rows };
                    let mut to = MatrixMut { values: &mut out, stride: matrix.columns };
                    let mut scratch = Scratch::default();
                    assert!(multiply(level, matrix, &record, x, &mut to, columns, &[], &mut scratch));
                    out
                };
                let together = product(&x, columns);
                for (column, x) in x.chunks_exact(matrix.rows).enumerate() {
                    assert_eq!(product(x, 1), together[column * matrix.columns..][..matrix.columns]);
                }
            }
        }
    }
}

/// What a product with one record costs. Prints ns.
#[test]
#[ignore = "measures; run it with --release and --nocapture"]
fn product_time() {
    for (bits, head_dim) in
        [(Bits::Four, 128), (Bits::Two, 128), (Bits::Three, 128), (Bits::Eight, 128), (Bits::Four, 64)]
    {
        let layout = RecordLayout::new(head_dim, 128, bits, bits);
        let mut random = Random(7);
        for matrix in [&layout.key, &layout.value] {
            if !serves(matrix) {
                continue;
            }
            let record = random_record(&layout, matrix, &mut random);
            let x: Vec<f32> = (0..4 * matrix.rows).map(|_| random.number()).collect();
            let mut out = vec![0.0; 4 * matrix.columns];
            let mut scratch = Scratch::default();
            for level in levels() {
                let mut times: Vec<f64> = (0..200)
                    .map(|_| {
                        let start = std::time::Instant::now();
                        for _ in 0..10 {
                            let x = Matrix { values: &x, stride: matrix.rows };
                            let mut to = MatrixMut { values: &mut out, stride: matrix.columns };
                            assert!(multiply(level, matrix, &record, x, &mut to, 4, &[], &mut scratch));
                        }
                        start.elapsed().as_secs_f64() * 1e8
                    })
                    .collect();
                times.sort_by(f64::total_cmp);
                println!(
                    "{bits:?} D {head_dim} {:?} {level:?}: {:.0} ns",
                    matrix.code_order.side(),
                    times[20]
                );
            }
        }
    }
}
