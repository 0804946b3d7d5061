//! Where an intercepted connection or query was meant to go, as the connect hooks recorded it.
//!
//! Knows the maps' layout; knows nothing of services.

use std::{net::SocketAddr, os::fd::OwnedFd, sync::Arc};

use mesh_common::maps::{FlowKey, Original};

use super::raw;

/// Reads and removes the records of the connect hooks. Cheap to clone.
#[derive(Clone)]
pub struct Flows {
    tcp: Arc<OwnedFd>,
    udp: Arc<OwnedFd>,
}

impl Flows {
    /// Both maps have `FlowKey` keys and `Original` values.
    pub(super) fn new(tcp: Arc<OwnedFd>, udp: Arc<OwnedFd>) -> Self {
        Self { tcp, udp }
    }

    /// What the TCP client `peer` in the namespace with this cookie had asked for. Removes the record.
    pub fn take_tcp(&self, netns_cookie: u64, peer: SocketAddr) -> Option<Original> {
        raw::take(&self.tcp, &key(netns_cookie, peer)).ok().flatten()
    }

    /// What the UDP client `peer` had asked for with the query just received. Removes the record, which the next
    /// query writes anew.
    pub fn query(&self, netns_cookie: u64, peer: SocketAddr) -> Option<Original> {
        raw::take(&self.udp, &key(netns_cookie, peer)).ok().flatten()
    }
}

fn key(netns: u64, peer: SocketAddr) -> FlowKey {
    FlowKey { netns, ip: peer.ip().into(), port: peer.port().into() }
}
