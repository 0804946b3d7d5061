//! The tests of tunnels over our own framing, which two agents agree on.

dialling!(Settings::default());

#[path = "refusing.rs"]
mod refusing;
#[path = "sharing.rs"]
mod sharing;
#[path = "streams.rs"]
mod streams;
