//! The host agent: every effect of the mesh.
//!
//! Reading order: [`agent`] wires everything and shows the flow of data; below it, lowest first, the layers of
//! `xtask/src/tidy/layers.rs`: `telemetry`, `api`, `state`; `sys` (the only unsafe code); `tasks`, `discovery`,
//! `identity`; `transport`; `proxy`, `dns`; `readiness`; `reconciler`; `admin`. What passes between layers is a type of
//! `mesh-core`. Decisions do not belong here.

pub mod admin;
pub mod agent;
pub mod api;
pub mod cli;
pub mod discovery;
pub mod dns;
pub mod identity;
pub mod proxy;
pub mod readiness;
pub mod reconciler;
pub mod state;
pub mod sys;
pub mod tasks;
pub mod telemetry;
pub mod transport;
