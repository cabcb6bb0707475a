//! Published records.

use kvarn::codec::{DecodeScratch, decode_matrix};
use kvarn::record::{from_published, published_bytes, to_published};
use kvarn::{Config, ConfigOptions, Error, Side};

/// Turns any bytes into a native record and back. Codes come back as they were, a record that was guarded once does so as a
/// whole, and decoding takes whatever there is. Returns whether the bytes were as many as a record has.
///
/// # Panics
/// If not, or if bytes of another number are taken.
pub fn published_record(options: &ConfigOptions, bytes: &[u8]) -> bool {
    let config = Config::new(options).unwrap();
    let layout = config.layout();
    let mut record = vec![0xa5; layout.record_bytes];
    let expected = match published_bytes(&config) {
        Ok(expected) => expected,
        Err(error) => {
            assert!(matches!(error, Error::PublishedBits { .. }));
            assert_eq!(from_published(&config, bytes, &mut record).unwrap_err(), error);
            return false;
        }
    };
    let result = from_published(&config, bytes, &mut record);
    if bytes.len() != expected {
        assert!(matches!(result, Err(Error::Length { .. })));
        assert!(record.iter().all(|&byte| byte == 0xa5), "written to in spite of an error");
        return false;
    }
    let saturation = result.unwrap();
    let mut back = vec![0; expected];
    to_published(&config, &record, &mut back).unwrap();
    let (d, g) = (config.head_dim(), config.group());
    let key_codes = d * g * config.key_bits().get() / 8;
    let value_at = key_codes + 2 * (2 * d + g);
    let value_codes = d * g * config.value_bits().get() / 8;
    for range in [0..key_codes, value_at..value_at + value_codes] {
        assert_eq!(back[range.clone()], bytes[range]);
    }

    let mut again = vec![0; layout.record_bytes];
    let second = from_published(&config, &back, &mut again).unwrap();
    if saturation.0 == 0 && second.0 == 0 && is_finite(&config, bytes) {
        let mut third = vec![0; expected];
        to_published(&config, &again, &mut third).unwrap();
        assert_eq!((&again, &third), (&record, &back), "a guarded record changes again");
    }

    let mut scratch = DecodeScratch::default();
    for (side, matrix) in [(Side::Key, &layout.key), (Side::Value, &layout.value)] {
        let mut values = vec![0.0; d * g];
        decode_matrix(matrix, &record, &mut scratch, &mut values);
        if saturation.0 == 0 && is_finite(&config, bytes) {
            let finite = values.iter().filter(|value| !value.is_nan()).count();
            assert_eq!(finite, d * g, "{side:?}: finite parameters give no NaN");
        }
    }
    true
}

/// Whether every parameter is finite.
fn is_finite(config: &Config, bytes: &[u8]) -> bool {
    let (d, g) = (config.head_dim(), config.group());
    let key_codes = d * g * config.key_bits().get() / 8;
    let value_codes = d * g * config.value_bits().get() / 8;
    let key = key_codes..key_codes + 2 * (2 * d + g);
    let value = key.end + value_codes..bytes.len();
    [key, value].into_iter().all(|range| bytes[range].chunks_exact(2).all(|half| half[1] & 0x7c != 0x7c))
}
