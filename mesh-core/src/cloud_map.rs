//! What Cloud Map's answers mean to the mesh.
//!
//! [`entries`] makes services of instances, [`known`] is everything learnt so far. Must not know the SDK, nor when
//! anything is asked.

pub mod entries;
pub mod known;
