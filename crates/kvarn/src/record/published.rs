//! The published order of a record, for interchange: plain rows of codes and parameters in logical order.
//!
//! K codes `[D][G·bits/8]`, `s_chan[D]`, `z_chan[D]`, `s_tok[G]`, V codes `[G][D·bits/8]`, `s_chan[D]`, `s_tok[G]`,
//! `z_tok[G]`; code `c` of a row sits in byte `c div (8/bits)`, shift `(c mod (8/bits))·bits`.

use half::f16;

use super::{EncodedMatrix, RecordLayout};
use crate::codec::RangeGuard;
use crate::{Bits, Config, Error, Saturation, Side};

/// Bytes of a published record: no padding.
pub fn published_bytes(config: &Config) -> Result<usize, Error> {
    check_bits(config)?;
    let (d, g) = (config.head_dim(), config.group());
    let codes = d * g * (config.key_bits().get() + config.value_bits().get()) / 8;
    Ok(codes + 2 * (3 * d + 3 * g))
}

/// Reorders one native record. The range guards stay folded: the decoded values are the same.
pub fn to_published(config: &Config, record: &[u8], published: &mut [u8]) -> Result<(), Error> {
    let layout = check(config, record.len(), published.len())?;
    let mut writer = Writer { bytes: published, at: 0 };
    for side in [Side::Key, Side::Value] {
        let mut matrix = EncodedMatrix::zeros(layout.matrix(side));
        matrix.read(layout.matrix(side), record);
        writer.codes(&matrix.codes, bits(config, side));
        for values in parameter_arrays(side, &mut matrix) {
            writer.halves(values);
        }
    }
    Ok(())
}

/// Reorders one published record and folds the range guards into it.
///
/// The decoded values are the same, but for parameters that the fold makes subnormal or that saturate (counted).
pub fn from_published(config: &Config, published: &[u8], record: &mut [u8]) -> Result<Saturation, Error> {
    let layout = check(config, record.len(), published.len())?;
    let mut saturation = Saturation::default();
    let mut reader = Reader { bytes: published, at: 0 };
    record.fill(0);
    for side in [Side::Key, Side::Value] {
        let mut matrix = EncodedMatrix::zeros(layout.matrix(side));
        reader.codes(&mut matrix.codes, bits(config, side));
        for values in parameter_arrays(side, &mut matrix) {
            reader.halves(values);
        }
        RangeGuard::fold_halves(&mut matrix, &mut saturation);
        matrix.write(layout.matrix(side), record);
    }
    Ok(saturation)
}

/// The parameter arrays in the published order of `side`.
fn parameter_arrays(side: Side, matrix: &mut EncodedMatrix) -> [&mut [f16]; 3] {
    match side {
        Side::Key => [&mut matrix.row_scale, &mut matrix.row_zero, &mut matrix.column_scale],
        Side::Value => [&mut matrix.column_scale, &mut matrix.row_scale, &mut matrix.row_zero],
    }
}

fn bits(config: &Config, side: Side) -> Bits {
    match side {
        Side::Key => config.key_bits(),
        Side::Value => config.value_bits(),
    }
}

fn check_bits(config: &Config) -> Result<(), Error> {
    if config.key_bits() == Bits::Three || config.value_bits() == Bits::Three {
        return Err(Error::PublishedBits {
            key_bits: config.key_bits().get(),
            value_bits: config.value_bits().get(),
        });
    }
    Ok(())
}

fn check(config: &Config, record: usize, published: usize) -> Result<RecordLayout, Error> {
    let layout = config.layout();
    for (what, got, expected) in [
        ("a native record", record, layout.record_bytes),
        ("a published record", published, published_bytes(config)?),
    ] {
        if got != expected {
            return Err(Error::Length { what, got, expected });
        }
    }
    Ok(layout)
}

struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn codes(&mut self, codes: &[u8], bits: Bits) {
        let per_byte = 8 / bits.get();
        for codes in codes.chunks_exact(per_byte) {
            self.bytes[self.at] =
                codes.iter().enumerate().fold(0, |byte, (index, code)| byte | code << (index * bits.get()));
            self.at += 1;
        }
    }

    fn halves(&mut self, values: &[f16]) {
        for value in values {
            self.bytes[self.at..self.at + 2].copy_from_slice(&value.to_le_bytes());
            self.at += 2;
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn codes(&mut self, codes: &mut [u8], bits: Bits) {
        let per_byte = 8 / bits.get();
        for codes in codes.chunks_exact_mut(per_byte) {
            for (index, code) in codes.iter_mut().enumerate() {
                *code = self.bytes[self.at] >> (index * bits.get()) & bits.max_code();
            }
            self.at += 1;
        }
    }

    fn halves(&mut self, values: &mut [f16]) {
        for value in values {
            *value = f16::from_le_bytes([self.bytes[self.at], self.bytes[self.at + 1]]);
            self.at += 2;
        }
    }
}
