//! Opens tunnels: a stream on a pooled connection to the other agent, or on a new one.
//!
//! Must not know why a tunnel is wanted, nor what flows through it.

use std::{
    error::Error,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_common::refusal::Refusal;
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::watch,
    time::timeout,
};

use crate::{
    identity::{Identities, IdentityError, Leaf},
    sys::socket,
    transport::{
        To, TunnelError, hbone, mux,
        pool::{Connection, Key, Lease, Opener, Pool, Turn},
        tls::{self, Framing, Tls, TlsError},
        tunnel::Tunnel,
        unopened::Unopened,
    },
};

/// Makes an unconnected socket for connecting to an address; in an agent [`marked_socket`].
pub type SocketFactory = dyn Fn(SocketAddr) -> io::Result<TcpSocket> + Send + Sync;

/// How a [`Dialer`] goes about it.
#[derive(Clone)]
pub struct Settings {
    /// For the TCP connection.
    pub connect_timeout: Duration,
    /// For the TLS handshake after it.
    pub handshake_timeout: Duration,
    /// For the peer agent's answer to the CONNECT; it connects to the application meanwhile.
    pub answer_timeout: Duration,
    /// Connections without a stream are closed after this.
    pub idle_timeout: Duration,
    /// Speaks HBONE also to agents that know `ecs-mesh/1`.
    pub hbone_only: bool,
    pub socket: Arc<SocketFactory>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            hbone_only: false,
            socket: Arc::new(plain_socket),
        }
    }
}

impl Settings {
    fn framings(&self) -> &'static [Framing] {
        if self.hbone_only { &[Framing::Hbone] } else { &[Framing::Mesh, Framing::Hbone] }
    }
}

/// A socket with the agent's mark, by which packet filters can tell it; the hooks know the agent by its cgroup. Needs
/// CAP_NET_ADMIN.
///
/// # Errors
/// As [`socket::tcp_client`].
pub fn marked_socket(to: SocketAddr) -> io::Result<TcpSocket> {
    socket::tcp_client(to).map(TcpSocket::from_std_stream)
}

fn plain_socket(to: SocketAddr) -> io::Result<TcpSocket> {
    if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}

/// Opens tunnels to other agents. Cheap to clone; all clones share one pool of connections.
#[derive(Clone)]
pub struct Dialer {
    inner: Arc<Inner>,
}

struct Inner {
    identities: Identities,
    tls: Tls,
    settings: Settings,
    pool: Pool,
    connected: AtomicU64,
}

/// What a dialler has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// TLS handshakes that succeeded, ever.
    pub handshakes: u64,
    /// Connections open for further streams now.
    pub connections: usize,
    /// Streams on them now.
    pub streams: usize,
}

/// No connection to the other agent.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("no certificate of our own to show")]
    Identity(#[source] IdentityError),
    #[error("cannot make a socket to reach {to}")]
    Socket { to: SocketAddr, source: io::Error },
    #[error("cannot connect to {to}")]
    Connect { to: SocketAddr, source: io::Error },
    #[error("{to} did not answer within {after:?}")]
    ConnectTimeout { to: SocketAddr, after: Duration },
    #[error("cannot secure the connection to {to}")]
    Tls { to: SocketAddr, source: TlsError },
    #[error("cannot start HTTP/2 with {to}")]
    Http { to: SocketAddr, source: h2::Error },
    #[error("the attempt to connect to {to} was given up")]
    Abandoned { to: SocketAddr },
}

impl DialError {
    fn refusal(&self) -> Refusal {
        match self {
            Self::Identity(_) => Refusal::NoIdentity,
            Self::Socket { .. } | Self::Connect { .. } | Self::Abandoned { .. } => Refusal::ConnectFailed,
            Self::ConnectTimeout { .. } => Refusal::ConnectTimeout,
            Self::Tls { source, .. } => source.refusal(),
            Self::Http { .. } => Refusal::BadProtocol,
        }
    }
}

impl Dialer {
    /// A dialler that shows certificates of `identities`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The trust bundle cannot be used.
    pub fn new(identities: Identities, settings: Settings) -> Result<Self, TlsError> {
        let tls = Tls::new(identities.clone())?;
        let inner = Arc::new(Inner { identities, tls, settings, pool: Pool::default(), connected: AtomicU64::new(0) });
        let weak = Arc::downgrade(&inner);
        tokio::spawn(async move {
            while let Some(inner) = weak.upgrade() {
                let idle = inner.settings.idle_timeout;
                inner.pool.sweep(idle);
                drop(inner);
                tokio::time::sleep((idle / 4).max(Duration::from_millis(50))).await;
            }
        });
        Ok(Self { inner })
    }

    /// Opens a tunnel: returns once the peer agent has connected to the application.
    ///
    /// A pooled connection that turns out to be dead, or whose peer is leaving, costs one more attempt on another
    /// one; no byte of the application was sent by then.
    ///
    /// # Errors
    /// With the refusal that the access log is to name.
    pub async fn open(&self, to: &To) -> Result<Tunnel, TunnelError> {
        let failed = |refusal, source: Box<dyn Error + Send + Sync>| TunnelError {
            agent: to.agent,
            authority: to.authority,
            refusal,
            source: Some(source),
        };
        let key = Key { from: to.from.clone(), agent: to.agent, expect: to.expect.clone() };
        loop {
            let (lease, fresh) = self.lease(&key).await.map_err(|error| failed(error.refusal(), Box::new(error)))?;
            let number = lease.connection.number;
            let error = match self.connect(lease, to).await {
                Ok(tunnel) => return Ok(tunnel),
                Err(error) => error,
            };
            if error.is_of_connection() {
                self.inner.pool.remove(&key, number);
            }
            if fresh || !error.is_safe_to_retry() {
                return Err(failed(error.refusal(), Box::new(error)));
            }
            tracing::debug!(dst.agent = %to.agent, error = %error, "pooled connection was dead, trying another");
        }
    }

    /// What it has done and holds.
    pub fn figures(&self) -> Figures {
        let (connections, streams) = self.inner.pool.size();
        Figures { handshakes: self.inner.connected.load(Ordering::Relaxed), connections, streams }
    }

    /// A place on a connection, and whether that connection was made meanwhile.
    async fn lease(&self, key: &Key) -> Result<(Lease, bool), Arc<DialError>> {
        let mut waited = false;
        loop {
            // Asked for in each turn: it may be renewed while we wait, and the others then use the new one.
            let ours = self.inner.identities.leaf(&key.from).map_err(|error| Arc::new(DialError::Identity(error)))?;
            let mut outcome = match self.inner.pool.turn(key, &ours) {
                Turn::Ready(lease) => return Ok((lease, waited)),
                Turn::Wait(outcome) => outcome,
                Turn::Connect(tell, outcome) => {
                    // A task of its own: the others who wait must not fail because this caller gives up.
                    tokio::spawn(self.inner.clone().attempt(key.clone(), ours, tell));
                    outcome
                }
            };
            waited = true;
            match outcome.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(Err(error))) => return Err(error.clone()),
                Ok(_) => {}
                Err(_task_gone) => return Err(Arc::new(DialError::Abandoned { to: key.agent })),
            }
        }
    }

    /// A stream on a connection.
    async fn connect(&self, lease: Lease, to: &To) -> Result<Tunnel, Unopened> {
        let limit = self.inner.settings.answer_timeout;
        let halves = match timeout(limit, lease.connection.opener.open(to.authority, to.elsewhere)).await {
            Ok(opened) => opened?,
            Err(_elapsed) => return Err(Unopened::NoAnswer(limit)),
        };
        // The expected identity: the handshake accepted no other.
        Ok(Tunnel::new(to.expect.clone(), halves, Some(lease)))
    }
}

impl Inner {
    /// Makes a connection and puts it into the pool, for everybody who waits.
    async fn attempt(self: Arc<Self>, key: Key, ours: Arc<Leaf>, tell: watch::Sender<super::pool::Outcome>) {
        let (made, outcome) = match self.establish(&key, ours).await {
            Ok(connection) => (Some(connection), Ok(())),
            Err(error) => (None, Err(Arc::new(error))),
        };
        self.pool.attempted(&key, made);
        tell.send_replace(Some(outcome));
    }

    async fn establish(self: &Arc<Self>, key: &Key, ours: Arc<Leaf>) -> Result<Connection, DialError> {
        let to = key.agent;
        let tcp = self.reach(to).await?;
        let limit = self.settings.handshake_timeout;
        let secured = match timeout(limit, self.tls.connect(ours, &key.expect, self.settings.framings(), tcp)).await {
            Ok(secured) => secured,
            Err(_elapsed) => Err(TlsError::TimedOut(limit)),
        };
        let secured = secured.map_err(|source| DialError::Tls { to, source })?;
        let number = self.connected.fetch_add(1, Ordering::Relaxed);
        let good_until = tls::good_until(&secured);
        let (pool, shelf) = (self.pool.clone(), key.clone());
        let removed = move || pool.remove(&shelf, number);
        let opener = match secured.framing {
            Framing::Mesh => {
                let (opener, dialed) = mux::dialing(secured.io);
                tokio::spawn(async move {
                    let ended = dialed.run(removed).await;
                    note_end(to, ended.err().map(|error| (matches!(error, mux::Ended::Dead), error.into())));
                });
                Opener::Mesh(opener)
            }
            Framing::Hbone => {
                let (opener, dialed) =
                    hbone::dialing(secured.io).await.map_err(|source| DialError::Http { to, source })?;
                tokio::spawn(async move {
                    let ended = dialed.run(removed).await;
                    note_end(to, ended.err().map(|error| (matches!(error, hbone::Ended::Dead), error.into())));
                });
                Opener::Hbone(opener)
            }
        };
        Ok(Connection { number, ours: secured.ours, good_until, opener })
    }

    async fn reach(&self, to: SocketAddr) -> Result<TcpStream, DialError> {
        let socket = (self.settings.socket)(to).map_err(|source| DialError::Socket { to, source })?;
        let after = self.settings.connect_timeout;
        let tcp = match timeout(after, socket.connect(to)).await {
            Ok(connected) => connected.map_err(|source| DialError::Connect { to, source })?,
            Err(_elapsed) => return Err(DialError::ConnectTimeout { to, after }),
        };
        tcp.set_nodelay(true).map_err(|source| DialError::Socket { to, source })?;
        Ok(tcp)
    }
}

/// Logs how a connection ended: whether it was dead, and why.
fn note_end(to: SocketAddr, ended: Option<(bool, Box<dyn Error + Send + Sync>)>) {
    match ended {
        None => {}
        Some((true, _)) => tracing::info!(dst.agent = %to, "tunnel connection is dead: no answer to pings"),
        Some((false, error)) => tracing::debug!(dst.agent = %to, error = %error, "tunnel connection ended"),
    }
}
