//! What the kernel programs decide, apart from how they run: compiled for the kernel and tested on the host.
//!
//! Must not know a BPF helper or map; the entry points in `main.rs` bring the facts and carry out the verdicts.
#![cfg_attr(not(test), no_std)]

pub mod decide;
