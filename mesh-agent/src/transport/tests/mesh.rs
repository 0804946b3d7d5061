//! The tests of tunnels over our own framing, which two agents agree on.
#![allow(clippy::duplicate_mod, reason = "the same tests for both framings")]

dialling!(Settings::default());

#[path = "refusing.rs"]
mod refusing;
#[path = "sharing.rs"]
mod sharing;
#[path = "streams.rs"]
mod streams;
