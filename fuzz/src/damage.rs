//! Files that were valid once.

/// A change to a file. Places and lengths are taken modulo what there is.
#[derive(Clone, Copy, Debug)]
pub enum Edit {
    /// A byte gets this value.
    Set(usize, u8),
    /// A bit is flipped.
    Flip(usize, u8),
    /// Four bytes, at a multiple of four, get this value: the headers' numbers.
    Number(usize, u32),
    /// What follows is cut off.
    Cut(usize),
    /// Bytes of this value are put behind.
    Extend(usize, u8),
    /// Bytes are taken out of the middle: place and number.
    Remove(usize, usize),
}

/// `file` after `edits`.
pub fn damaged(mut file: Vec<u8>, edits: &[Edit]) -> Vec<u8> {
    for &edit in edits {
        let length = file.len().max(1);
        match edit {
            Edit::Extend(count, value) => file.resize(file.len() + count % 300, value),
            _ if file.is_empty() => {}
            Edit::Set(at, value) => file[at % length] = value,
            Edit::Flip(at, bit) => file[at % length] ^= 1 << (bit % 8),
            Edit::Number(at, value) => {
                let at = at % length / 4 * 4;
                let end = file.len().min(at + 4);
                file[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
            Edit::Cut(at) => file.truncate(at % length),
            Edit::Remove(at, count) => {
                let at = at % length;
                file.drain(at..length.min(at + count % 300));
            }
        }
    }
    file
}
