//! The tests of tunnels over HBONE, which is what others speak.

dialling!(Settings { hbone_only: true, ..Settings::default() });

#[path = "refusing.rs"]
mod refusing;
#[path = "sharing.rs"]
mod sharing;
#[path = "streams.rs"]
mod streams;
