//! The configuration as it stands in the header of every kvarn file: the same 20 bytes at the same place.

use crate::{Config, ConfigOptions, Error};

/// First byte of the configuration in a header.
pub(crate) const CONFIG_AT: usize = 16;
/// Bytes of a configuration: head dim and group (2 each), key bits, value bits, rotation, refit (1 each), iterations, sink
/// tokens, recent tokens (4 each).
const CONFIG_BYTES: usize = 20;
const ROTATION_HADAMARD: u8 = 1;

/// The bytes of a configuration.
pub(crate) fn config_to_bytes(config: &Config) -> [u8; CONFIG_BYTES] {
    let mut bytes = [0; CONFIG_BYTES];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &(config.head_dim() as u16).to_le_bytes());
    put(2, &(config.group() as u16).to_le_bytes());
    let bits = [config.key_bits().get() as u8, config.value_bits().get() as u8];
    put(4, &[bits[0], bits[1], ROTATION_HADAMARD, u8::from(config.refit())]);
    put(8, &(config.iterations() as u32).to_le_bytes());
    put(12, &(config.sink_tokens() as u32).to_le_bytes());
    put(16, &(config.recent_tokens() as u32).to_le_bytes());
    bytes
}

/// The configuration in a header.
pub(crate) fn config_of(header: &[u8]) -> Result<Config, Error> {
    let bytes = &header[CONFIG_AT..CONFIG_AT + CONFIG_BYTES];
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let u32_at = |at: usize| u16_at(at) | u16_at(at + 2) << 16;
    let (rotation, refit) = (bytes[6], bytes[7]);
    if rotation != ROTATION_HADAMARD || refit > 1 {
        return Err(Error::Format(format!(
            "rotation {rotation}, refit {refit}: expected {ROTATION_HADAMARD}, 0 or 1; read the file with the kvarn release that wrote it"
        )));
    }
    Config::new(&ConfigOptions {
        head_dim: u16_at(0),
        group: u16_at(2),
        key_bits: usize::from(bytes[4]),
        value_bits: usize::from(bytes[5]),
        refit: refit == 1,
        iterations: u32_at(8),
        sink_tokens: Some(u32_at(12)),
        recent_tokens: u32_at(16),
    })
    .map_err(|error| Error::Format(format!("header: {error}")))
}
