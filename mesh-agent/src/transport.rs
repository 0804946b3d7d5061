//! The mTLS tunnel between agents: what it is to its users. HBONE (HTTP/2 CONNECT over mutual TLS 1.3) on the wire.
//!
//! [`dial::Dialer`] opens tunnels, [`accept::serve`] takes them, [`tunnel::Tunnel`] is one stream of bytes. Below
//! them: `pool` shares connections, `h2_settings` holds the figures of both ends, [`inflow`] receives, and `tls` is the
//! only file that names the TLS library.
//!
//! Knows identities and addresses; must not know services, plans or namespaces.

use std::net::SocketAddr;

use mesh_common::refusal::Refusal;
use mesh_core::id::SpiffeId;

pub mod accept;
pub mod dial;
mod h2_settings;
pub mod inflow;
mod pool;
pub mod tls;
pub mod tunnel;

#[cfg(test)]
mod tests;

/// Where a tunnel stream goes, and who must be at its ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct To {
    pub agent: SocketAddr,
    /// `:authority` of the CONNECT: the endpoint's address as registered.
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

/// Header of a CONNECT with which the caller says that it has another endpoint to go to.
pub(crate) const ELSEWHERE_HEADER: &str = "ecs-mesh-elsewhere";
/// Header of a CONNECT answer that carries the number of our refusal, so that the caller's log names the same reason.
const REFUSAL_HEADER: &str = "ecs-mesh-refusal";
