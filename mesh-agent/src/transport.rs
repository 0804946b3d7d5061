//! The mTLS tunnel between agents: what it is to its users. On the wire, over mutual TLS 1.3, streams of our own framing
//! between two of ours, and HBONE (HTTP/2 CONNECT) with others.
//!
//! [`dial::Dialer`] opens tunnels, [`accept::serve`] takes them, [`tunnel::Tunnel`] is one stream of bytes. Below
//! them: `pool` shares connections, `mux` is our framing, `hbone` the other with `h2_settings` for the figures of both ends;
//! [`inflow`] receives from HTTP/2, and `tls` is the only file that names the TLS library.
//!
//! Knows identities and addresses; must not know services, plans or namespaces.

use std::net::SocketAddr;

use mesh_common::refusal::Refusal;
use mesh_core::id::SpiffeId;

pub mod accept;
pub mod dial;
mod gathered;
mod h2_settings;
mod hbone;
pub mod inflow;
mod mux;
mod pool;
pub mod tls;
pub mod tunnel;
mod unopened;

#[cfg(test)]
mod tests;

/// Where a tunnel stream goes, and who must be at its ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct To {
    pub agent: SocketAddr,
    /// The endpoint's address as registered.
    pub authority: SocketAddr,
    /// Whose certificate we show.
    pub from: SpiffeId,
    /// Whose certificate we must see.
    pub expect: SpiffeId,
    /// Whether the caller has another endpoint to go to, which the peer agent is told: it may refuse for a task that is
    /// just stopping.
    pub elsewhere: bool,
}

/// A tunnel stream could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open a tunnel to {authority} through the agent at {agent}: {}", .refusal.cause())]
pub struct TunnelError {
    pub agent: SocketAddr,
    pub authority: SocketAddr,
    pub refusal: Refusal,
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}
