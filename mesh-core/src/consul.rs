//! What Consul's answers mean to the mesh, and what the mesh wants Consul to know.
//!
//! [`cursor`] keeps the rules of blocking queries, [`answer`] reads answers, [`entries`] makes services of instances,
//! [`known`] is everything learnt so far, [`registration`] says what has to be told to Consul. Must not know HTTP,
//! nor when anything is asked.

pub mod answer;
pub mod cursor;
pub mod entries;
pub mod known;
pub mod registration;
