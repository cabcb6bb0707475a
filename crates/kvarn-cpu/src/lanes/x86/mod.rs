//! AVX2 and AVX-512, with and without VNNI.
//!
//! Methods are inlined into functions that are compiled for these extensions and called where the processor has them
//! (`attend::integer::multiply`, `rows`): that is what makes each intrinsic here sound. Closures are not: they would be
//! compiled for the baseline, with a call for each intrinsic, so there are none here and in what calls this.
#![allow(clippy::undocumented_unsafe_blocks)] // one reason for all, above

mod avx2;
mod avx512;
mod turn;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;
pub(crate) use turn::SseTurn;
