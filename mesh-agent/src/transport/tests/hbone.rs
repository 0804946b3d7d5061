//! The tests of tunnels over HBONE, which is what others speak.
#![allow(clippy::duplicate_mod, reason = "the same tests for both framings")]

dialling!(Settings { hbone_only: true, ..Settings::default() });

#[path = "refusing.rs"]
mod refusing;
#[path = "sharing.rs"]
mod sharing;
#[path = "streams.rs"]
mod streams;
