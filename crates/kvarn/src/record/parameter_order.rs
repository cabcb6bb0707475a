//! Order of scales and zero points within their arrays: as the lanes of a tensor-core fragment read them.

/// Where parameter `index` of an array lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterOrder {
    count: usize,
    reduction: bool,
}

impl ParameterOrder {
    /// Order of parameters along the output dimension of the matrix product (K `s_tok`, V `s_chan`).
    pub const fn output(count: usize) -> Self {
        Self { count, reduction: false }
    }

    /// Order of parameters along the reduced dimension (K `s_chan`, `z_chan`; V `s_tok`, `z_tok`).
    pub const fn reduction(count: usize) -> Self {
        Self { count, reduction: true }
    }

    /// Byte offset, in the array, of the parameter with logical index `index`.
    #[inline]
    pub const fn byte(self, index: usize) -> usize {
        let blocks = self.count / 16;
        let (block, within) = (index / 16, index % 16);
        if self.reduction {
            ((within % 8) / 2) * blocks * 8 + block * 8 + (within / 8) * 4 + (within % 2) * 2
        } else {
            (within % 8) * blocks * 4 + block * 4 + (within / 8) * 2
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_is_a_bijection() {
        for count in (16..=256).step_by(16) {
            for order in [ParameterOrder::output(count), ParameterOrder::reduction(count)] {
                let mut bytes: Vec<_> = (0..count).map(|index| order.byte(index)).collect();
                bytes.sort_unstable();
                assert!(bytes.iter().enumerate().all(|(index, &byte)| byte == 2 * index));
            }
        }
    }
}
