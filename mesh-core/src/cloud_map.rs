//! What Cloud Map's answers mean to the mesh, and what the mesh wants Cloud Map to know.
//!
//! [`entries`] makes services of instances, [`known`] is everything learnt so far; [`registration`] makes instances of
//! this host's tasks, [`ledger`] says what has to be done so that Cloud Map has exactly those. Must not know the SDK.

pub mod entries;
pub mod known;
pub mod ledger;
pub mod registration;
