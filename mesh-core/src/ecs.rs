//! What the ECS API's answers mean to the mesh.
//!
//! [`model`] is what a cluster looks like, [`entries`] makes services of it. Must not know the SDK, nor when anything is
//! asked.

pub mod entries;
pub mod model;
