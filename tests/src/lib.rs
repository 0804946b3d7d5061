//! The harness: what tests need of a host. Everything here cleans up after itself when it is dropped.
//!
//! Must not assert anything about the mesh; that is `it/`.

pub mod aws;
pub mod consul;
pub mod docs;
pub mod mesh;
pub mod stage;
pub mod tier;
pub mod until;
