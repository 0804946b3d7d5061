//! The mesh's DNS: one server per task namespace. Mesh names are answered from the published snapshot, everything
//! else goes verbatim to the resolver that the task had asked.
//!
//! [`server`] accepts and decides, [`forward`] asks resolvers, [`wire`] is the only file that knows a message's bytes.
//! Must not know which task lives in a namespace, nor how its queries got here.

mod copies;
pub mod forward;
pub mod server;
pub mod wire;

use std::{
    net::{SocketAddr, TcpListener, UdpSocket},
    sync::{Arc, atomic::AtomicU64},
};

use mesh_core::config;

use self::wire::Transport;
use crate::{
    state::Published,
    sys::{flows::Flows, netns::Netns},
};

/// What a server of one namespace needs. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    pub published: Published,
    pub config: Arc<config::Dns>,
    pub originals: Originals,
    /// The task's namespace, from which its own resolver is asked; `None`: the agent's.
    pub netns: Option<Arc<Netns>>,
    /// Resolvers of the host, asked in turn from the agent's namespace where the task's own is not known. Docker gives
    /// them to tasks too, so they are also who else a task asks that asks one of them.
    pub fallback: Arc<[SocketAddr]>,
    pub counters: Arc<DnsCounters>,
}

/// The sockets of one namespace, made inside it, non-blocking. One of each kind per address family.
pub struct Listeners {
    pub udp: Vec<UdpSocket>,
    pub tcp: Vec<TcpListener>,
}

/// Who knows which resolver a client had asked before the hook redirected it.
#[derive(Clone)]
pub enum Originals {
    Kernel {
        flows: Flows,
        /// Cookie of the namespace that the listeners are in.
        netns_cookie: u64,
    },
    /// Everybody asks this one.
    Fixed(SocketAddr),
    /// Nobody knows.
    Unknown,
}

/// What happened to queries, since start.
#[derive(Debug, Default)]
pub struct DnsCounters {
    /// Answered from the snapshot, negative answers too.
    pub mesh: AtomicU64,
    /// Answered by a resolver.
    pub forwarded: AtomicU64,
    /// Not answered by any resolver.
    pub failed: AtomicU64,
    /// Not forwarded because too many were under way.
    pub overload: AtomicU64,
    /// Messages that were no proper query.
    pub garbage: AtomicU64,
}

impl Originals {
    fn find(&self, transport: Transport, peer: SocketAddr) -> Option<SocketAddr> {
        match self {
            Self::Kernel { flows, netns_cookie } => match transport {
                Transport::Udp => flows.query(*netns_cookie, peer),
                Transport::Tcp => flows.take_tcp(*netns_cookie, peer),
            }
            .map(|original| original.addr.into()),
            Self::Fixed(resolver) => Some(*resolver),
            Self::Unknown => None,
        }
    }
}
