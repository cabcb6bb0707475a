//! Saved records: a checked header, then the records.
//!
//! All integers little endian.
//!
//! | byte | size | field |
//! |---|---|---|
//! | 0 | 8 | magic, `KVARNREC` |
//! | 8 | 4 | format version |
//! | 12 | 4 | header bytes, 72 |
//! | 16 | 2 | head dim |
//! | 18 | 2 | group |
//! | 20 | 1 | bits of a K code |
//! | 21 | 1 | bits of a V code |
//! | 22 | 1 | rotation: 1 = block-diagonal Sylvester Hadamard, natural order |
//! | 23 | 1 | 1 if the refit encoder made the records, else 0 |
//! | 24 | 4 | normalisation iterations |
//! | 28 | 4 | sink tokens |
//! | 32 | 4 | recent tokens |
//! | 36 | 4 | bytes of a record |
//! | 40 | 8 | records |
//! | 48 | 8 | valid tokens: tokens of all records |
//! | 56 | 4 | CRC-32 (IEEE) of all records |
//! | 60 | 8 | zeros |
//! | 68 | 4 | CRC-32 of the header's bytes 0 to 67 |

use std::io::Read;

use super::config_fields::{CONFIG_AT, config_of, config_to_bytes};
use crate::{Config, Error};

/// First bytes of a file.
pub const MAGIC: [u8; 8] = *b"KVARNREC";
/// Version of the record format and of the header: other bytes get another number.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 72;

/// What a saved file says of its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Configuration of the records.
    pub config: Config,
    /// Number of records.
    pub records: u64,
    /// Checksum of the records.
    pub checksum: u32,
}

impl Header {
    /// The header of `records`, whole records of `config`.
    pub fn new(config: Config, records: &[u8]) -> Result<Self, Error> {
        let record_bytes = config.layout().record_bytes;
        if !records.len().is_multiple_of(record_bytes) {
            let expected = records.len().next_multiple_of(record_bytes);
            return Err(Error::Length { what: "records", got: records.len(), expected });
        }
        Ok(Self {
            config,
            records: (records.len() / record_bytes) as u64,
            checksum: crc32fast::hash(records),
        })
    }

    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let config = &self.config;
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(8, &FORMAT_VERSION.to_le_bytes());
        put(12, &(HEADER_BYTES as u32).to_le_bytes());
        put(CONFIG_AT, &config_to_bytes(config));
        put(36, &(config.layout().record_bytes as u32).to_le_bytes());
        put(40, &self.records.to_le_bytes());
        put(48, &(self.records * config.group() as u64).to_le_bytes());
        put(56, &self.checksum.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..68]);
        bytes[68..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads and checks the header at the start of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let format = |text: String| Err(Error::Format(text));
        if bytes.len() < HEADER_BYTES {
            return format(format!(
                "file of {} bytes: expected a header of {HEADER_BYTES} bytes; it is truncated, or no kvarn file",
                bytes.len()
            ));
        }
        if bytes[..8] != MAGIC {
            return format(format!(
                "magic {:?}: expected {MAGIC:?} (\"KVARNREC\"); this is no file of kvarn records",
                &bytes[..8]
            ));
        }
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(8) != FORMAT_VERSION {
            return format(format!(
                "format version {}: expected {FORMAT_VERSION}; read the file with the kvarn release that wrote it",
                u32_at(8)
            ));
        }
        let checksum = crc32fast::hash(&bytes[..68]);
        if u32_at(68) != checksum {
            return format(format!(
                "header checksum {:08x}: expected {checksum:08x}; the file is corrupted",
                u32_at(68)
            ));
        }
        if u32_at(12) as usize != HEADER_BYTES {
            return format(format!(
                "header of {} bytes: expected {HEADER_BYTES}; read the file with the kvarn release that wrote it",
                u32_at(12)
            ));
        }
        let config = config_of(bytes)?;
        let header = Self { config, records: u64_at(40), checksum: u32_at(56) };
        let (record_bytes, tokens) =
            (config.layout().record_bytes, header.records.checked_mul(config.group() as u64));
        if u32_at(36) as usize != record_bytes || tokens != Some(u64_at(48)) {
            return format(format!(
                "header says {} bytes a record and {} tokens: expected {record_bytes} and {} records of {} tokens; the file is inconsistent",
                u32_at(36),
                u64_at(48),
                header.records,
                config.group()
            ));
        }
        Ok(header)
    }
}

/// Writes a header and `records` to `out`.
pub fn write_records(config: Config, records: &[u8], out: &mut impl std::io::Write) -> Result<(), Error> {
    let header = Header::new(config, records)?;
    out.write_all(&header.to_bytes()).and_then(|()| out.write_all(records)).map_err(|error| io(&error))
}

/// Reads a header and its records; every byte is checked against the checksums.
pub fn read_records(input: &mut impl std::io::Read) -> Result<(Header, Vec<u8>), Error> {
    let mut head = Vec::with_capacity(HEADER_BYTES);
    input.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut head).map_err(|error| io(&error))?;
    let header = Header::from_bytes(&head)?;
    let expected = header.records.checked_mul(header.config.layout().record_bytes as u64);
    let mut records = Vec::new();
    // One byte more than promised, so that trailing bytes are seen. Reading grows the buffer as bytes arrive: a header
    // that promises too much cannot make us allocate it.
    input
        .take(expected.map_or(u64::MAX, |bytes| bytes.saturating_add(1)))
        .read_to_end(&mut records)
        .map_err(|error| io(&error))?;
    if expected != Some(records.len() as u64) {
        return Err(Error::Format(format!(
            "{} record bytes or more: expected {} records of {} bytes; the file is truncated or has trailing bytes",
            records.len(),
            header.records,
            header.config.layout().record_bytes
        )));
    }
    let checksum = crc32fast::hash(&records);
    if checksum != header.checksum {
        return Err(Error::Format(format!(
            "record checksum {checksum:08x}: expected {:08x}; the file is corrupted",
            header.checksum
        )));
    }
    Ok((header, records))
}

fn io(error: &std::io::Error) -> Error {
    Error::Format(format!("input or output failed: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> (Config, Vec<u8>, Vec<u8>) {
        let config = Config::from_name("kvarn_k3v2_g64", 16).unwrap();
        let records: Vec<u8> =
            (0..3 * config.layout().record_bytes).map(|index| (index * 31 % 251) as u8).collect();
        let mut bytes = Vec::new();
        write_records(config, &records, &mut bytes).unwrap();
        (config, records, bytes)
    }

    #[test]
    fn round_trip() {
        let (config, records, bytes) = file();
        let (header, back) = read_records(&mut bytes.as_slice()).unwrap();
        assert_eq!((header.config, header.records, back), (config, 3, records));
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_refused() {
        let (_, _, bytes) = file();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(matches!(read_records(&mut bad.as_slice()), Err(Error::Format(_))), "byte {at}");
            assert!(matches!(read_records(&mut &bytes[..at]), Err(Error::Format(_))), "length {at}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(read_records(&mut longer.as_slice()).unwrap_err().to_string().contains("trailing"));
    }

    #[test]
    fn a_header_that_promises_too_much_allocates_nothing() {
        let (_, _, bytes) = file();
        let mut header = Header::from_bytes(&bytes).unwrap();
        header.records = u64::MAX / 256;
        assert!(matches!(read_records(&mut header.to_bytes().as_slice()), Err(Error::Format(_))));
    }
}
