//! Offsets of the arrays of a record: the only source of them in the project.

use std::ops::Range;

use super::{CodeOrder, ParameterOrder};
use crate::{Bits, Side};

/// A record is padded to a multiple of this, so that every record of a page can be fetched by one bulk copy.
pub const RECORD_ALIGNMENT: usize = 128;

/// Byte ranges, within a record, of one encoded matrix. Parameters are IEEE half, little endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixLayout {
    /// Packed codes.
    pub codes: Range<usize>,
    /// Scale of each quantised row (K: `s_chan`, V: `s_tok`).
    pub row_scale: Range<usize>,
    /// Zero point of each quantised row (K: `z_chan`, V: `z_tok`).
    pub row_zero: Range<usize>,
    /// Scale of each column (K: `s_tok`, V: `s_chan`).
    pub column_scale: Range<usize>,
    /// Quantised rows: K: head dim, V: group.
    pub rows: usize,
    /// Columns: K: group, V: head dim.
    pub columns: usize,
    /// Order of the codes.
    pub code_order: CodeOrder,
}

impl MatrixLayout {
    /// Order of `row_scale` and `row_zero`.
    pub const fn row_order(&self) -> ParameterOrder {
        ParameterOrder::reduction(self.rows)
    }

    /// Order of `column_scale`.
    pub const fn column_order(&self) -> ParameterOrder {
        ParameterOrder::output(self.columns)
    }
}

/// The layout of one record:
/// K codes, K `s_chan`, K `z_chan`, K `s_tok`, V codes, V `s_chan`, V `s_tok`, V `z_tok`, zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordLayout {
    /// The K matrix.
    pub key: MatrixLayout,
    /// The V matrix.
    pub value: MatrixLayout,
    /// Bytes of a record, padding included.
    pub record_bytes: usize,
    head_dim: usize,
    group: usize,
}

impl RecordLayout {
    /// The layout for tiles of `group` tokens and `head_dim` channels.
    pub fn new(head_dim: usize, group: usize, key_bits: Bits, value_bits: Bits) -> Self {
        let mut end = 0;
        let mut take = |bytes: usize| {
            let start = end;
            end += bytes;
            start..end
        };
        let elements = head_dim * group;
        let key = MatrixLayout {
            codes: take(elements * key_bits.get() / 8),
            row_scale: take(2 * head_dim),
            row_zero: take(2 * head_dim),
            column_scale: take(2 * group),
            rows: head_dim,
            columns: group,
            code_order: CodeOrder::new(Side::Key, key_bits, head_dim, group),
        };
        let codes = take(elements * value_bits.get() / 8);
        let column_scale = take(2 * head_dim);
        let value = MatrixLayout {
            codes,
            column_scale,
            row_scale: take(2 * group),
            row_zero: take(2 * group),
            rows: group,
            columns: head_dim,
            code_order: CodeOrder::new(Side::Value, value_bits, head_dim, group),
        };
        Self { key, value, record_bytes: end.next_multiple_of(RECORD_ALIGNMENT), head_dim, group }
    }

    /// Layout of one side.
    pub const fn matrix(&self, side: Side) -> &MatrixLayout {
        match side {
            Side::Key => &self.key,
            Side::Value => &self.value,
        }
    }

    /// Channels of a head.
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens of a tile.
    pub const fn group(&self) -> usize {
        self.group
    }

    /// Bits of a record, padding included, per stored element (K and V elements counted).
    pub fn bits_per_element(&self) -> f64 {
        (8 * self.record_bytes) as f64 / (2 * self.head_dim * self.group) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (key_bits, value_bits, head_dim, bytes) in [
            (4, 4, 128, 17_920),
            (4, 2, 128, 13_824),
            (3, 3, 128, 13_824),
            (2, 2, 128, 9_728),
            (3, 3, 96, 10_624),
        ] {
            let layout = RecordLayout::new(
                head_dim,
                128,
                Bits::new(key_bits, "key_bits").unwrap(),
                Bits::new(value_bits, "value_bits").unwrap(),
            );
            assert_eq!(layout.record_bytes, bytes);
        }
        let layout = RecordLayout::new(128, 128, Bits::Four, Bits::Two);
        assert!((layout.bits_per_element() - 3.375).abs() < 1e-12);
    }
}
