//! Consul as a registry, against a real Consul server.

mod discovery;
mod faults;
mod registration;
mod two_hosts;
