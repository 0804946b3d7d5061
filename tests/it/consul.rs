//! Consul as a registry, against a real Consul server.

mod discovery;
mod faults;
mod registration;
mod rolling;
mod two_hosts;
