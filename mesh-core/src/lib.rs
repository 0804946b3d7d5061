//! Every decision of the mesh, and no effect.
//!
//! Nothing here reads a clock, draws a random number, opens a file or socket, logs, or spawns: `now` and `draw` are
//! arguments, answers carry their reasons, effects are returned as data. `mesh-agent` performs them.
//!
//! Reading order: [`id`] and [`addr`] (names), [`model`] (the snapshot), [`plan`] (the heart: one connection or
//! request in, one plan or numbered refusal out), then what it is made of: [`resolve`], [`policy`], [`owners`], [`balance`];
//! where the snapshot comes from: [`config`], [`services`] (the static file), [`consul`], [`cloud_map`], [`ecs`], [`task`],
//! [`readiness`], [`merge`], [`vip`]; and what follows from it: [`dataplane`] (the kernel's image), [`reconcile`]
//! (namespaces to arm), [`registration`] (what registries are told), [`rotate`] (when a certificate is renewed), [`lull`] (when
//! memory is given back).

pub mod addr;
pub mod aws;
pub mod back_off;
pub mod balance;
pub mod cloud_map;
pub mod config;
pub mod consul;
pub mod dataplane;
mod document;
pub mod ecs;
pub mod id;
pub mod instance;
pub mod lull;
pub mod merge;
pub mod model;
pub mod owners;
pub mod plan;
pub mod policy;
pub mod readiness;
pub mod reconcile;
pub mod registration;
pub mod resolve;
pub mod rotate;
pub mod services;
pub mod task;
pub mod vip;

#[cfg(test)]
mod arb;
