//! Encoding of one tile.

use super::absorb::{Parameters, round, round_in_place};
use super::input::finite_rotated;
use super::lanes::{LANES, row_ranges, sum_each};
use super::normalize::Normalizer;
use super::quantize::{code_bytes, range_parameters, row_codes};
use super::refit::{TokenLanes, prescale, refit_rows};
use super::transpose::transpose;
use crate::record::{EncodedMatrix, RecordLayout};
use crate::{Config, Saturation, Side, through_half};

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
    /// Compiled with the features of the function that calls it; the bytes are the same with all of them.
    ///
    /// # Panics
    /// If a slice has another length than the configuration says.
    #[inline(always)]
    pub fn encode(&mut self, k: &[f32], v: &[f32], record: &mut [u8]) -> EncodeCounts {
        let (group, head_dim) = (self.layout.group(), self.layout.head_dim());
        assert_eq!(
            (k.len(), v.len(), record.len()),
            (group * head_dim, group * head_dim, self.layout.record_bytes)
        );
        record.fill(0);
        // K is quantised per channel: its matrix is the transposed tile.
        transpose(k, head_dim, &mut self.key.m);
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
    /// `m` divided by the prescale.
    prescaled: Vec<f32>,
    /// 16 rows of `m`, divided by prescale, column and row scales.
    balanced: Vec<f32>,
    /// Their codes as float32 integers.
    codes: Vec<f32>,
    normalizer: Normalizer,
    parameters: Parameters,
    encoded: EncodedMatrix,
}

impl MatrixEncoder {
    fn new(side: Side, layout: &RecordLayout) -> Self {
        let layout = layout.matrix(side);
        let (elements, block) = (vec![0.0; layout.rows * layout.columns], vec![0.0; LANES * layout.columns]);
        Self {
            side,
            max_code: f32::from(layout.code_order.bits().max_code()),
            prescaled: elements.clone(),
            m: elements,
            balanced: block.clone(),
            codes: block,
            normalizer: Normalizer::new(layout.rows, layout.columns),
            parameters: Parameters::new(layout.rows, layout.columns),
            encoded: EncodedMatrix::zeros(layout),
        }
    }

    #[inline(always)]
    fn encode(&mut self, refit: bool, iterations: usize) -> EncodeCounts {
        let mut counts = finite_rotated(&mut self.m);
        let mut saturation = Saturation::default();
        let p = if refit { prescale(&self.m, &self.parameters.column_scale) } else { 1.0 };
        if p != 1.0 {
            // Exact: p is a power of two.
            for (prescaled, value) in self.prescaled.iter_mut().zip(&self.m) {
                *prescaled = value / p;
            }
        }
        self.quantize(p, refit, iterations);
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
        counts.saturated += saturation.0;
        counts
    }

    /// Normalises `m / p` and rounds every row; with refit, refits it.
    #[inline(always)]
    fn quantize(&mut self, p: f32, refit: bool, iterations: usize) {
        let m = if p == 1.0 { &self.m } else { &self.prescaled };
        self.normalizer.run(m, iterations);
        let Normalizer { row_scale, column_scale, .. } = &self.normalizer;
        let columns = column_scale.len();
        let (balanced, codes) = (&mut self.balanced, &mut self.codes);
        let blocks =
            m.chunks_exact(LANES * columns).zip(self.encoded.codes.chunks_exact_mut(LANES * columns));
        let Parameters { row_scale: scales, row_zero: zeros, .. } = &mut self.parameters;
        let parameters = scales.chunks_exact_mut(LANES).zip(zeros.chunks_exact_mut(LANES));
        for (((m, bytes), row_scale), (scale, zero)) in
            blocks.zip(row_scale.chunks_exact(LANES)).zip(parameters)
        {
            let rows = balanced.chunks_exact_mut(columns).zip(m.chunks_exact(columns));
            for ((balanced, m), row_scale) in rows.zip(row_scale) {
                for ((balanced, m), column_scale) in balanced.iter_mut().zip(m).zip(column_scale) {
                    *balanced = m / column_scale / row_scale;
                }
            }
            let (low, high) = row_ranges(balanced, columns);
            let rows = balanced.chunks_exact(columns).zip(codes.chunks_exact_mut(columns));
            for (row, (balanced, codes)) in rows.enumerate() {
                (scale[row], zero[row]) = range_parameters(low[row], high[row], self.max_code);
                row_codes(balanced, scale[row], zero[row], self.max_code, codes);
            }
            if refit {
                refit_rows(balanced, scale, zero, self.max_code, codes);
            }
            code_bytes(codes, bytes);
        }
    }

    /// Absorbs prescale and normalisation scales into the parameters.
    #[inline(always)]
    fn absorb(&mut self, p: f32) {
        let parameters = self.parameters.row_scale.iter_mut().zip(&mut self.parameters.row_zero);
        for ((scale, zero), row_scale) in parameters.zip(&self.normalizer.row_scale) {
            *scale = row_scale * (*scale * p);
            *zero = row_scale * (*zero * p);
        }
        self.parameters.column_scale.copy_from_slice(&self.normalizer.column_scale);
    }

    /// Refit of the K token scales: the row parameters are rounded first, the scale makes up for what that costs.
    #[inline(always)]
    fn unbiased_column_scale(&mut self) {
        let Parameters { row_scale, row_zero, column_scale } = &mut self.parameters;
        round_in_place(row_scale);
        round_in_place(row_zero);
        let columns = column_scale.len();
        for (chunk, column_scale) in column_scale.chunks_exact_mut(LANES).enumerate() {
            let chunk = chunk * LANES..(chunk + 1) * LANES;
            let mut sums = TokenLanes::default();
            let rows = self.m.chunks_exact(columns).zip(self.encoded.codes.chunks_exact(columns));
            for ((m, codes), (scale, zero)) in rows.zip(row_scale.iter().zip(row_zero.iter())) {
                let codes = &codes[chunk.clone()];
                sums.add(&m[chunk.clone()], |lane| f32::from(codes[lane]) * scale + zero);
            }
            for (lane, scale) in column_scale.iter_mut().enumerate() {
                *scale = sums.lane(lane).scale().unwrap_or(*scale);
            }
        }
    }

    /// Refit of the V token scales: they are row parameters, multiplied unrounded so that they are rounded once.
    #[inline(always)]
    fn unbiased_row_scale(&mut self) {
        let Parameters { row_scale, row_zero, column_scale } = &mut self.parameters;
        round_in_place(column_scale);
        let columns = column_scale.len();
        let blocks =
            self.m.chunks_exact(LANES * columns).zip(self.encoded.codes.chunks_exact(LANES * columns));
        let parameters = row_scale.chunks_exact_mut(LANES).zip(row_zero.chunks_exact_mut(LANES));
        for ((m, codes), (scale, zero)) in blocks.zip(parameters) {
            let (mut mm, mut rm, mut rr) =
                ([[0.0; LANES]; LANES], [[0.0; LANES]; LANES], [[0.0; LANES]; LANES]);
            for (row, (m, codes)) in m.chunks_exact(columns).zip(codes.chunks_exact(columns)).enumerate() {
                let (stored_scale, stored_zero) = (through_half(scale[row]), through_half(zero[row]));
                let mut sums = TokenLanes::default();
                let chunks = m.chunks_exact(LANES).zip(codes.chunks_exact(LANES));
                for ((m, codes), column_scale) in chunks.zip(column_scale.chunks_exact(LANES)) {
                    let value = |lane: usize| f32::from(codes[lane]) * stored_scale + stored_zero;
                    sums.add(m, |lane| value(lane) * column_scale[lane]);
                }
                (mm[row], rm[row], rr[row]) = (sums.mm, sums.rm, sums.rr);
            }
            let sums = TokenLanes { mm: sum_each(mm), rm: sum_each(rm), rr: sum_each(rr) };
            for row in 0..LANES {
                if let Some(factor) = sums.lane(row).scale() {
                    scale[row] *= factor;
                    zero[row] *= factor;
                }
            }
        }
    }
}
