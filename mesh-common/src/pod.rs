//! aya's promise that a type may be copied to and from a map as bytes. Only under the feature `user`.
//!
//! Each type below is `repr(C)`, has no padding (asserted in `layout.rs`), no invalid bit pattern and no pointer.
#![expect(unsafe_code, reason = "aya::Pod is an unsafe trait; this file is one of the three places for it")]

use crate::{addr, maps};

// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for addr::Addr {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::Knobs {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::Namespace {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::Service {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::EndpointKey {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::Endpoint {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::GrantKey {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::Original {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::Direct {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::FlowKey {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::CloseKey {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::Close {}
// SAFETY: repr(C), no padding, every bit pattern valid.
unsafe impl aya::Pod for maps::SocketLayout {}
