//! The one matrix product of attention: `c += a · b` in float32, each element summed in order of the inner index, so
//! that a result does not depend on what else is in the block.

use crate::features::{dispatch, fma};

/// A row-major matrix within a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// A row-major matrix to be added to.
#[derive(Debug)]
pub(super) struct MatrixMut<'a> {
    pub values: &'a mut [f32],
    pub stride: usize,
}

dispatch! {
    /// `c[m, n] += a[m, k] · b[k, n]` for `[m, n, k]`; `n` is a multiple of 16.
    fn multiply_add(a: Matrix<'_>, b: Matrix<'_>, c: &mut MatrixMut<'_>, shape: [usize; 3]) = multiply_add_body
}

#[inline(always)]
fn multiply_add_body<const FMA: bool>(
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut MatrixMut<'_>,
    [m, n, k]: [usize; 3],
) {
    let mut column = 0;
    while column + 32 <= n {
        strip::<FMA, 32>(a, b, c.values, c.stride, column, m, k);
        column += 32;
    }
    if column < n {
        strip::<FMA, 16>(a, b, c.values, c.stride, column, m, k);
    }
}

/// All rows of `N` columns, four rows at a time.
#[inline(always)]
fn strip<const FMA: bool, const N: usize>(
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_stride: usize,
    column: usize,
    m: usize,
    k: usize,
) {
    let mut row = 0;
    while row < m {
        match m - row {
            1 => tile::<FMA, 1, N>(a, b, c, c_stride, row, column, k),
            2 => tile::<FMA, 2, N>(a, b, c, c_stride, row, column, k),
            3 => tile::<FMA, 3, N>(a, b, c, c_stride, row, column, k),
            _ => tile::<FMA, 4, N>(a, b, c, c_stride, row, column, k),
        }
        row += 4;
    }
}

/// `M` rows of `N` columns, at most four rows, held in registers: the rows are four variables because an array of rows
/// stays in memory, where the compiler does not vectorise it.
#[inline(always)]
fn tile<const FMA: bool, const M: usize, const N: usize>(
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_stride: usize,
    row: usize,
    column: usize,
    k: usize,
) {
    let a: [&[f32]; 4] = std::array::from_fn(|i| &a.values[(row + i.min(M - 1)) * a.stride..][..k]);
    let (mut sums0, mut sums1, mut sums2, mut sums3) = ([0.0; N], [0.0; N], [0.0; N], [0.0; N]);
    for inner in 0..k {
        let b: &[f32; N] = b.values[inner * b.stride + column..][..N].try_into().expect("N elements");
        add_scaled::<FMA, N>(&mut sums0, a[0][inner], b);
        if M > 1 {
            add_scaled::<FMA, N>(&mut sums1, a[1][inner], b);
        }
        if M > 2 {
            add_scaled::<FMA, N>(&mut sums2, a[2][inner], b);
        }
        if M > 3 {
            add_scaled::<FMA, N>(&mut sums3, a[3][inner], b);
        }
    }
    for (i, sums) in [sums0, sums1, sums2, sums3].iter().enumerate().take(M) {
        for (value, sum) in c[(row + i) * c_stride + column..][..N].iter_mut().zip(sums) {
            *value += sum;
        }
    }
}

#[inline(always)]
fn add_scaled<const FMA: bool, const N: usize>(sums: &mut [f32; N], factor: f32, b: &[f32; N]) {
    for (sum, value) in sums.iter_mut().zip(b) {
        *sum = fma::<FMA>(factor, *value, *sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_agrees_with_the_plain_sum() {
        for (m, n, k) in [(1, 16, 16), (2, 48, 5), (3, 64, 128), (4, 32, 64), (7, 80, 33), (9, 256, 128)] {
            let value =
                |seed: usize, index: usize| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0;
            let a: Vec<_> = (0..m * k).map(|index| value(1, index)).collect();
            let b: Vec<_> = (0..k * n).map(|index| value(2, index)).collect();
            let mut c: Vec<_> = (0..m * n).map(|index| value(3, index)).collect();
            let expected: Vec<f64> = (0..m * n)
                .map(|index| {
                    let product =
                        |inner| f64::from(a[index / n * k + inner]) * f64::from(b[inner * n + index % n]);
                    f64::from(c[index]) + (0..k).map(product).sum::<f64>()
                })
                .collect();
            multiply_add(
                Matrix { values: &a, stride: k },
                Matrix { values: &b, stride: n },
                &mut MatrixMut { values: &mut c, stride: n },
                [m, n, k],
            );
            for (value, expected) in c.iter().zip(expected) {
                assert!((f64::from(*value) - expected).abs() < 1e-4, "{m} {n} {k}");
            }
        }
    }
}
