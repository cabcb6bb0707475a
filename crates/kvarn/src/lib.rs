//! Part of kvarn; see ARCHITECTURE.md.
#![forbid(unsafe_code)]

pub mod tables;
