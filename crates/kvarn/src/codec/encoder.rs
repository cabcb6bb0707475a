//! Encoding of one tile.

use half::f16;

use super::absorb::{Parameters, round, round_in_place};
use super::input::finite_rotated;
use super::normalize::Normalizer;
use super::quantize::{row_codes, row_range};
use super::refit::{TokenSums, prescale, refit_row};
use crate::record::{EncodedMatrix, RecordLayout};
use crate::{Config, Saturation, Side};

/// What an encoder met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeCounts {
    /// Elements that were NaN or infinite, encoded as 0.
    pub non_finite: u64,
    /// Values or parameters beyond the range of their stored type, stored as the largest.
    pub saturated: u64,
}

impl std::ops::AddAssign for EncodeCounts {
    fn add_assign(&mut self, other: Self) {
        self.non_finite += other.non_finite;
        self.saturated += other.saturated;
    }
}

/// Encodes tiles of one configuration; holds the working memory.
#[derive(Clone, Debug)]
pub struct TileEncoder {
    layout: RecordLayout,
    refit: bool,
    iterations: usize,
    key: MatrixEncoder,
    value: MatrixEncoder,
}

impl TileEncoder {
    /// An encoder for `config`.
    pub fn new(config: &Config) -> Self {
        let layout = config.layout();
        Self {
            key: MatrixEncoder::new(Side::Key, &layout),
            value: MatrixEncoder::new(Side::Value, &layout),
            refit: config.refit(),
            iterations: config.iterations(),
            layout,
        }
    }

    /// Encodes a tile: `k` and `v` rotated, `[group, head_dim]`, already of slot precision. Every byte of `record` is
    /// written.
    ///
    /// # Panics
    /// If a slice has another length than the configuration says.
    pub fn encode(&mut self, k: &[f32], v: &[f32], record: &mut [u8]) -> EncodeCounts {
        let (group, head_dim) = (self.layout.group(), self.layout.head_dim());
        assert_eq!(
            (k.len(), v.len(), record.len()),
            (group * head_dim, group * head_dim, self.layout.record_bytes)
        );
        record.fill(0);
        // K is quantised per channel: its matrix is the transposed tile.
        for channel in 0..head_dim {
            for token in 0..group {
                self.key.m[channel * group + token] = k[token * head_dim + channel];
            }
        }
        self.value.m.copy_from_slice(v);
        let mut counts = EncodeCounts::default();
        for (matrix, layout) in [(&mut self.key, &self.layout.key), (&mut self.value, &self.layout.value)] {
            counts += matrix.encode(self.refit, self.iterations);
            matrix.encoded.write(layout, record);
        }
        counts
    }
}

/// Encodes one matrix `m` `[rows, columns]`.
#[derive(Clone, Debug)]
struct MatrixEncoder {
    side: Side,
    max_code: f32,
    m: Vec<f32>,
    /// `m` divided by prescale, column and row scales.
    balanced: Vec<f32>,
    /// Codes as float32 integers.
    codes: Vec<f32>,
    normalizer: Normalizer,
    parameters: Parameters,
    encoded: EncodedMatrix,
}

impl MatrixEncoder {
    fn new(side: Side, layout: &RecordLayout) -> Self {
        let layout = layout.matrix(side);
        let elements = vec![0.0; layout.rows * layout.columns];
        Self {
            side,
            max_code: f32::from(layout.code_order.bits().max_code()),
            balanced: elements.clone(),
            codes: elements.clone(),
            m: elements,
            normalizer: Normalizer::new(layout.rows, layout.columns),
            parameters: Parameters::new(layout.rows, layout.columns),
            encoded: EncodedMatrix::zeros(layout),
        }
    }

    fn encode(&mut self, refit: bool, iterations: usize) -> EncodeCounts {
        let mut counts = finite_rotated(&mut self.m);
        let mut saturation = Saturation::default();
        let p = if refit { prescale(&self.m) } else { 1.0 };
        self.balance(p, iterations);
        self.quantize(refit);
        self.absorb(p);
        self.parameters.guard();
        if refit {
            match self.side {
                Side::Key => self.unbiased_column_scale(),
                Side::Value => self.unbiased_row_scale(),
            }
            self.parameters.guard();
        }
        round(&self.parameters.row_scale, &mut self.encoded.row_scale, &mut saturation);
        round(&self.parameters.row_zero, &mut self.encoded.row_zero, &mut saturation);
        round(&self.parameters.column_scale, &mut self.encoded.column_scale, &mut saturation);
        for (code, &value) in self.encoded.codes.iter_mut().zip(&self.codes) {
            *code = value as u8;
        }
        counts.saturated += saturation.0;
        counts
    }

    /// Normalises `m / p`.
    fn balance(&mut self, p: f32, iterations: usize) {
        // Exact: p is a power of two.
        for (balanced, value) in self.balanced.iter_mut().zip(&self.m) {
            *balanced = value / p;
        }
        self.normalizer.run(&self.balanced, iterations);
        let columns = self.normalizer.column_scale.len();
        for (row, row_scale) in self.balanced.chunks_exact_mut(columns).zip(&self.normalizer.row_scale) {
            for (value, column_scale) in row.iter_mut().zip(&self.normalizer.column_scale) {
                *value = *value / column_scale / row_scale;
            }
        }
    }

    /// Rounds every row; with refit, refits it.
    fn quantize(&mut self, refit: bool) {
        let columns = self.normalizer.column_scale.len();
        let rows = self.balanced.chunks_exact(columns).zip(self.codes.chunks_exact_mut(columns));
        let parameters = self.parameters.row_scale.iter_mut().zip(&mut self.parameters.row_zero);
        for ((row, codes), (scale, zero)) in rows.zip(parameters) {
            (*scale, *zero) = row_range(row, self.max_code);
            row_codes(row, *scale, *zero, self.max_code, codes);
            if refit {
                refit_row(row, scale, zero, self.max_code, codes);
            }
        }
    }

    /// Absorbs prescale and normalisation scales into the parameters.
    fn absorb(&mut self, p: f32) {
        let parameters = self.parameters.row_scale.iter_mut().zip(&mut self.parameters.row_zero);
        for ((scale, zero), row_scale) in parameters.zip(&self.normalizer.row_scale) {
            *scale = row_scale * (*scale * p);
            *zero = row_scale * (*zero * p);
        }
        self.parameters.column_scale.copy_from_slice(&self.normalizer.column_scale);
    }

    /// Refit of the K token scales: the row parameters are rounded first, the scale makes up for what that costs.
    fn unbiased_column_scale(&mut self) {
        let Parameters { row_scale, row_zero, column_scale } = &mut self.parameters;
        round_in_place(row_scale);
        round_in_place(row_zero);
        let columns = column_scale.len();
        let mut sums = vec![TokenSums::default(); columns];
        let rows = self.m.chunks_exact(columns).zip(self.codes.chunks_exact(columns));
        for ((m, codes), (scale, zero)) in rows.zip(row_scale.iter().zip(row_zero.iter())) {
            for ((sums, m), code) in sums.iter_mut().zip(m).zip(codes) {
                let base = code * scale + zero;
                sums.mm += m * m;
                sums.rm += base * m;
                sums.rr += base * base;
            }
        }
        for (scale, sums) in column_scale.iter_mut().zip(sums) {
            *scale = sums.scale().unwrap_or(*scale);
        }
    }

    /// Refit of the V token scales: they are row parameters, multiplied unrounded so that they are rounded once.
    fn unbiased_row_scale(&mut self) {
        let Parameters { row_scale, row_zero, column_scale } = &mut self.parameters;
        round_in_place(column_scale);
        let columns = column_scale.len();
        let rows = self.m.chunks_exact(columns).zip(self.codes.chunks_exact(columns));
        let half = |value: f32| f16::from_f32(value).to_f32();
        for ((m, codes), (scale, zero)) in rows.zip(row_scale.iter_mut().zip(row_zero.iter_mut())) {
            let (stored_scale, stored_zero) = (half(*scale), half(*zero));
            let mut lanes = [TokenSums::default(); super::lanes::LANES];
            let chunks = m.chunks_exact(lanes.len()).zip(codes.chunks_exact(lanes.len()));
            for ((m, codes), column_scale) in chunks.zip(column_scale.chunks_exact(lanes.len())) {
                for (lane, sums) in lanes.iter_mut().enumerate() {
                    let value = (codes[lane] * stored_scale + stored_zero) * column_scale[lane];
                    sums.mm += m[lane] * m[lane];
                    sums.rm += value * m[lane];
                    sums.rr += value * value;
                }
            }
            let total = |f: fn(&TokenSums) -> f32| lanes.iter().map(f).sum::<f32>();
            let sums = TokenSums { mm: total(|s| s.mm), rm: total(|s| s.rm), rr: total(|s| s.rr) };
            if let Some(factor) = sums.scale() {
                *scale *= factor;
                *zero *= factor;
            }
        }
    }
}
