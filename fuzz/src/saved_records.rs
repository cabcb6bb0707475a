//! Files of records.

use kvarn::record::{HEADER_BYTES, read_records, write_records};
use kvarn::{Config, ConfigOptions, Error};

use crate::most_allocated;

/// A valid file of three records.
pub fn records_file() -> Vec<u8> {
    let options =
        ConfigOptions { recent_tokens: 7, ..ConfigOptions::from_name("kvarn_k3v2_g64", 16).unwrap() };
    let config = Config::new(&options).unwrap();
    let records: Vec<u8> =
        (0..3 * config.layout().record_bytes).map(|index| (index * 31 % 251) as u8).collect();
    let mut file = Vec::new();
    write_records(config, &records, &mut file).unwrap();
    file
}

/// Makes the checksums right, as far as there is a header.
pub fn forge_records(file: &mut [u8]) {
    if file.len() >= HEADER_BYTES {
        let records = crc32fast::hash(&file[HEADER_BYTES..]);
        file[56..60].copy_from_slice(&records.to_le_bytes());
        let header = crc32fast::hash(&file[..68]);
        file[68..72].copy_from_slice(&header.to_le_bytes());
    }
}

/// Reads any bytes: a file that is accepted is the one that would be written. Returns whether it was.
///
/// # Panics
/// If it is not, the error is of another kind, or more memory was taken than the file is worth.
pub fn saved_records(file: &[u8]) -> bool {
    let (result, most) = most_allocated(|| read_records(&mut &*file));
    assert!(most <= 4 * file.len() + 4096, "{most} bytes allocated for {}", file.len());
    match result {
        Ok((header, records)) => {
            let mut again = Vec::new();
            write_records(header.config, &records, &mut again).unwrap();
            assert_eq!(again.len(), file.len());
            // Bytes 60 to 67 are for later versions; those before them say everything.
            assert_eq!((&again[..60], &again[HEADER_BYTES..]), (&file[..60], &file[HEADER_BYTES..]));
            true
        }
        Err(Error::Format(text)) => {
            assert!(!text.is_empty());
            false
        }
        Err(other) => panic!("{other}: expected a format error"),
    }
}
