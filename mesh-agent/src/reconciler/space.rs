//! An armed namespace: listeners made inside it, and the servers behind them. Dropping it closes them.
//!
//! Must not know the kernel maps, nor why a namespace is armed.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    path::PathBuf,
    sync::Arc,
};

use mesh_core::{config::Config, id::TaskId};
use tokio::{sync::watch, task::JoinSet};

use crate::{
    dns::{self, DnsCounters, Listeners},
    identity::Identities,
    proxy::{
        inbound,
        outbound::{self, Originals, Place, Who},
        places::{Home, Namespaces},
        workers::Workers,
    },
    state::Published,
    sys::{
        flows::Flows,
        netns::{Netns, NetnsError},
        socket::{self, Acceptor},
    },
    transport::{
        accept::{self, Acceptance, Arrival, Failed},
        tls::Presents,
    },
};

const LOOPBACK4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOOPBACK6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Listeners could not be made in a namespace.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("cannot listen on {addr} in network namespace {netns}: another process has the port, or loopback is down")]
    Listen { addr: SocketAddr, netns: PathBuf, source: io::Error },
}

/// What the servers of every namespace share. Cheap to clone.
#[derive(Clone)]
pub struct Servers {
    pub config: Arc<Config>,
    pub workers: Arc<Workers>,
    pub namespaces: Arc<Namespaces>,
    pub flows: Flows,
    pub published: Published,
    pub identities: Identities,
    /// The host's resolvers, for questions whose addressee is not known.
    pub resolvers: Arc<[SocketAddr]>,
    pub dns_counters: Arc<DnsCounters>,
    /// Told of tunnels that failed before a stream was asked for.
    pub failed: Arc<dyn Fn(Failed) + Send + Sync>,
    /// True from the moment on which nothing new is accepted.
    pub drain: watch::Receiver<bool>,
}

/// An armed namespace.
pub(super) struct Space {
    cookie: u64,
    has_v6: bool,
    _running: JoinSet<()>,
}

struct Sockets {
    proxy: Vec<TcpListener>,
    dns_udp: Vec<UdpSocket>,
    dns_tcp: Vec<TcpListener>,
    tunnel: Option<TcpListener>,
}

impl Space {
    /// Makes the listeners inside `netns` and starts serving them. With `tunnel_for`, the workload of this number takes
    /// tunnels at an address of its own.
    ///
    /// # Errors
    /// The namespace is gone, or a port is taken there.
    pub(super) fn open(netns: Arc<Netns>, tunnel_for: Option<u32>, servers: &Servers) -> Result<Self, SpaceError> {
        let config = &servers.config;
        let tunnel = tunnel_for.map(|_| config.proxy.tunnel_listen.port());
        let made = netns.run(|| Sockets::open(config.proxy.outbound_port, config.dns.port, tunnel))?;
        let sockets =
            made.map_err(|(addr, source)| SpaceError::Listen { addr, netns: netns.path().to_path_buf(), source })?;
        let cookie = netns.cookie();
        let has_v6 = sockets.proxy.len() > 1;
        let mut running = JoinSet::new();
        // One worker for both families: else one would have all of the first, and with it nearly everything.
        let turn = servers.workers.turn();
        for listener in sockets.proxy {
            let place =
                Place { netns: cookie, who: Who::ByNumber, originals: Originals::Kernel(servers.flows.clone()) };
            let (workers, drain) = (servers.workers.clone(), servers.drain.clone());
            servers.workers.accept(turn, &mut running, async move {
                match Acceptor::new(listener) {
                    Ok(listener) => outbound::serve(workers, listener, place, drain).await,
                    Err(error) => tracing::error!(%error, "cannot watch an outbound listener"),
                }
            });
        }
        let context = dns::Context {
            published: servers.published.clone(),
            config: Arc::new(config.dns.clone()),
            originals: dns::Originals::Kernel { flows: servers.flows.clone(), netns_cookie: cookie },
            netns: Some(netns.clone()),
            fallback: servers.resolvers.clone(),
            counters: servers.dns_counters.clone(),
        };
        running.spawn(async move {
            let listeners = Listeners { udp: sockets.dns_udp, tcp: sockets.dns_tcp };
            if let Err(error) = dns::server::serve(context, listeners).await {
                tracing::error!(error = &error as &dyn std::error::Error, "DNS is not served in a namespace");
            }
        });
        if let (Some(listener), Some(number)) = (sockets.tunnel, tunnel_for) {
            let published = servers.published.clone();
            let presents = move |_: SocketAddr, _: Option<&str>| {
                published.load().by_number.get(&number).map(|workload| workload.identity.clone())
            };
            running.spawn(serve_tunnels(servers.clone(), listener, Arc::new(presents)));
        }
        Ok(Self { cookie, has_v6, _running: running })
    }

    pub(super) fn cookie(&self) -> u64 {
        self.cookie
    }

    pub(super) fn has_v6(&self) -> bool {
        self.has_v6
    }
}

impl Servers {
    /// Connections to this task are made in its namespace from now on.
    pub(super) fn remember(&self, task: &TaskId, home: Home) {
        self.namespaces.put(task.clone(), home);
    }

    /// The task has gone.
    pub(super) fn forget(&self, task: &TaskId) {
        self.namespaces.remove(task);
    }
}

/// Takes tunnels from other agents on `listener` until the agent drains. `presents` says whose certificate to show for
/// a local address and an SNI.
pub async fn serve_tunnels(servers: Servers, listener: TcpListener, presents: Arc<Presents>) {
    let listener = match Acceptor::new(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "cannot watch a tunnel listener");
            return;
        }
    };
    let acceptance = Acceptance {
        presents,
        failed: servers.failed.clone(),
        handshake_timeout: servers.config.proxy.connect_timeout.saturating_mul(2),
        drain: servers.config.proxy.drain,
    };
    let spawn = |connections: &mut JoinSet<()>, arrival: Arrival| {
        servers.workers.spawn(connections, |proxy, busy| async move {
            let _busy = busy;
            arrival.run(move |request| inbound::handle(proxy.clone(), request)).await;
        });
    };
    let served = accept::serve(listener, servers.identities.clone(), acceptance, spawn, servers.drain.clone()).await;
    if let Err(error) = served {
        tracing::error!(error = &error as &dyn std::error::Error, "tunnels are not accepted");
    }
}

impl Sockets {
    /// In the namespace that the calling thread is in. IPv6 only where it exists.
    fn open(proxy: u16, dns: u16, tunnel: Option<u16>) -> Result<Self, (SocketAddr, io::Error)> {
        let tcp = |ip, port| {
            let addr = SocketAddr::new(ip, port);
            socket::tcp_listener(addr).map_err(|error| (addr, error))
        };
        let udp = |ip, port| {
            let addr = SocketAddr::new(ip, port);
            socket::udp_socket(addr).map_err(|error| (addr, error))
        };
        let mut sockets = Self {
            proxy: vec![tcp(LOOPBACK4, proxy)?],
            dns_udp: vec![udp(LOOPBACK4, dns)?],
            dns_tcp: vec![tcp(LOOPBACK4, dns)?],
            tunnel: tunnel.map(|port| tcp(Ipv4Addr::UNSPECIFIED.into(), port)).transpose()?,
        };
        match tcp(LOOPBACK6, proxy) {
            Ok(listener) => {
                sockets.proxy.push(listener);
                sockets.dns_udp.push(udp(LOOPBACK6, dns)?);
                sockets.dns_tcp.push(tcp(LOOPBACK6, dns)?);
            }
            Err((_, error)) if no_ipv6(&error) => {}
            Err(failed) => return Err(failed),
        }
        Ok(sockets)
    }
}

/// The kernel or the namespace has no IPv6.
fn no_ipv6(error: &io::Error) -> bool {
    use nix::libc::{EADDRNOTAVAIL, EAFNOSUPPORT};
    matches!(error.raw_os_error(), Some(EADDRNOTAVAIL | EAFNOSUPPORT))
}
