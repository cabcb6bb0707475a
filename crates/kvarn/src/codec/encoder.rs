//! Encoding of one tile.

use super::absorb::{Parameters, round, round_in_place};
use super::input::finite_rotated;
use super::lanes::{LANES, Turn, channel_strips, lanes_of, repeat, rows_of_strip, strip_ranges, turn};
use super::normalize::Normalizer;
use super::quantize::{code_bytes, range_parameters, round_codes};
use super::refit::{TokenLanes, divide, prescale, refit_rows};
use crate::record::{EncodedMatrix, RecordLayout};
use crate::{Aligned, Config, Saturation, Side};

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
    pub fn encode<T: Turn>(&mut self, k: &[f32], v: &[f32], record: &mut [u8]) -> EncodeCounts {
        let (group, head_dim) = (self.layout.group(), self.layout.head_dim());
        assert_eq!(
            (k.len(), v.len(), record.len()),
            (group * head_dim, group * head_dim, self.layout.record_bytes)
        );
        record.fill(0);
        let mut counts = EncodeCounts::default();
        // K is quantised per channel, V per token.
        channel_strips(k, head_dim, &mut self.key.row_strips);
        counts += finite_rotated(&mut self.key.row_strips);
        turn::<T>(&self.key.row_strips, group, &mut self.key.column_strips);
        channel_strips(v, head_dim, &mut self.value.column_strips);
        counts += finite_rotated(&mut self.value.column_strips);
        turn::<T>(&self.value.column_strips, group, &mut self.value.row_strips);
        for (matrix, layout) in [(&mut self.key, &self.layout.key), (&mut self.value, &self.layout.value)] {
            counts.saturated += matrix.encode::<T>(self.refit, self.iterations).0;
            matrix.encoded.write(layout, record);
        }
        counts
    }
}

/// Encodes one matrix m `[rows, columns]`.
#[derive(Clone, Debug)]
struct MatrixEncoder {
    side: Side,
    max_code: f32,
    /// m divided by the prescale, in row strips.
    row_strips: Aligned<f32>,
    /// m divided by the prescale, in column strips.
    column_strips: Aligned<f32>,
    /// A strip of rows, divided by column and row scales.
    balanced: Aligned<f32>,
    /// Its codes as float32 integers.
    codes: Aligned<f32>,
    /// The column scales of each element of a strip.
    column_scales: Aligned<f32>,
    /// Scales and zero points of each element of a strip.
    repeated: (Aligned<f32>, Aligned<f32>),
    /// What a strip of tokens decodes to.
    reconstructed: Aligned<f32>,
    /// All codes, in row strips.
    code_strips: Vec<u8>,
    normalizer: Normalizer,
    parameters: Parameters,
    encoded: EncodedMatrix,
}

impl MatrixEncoder {
    fn new(side: Side, layout: &RecordLayout) -> Self {
        let layout = layout.matrix(side);
        let (elements, strip) =
            (Aligned::zeros(layout.rows * layout.columns), Aligned::zeros(LANES * layout.columns));
        Self {
            side,
            max_code: f32::from(layout.code_order.bits().max_code()),
            row_strips: elements.clone(),
            column_strips: elements,
            balanced: strip.clone(),
            codes: strip.clone(),
            column_scales: strip.clone(),
            repeated: (strip.clone(), strip),
            reconstructed: Aligned::zeros(LANES * layout.rows.max(layout.columns)),
            code_strips: vec![0; layout.rows * layout.columns],
            normalizer: Normalizer::new(layout.rows, layout.columns),
            parameters: Parameters::new(layout.rows, layout.columns),
            encoded: EncodedMatrix::zeros(layout),
        }
    }

    /// Encodes what the strips hold.
    #[inline(always)]
    fn encode<T: Turn>(&mut self, refit: bool, iterations: usize) -> Saturation {
        let mut saturation = Saturation::default();
        let mut p = 1.0;
        if refit {
            p = prescale(&self.row_strips, &self.parameters.column_scale);
            divide(&mut self.row_strips, p);
            divide(&mut self.column_strips, p);
        }
        self.normalizer.run(&self.row_strips, &self.column_strips, iterations);
        self.quantize::<T>(refit);
        self.absorb(p);
        self.parameters.guard();
        if refit {
            match self.side {
                Side::Key => self.unbiased_column_scale(p),
                Side::Value => self.unbiased_row_scale(p),
            }
            self.parameters.guard();
        }
        round(&self.parameters.row_scale, &mut self.encoded.row_scale, &mut saturation);
        round(&self.parameters.row_zero, &mut self.encoded.row_zero, &mut saturation);
        round(&self.parameters.column_scale, &mut self.encoded.column_scale, &mut saturation);
        saturation
    }

    /// Rounds every row of the normalised matrix; with refit, refits it.
    #[inline(always)]
    fn quantize<T: Turn>(&mut self, refit: bool) {
        let Normalizer { row_scale, column_scale, .. } = &self.normalizer;
        let columns = column_scale.len();
        for (repeated, scale) in self.column_scales.chunks_exact_mut(LANES).zip(column_scale) {
            repeated.fill(*scale);
        }
        let (balanced, codes) = (&mut self.balanced, &mut self.codes);
        let strips = self.row_strips.chunks_exact(LANES * columns).zip(row_scale.chunks_exact(LANES));
        let Parameters { row_scale: scales, row_zero: zeros, .. } = &mut self.parameters;
        let parameters = scales.chunks_exact_mut(LANES).zip(zeros.chunks_exact_mut(LANES));
        let bytes = self.code_strips.chunks_exact_mut(LANES * columns);
        for (index, (((strip, row_scale), parameters), bytes)) in
            strips.zip(parameters).zip(bytes).enumerate()
        {
            let (row_scales, column_scales) = (&mut self.repeated.0, &mut self.column_scales);
            repeat(&lanes_of(row_scale), row_scales);
            let elements = balanced.iter_mut().zip(strip).zip(column_scales.iter().zip(row_scales.iter()));
            for ((balanced, m), (column_scale, row_scale)) in elements {
                *balanced = m / column_scale / row_scale;
            }
            let (low, high) = strip_ranges(balanced);
            let (mut scale, mut zero) = ([0.0; LANES], [0.0; LANES]);
            for lane in 0..LANES {
                (scale[lane], zero[lane]) = range_parameters(low[lane], high[lane], self.max_code);
            }
            repeat(&scale, &mut self.repeated.0);
            repeat(&zero, &mut self.repeated.1);
            round_codes(balanced, &self.repeated.0, &self.repeated.1, self.max_code, codes);
            if refit {
                let repeated = &mut self.repeated;
                refit_rows(balanced, &mut scale, &mut zero, self.max_code, codes, repeated);
            }
            parameters.0.copy_from_slice(&scale);
            parameters.1.copy_from_slice(&zero);
            code_bytes(codes, bytes);
            rows_of_strip::<T>(bytes, &mut self.encoded.codes[index * LANES * columns..][..LANES * columns]);
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
    fn unbiased_column_scale(&mut self, p: f32) {
        let Parameters { row_scale, row_zero, column_scale } = &mut self.parameters;
        round_in_place(row_scale);
        round_in_place(row_zero);
        let (rows, columns) = (row_scale.len(), column_scale.len());
        let strips = self.column_strips.chunks_exact(LANES * rows).zip(column_scale.chunks_exact_mut(LANES));
        for (index, (strip, column_scale)) in strips.enumerate() {
            let reconstructed = &mut self.reconstructed[..strip.len()];
            let steps = reconstructed.chunks_exact_mut(LANES).zip(self.encoded.codes.chunks_exact(columns));
            for ((r, codes), (scale, zero)) in steps.zip(row_scale.iter().zip(row_zero.iter())) {
                for (r, code) in r.iter_mut().zip(&codes[index * LANES..][..LANES]) {
                    *r = f32::from(*code) * scale + zero;
                }
            }
            let sums = TokenLanes::of(strip, p, reconstructed);
            for (lane, scale) in column_scale.iter_mut().enumerate() {
                *scale = sums.lane(lane).scale().unwrap_or(*scale);
            }
        }
    }

    /// Refit of the V token scales: they are row parameters, multiplied unrounded so that they are rounded once.
    #[inline(always)]
    fn unbiased_row_scale(&mut self, p: f32) {
        let Parameters { row_scale, row_zero, column_scale } = &mut self.parameters;
        round_in_place(column_scale);
        let columns = column_scale.len();
        let strips = self.row_strips.chunks_exact(LANES * columns);
        let strips = strips.zip(self.code_strips.chunks_exact(LANES * columns));
        let parameters = row_scale.chunks_exact_mut(LANES).zip(row_zero.chunks_exact_mut(LANES));
        for ((strip, codes), (scale, zero)) in strips.zip(parameters) {
            let (mut stored_scale, mut stored_zero) = (lanes_of(scale), lanes_of(zero));
            round_in_place(&mut stored_scale);
            round_in_place(&mut stored_zero);
            let reconstructed = &mut self.reconstructed[..strip.len()];
            let steps = reconstructed.chunks_exact_mut(LANES).zip(codes.chunks_exact(LANES));
            for ((r, codes), column_scale) in steps.zip(column_scale.iter()) {
                for lane in 0..LANES {
                    r[lane] =
                        (f32::from(codes[lane]) * stored_scale[lane] + stored_zero[lane]) * column_scale;
                }
            }
            let sums = TokenLanes::of(strip, p, reconstructed);
            for lane in 0..LANES {
                if let Some(factor) = sums.lane(lane).scale() {
                    scale[lane] *= factor;
                    zero[lane] *= factor;
                }
            }
        }
    }
}
