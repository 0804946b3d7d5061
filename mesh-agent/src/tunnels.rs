//! The root of a crate that holds the agent's tunnels and nothing else of it: what is measured of them is built
//! without the registries' and Docker's libraries.
//!
//! No part of the agent. It has the layers that `transport` stands on, and must not have more.
#![allow(dead_code, reason = "what the rest of the agent uses")]

pub mod identity;
pub mod sys {
    //! The part of the layer that `transport` uses.
    pub mod socket;
}
pub mod transport;
