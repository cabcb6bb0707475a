//! The record: the packed bytes of one tile, and the formats in which records leave a pool.
//!
//! Byte-level specification: `docs/format.md`.

mod code_order;
mod config_fields;
mod file;
mod layout;
mod matrix;
mod pack;
mod parameter_order;
mod published;

pub(crate) use config_fields::{CONFIG_AT, config_of, config_to_bytes};

pub use code_order::{BitPlace, CodeOrder};
pub use file::{FORMAT_VERSION, HEADER_BYTES, Header, MAGIC, read_records, write_records};
pub use layout::{MatrixLayout, RECORD_ALIGNMENT, RecordLayout};
pub use matrix::EncodedMatrix;
pub use pack::{pack_codes, unpack_codes};
pub use parameter_order::ParameterOrder;
pub use published::{from_published, published_bytes, to_published};
