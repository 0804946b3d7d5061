//! The agreement between the kernel programs and the agent: map layouts, event records, refusal numbers.
//!
//! Both sides are compiled from this crate, so that a layout cannot differ by accident; `ABI_VERSION` catches an
//! agent that meets maps or programs pinned by another release. This crate must not know how either side uses it:
//! it holds no decision, no helper call and no dependency (aya's marker impls hide behind the feature `user`).
#![cfg_attr(not(test), no_std)]

pub mod addr;
pub mod event;
pub mod maps;
#[cfg(feature = "user")]
mod pod;
pub mod refusal;

#[cfg(test)]
mod layout;

/// Version of everything in this crate that both sides store or read. Raised with every change of a layout.
pub const ABI_VERSION: u32 = 2;
