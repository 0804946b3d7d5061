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

use h2::Reason;
use http::{Method, Request, Response, StatusCode, Uri, uri};
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
        ELSEWHERE_HEADER, REFUSAL_HEADER, To, TunnelError, h2_settings,
        pool::{Connection, Key, Lease, Pool, Turn},
        tls::{self, Tls, TlsError},
        tunnel::Tunnel,
    },
};

/// How long the cause of a connection's end may take to arrive after its streams have failed. Both come from one poll
/// of the same task, so this is never waited for in full.
const CAUSE_WAIT: Duration = Duration::from_secs(1);

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
    pub socket: Arc<SocketFactory>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            socket: Arc::new(plain_socket),
        }
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

/// A connection, but no stream on it.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("the peer agent rejected our certificate: {}", .0.cause())]
    Rejected(Refusal),
    #[error("the connection was lost before the peer agent answered")]
    Lost(#[source] h2::Error),
    #[error("the peer agent reset the stream before it answered")]
    Reset(#[source] h2::Error),
    #[error("the peer agent did not answer within {0:?}")]
    NoAnswer(Duration),
    #[error("the peer agent refused with refusal {} ({})", *.0 as u32, .0.label())]
    Refused(Refusal),
    #[error("the peer agent answered {0}")]
    Status(StatusCode),
    #[error("{0} cannot be asked for")]
    Authority(SocketAddr, #[source] http::Error),
}

impl StreamError {
    /// Whether the connection is of no more use. An agent answers sooner than we give up, so one that does not may be
    /// on a host that died; the next caller finds out with a new connection instead of waiting as long.
    fn is_of_connection(&self) -> bool {
        match self {
            Self::Rejected(_) | Self::Lost(_) | Self::NoAnswer(_) => true,
            Self::Reset(_) | Self::Refused(_) | Self::Status(_) | Self::Authority(..) => false,
        }
    }

    /// Whether another connection may fare better, at no cost but a little time.
    fn is_safe_to_retry(&self) -> bool {
        match self {
            Self::Rejected(_) | Self::Lost(_) => true,
            Self::NoAnswer(_) | Self::Reset(_) | Self::Refused(_) | Self::Status(_) | Self::Authority(..) => false,
        }
    }

    fn refusal(&self) -> Refusal {
        match self {
            Self::Rejected(refusal) | Self::Refused(refusal) => *refusal,
            Self::Status(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Refusal::Denied,
            Self::Lost(_) => Refusal::ConnectFailed,
            Self::Reset(_) | Self::Status(_) | Self::Authority(..) => Refusal::TunnelRefused,
            Self::NoAnswer(_) => Refusal::ConnectTimeout,
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

    /// CONNECT on a connection.
    async fn connect(&self, lease: Lease, to: &To) -> Result<Tunnel, StreamError> {
        let limit = self.inner.settings.answer_timeout;
        let request = connect_request(to.authority, to.elsewhere)?;
        let ask = async {
            let mut requests = lease.connection.requests.clone().ready().await?;
            let (response, send) = requests.send_request(request, false)?;
            Ok((response.await?, send))
        };
        let (response, send) = match timeout(limit, ask).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(why(&lease.connection, error).await),
            Err(_elapsed) => return Err(StreamError::NoAnswer(limit)),
        };
        if response.status() != StatusCode::OK {
            return Err(refused(&response));
        }
        // The expected identity: the handshake accepted no other.
        Ok(Tunnel::new(to.expect.clone(), send, response.into_body(), Some(lease)))
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
        let secured = match timeout(limit, self.tls.connect(ours, &key.expect, tcp)).await {
            Ok(secured) => secured,
            Err(_elapsed) => Err(TlsError::TimedOut(limit)),
        };
        let secured = secured.map_err(|source| DialError::Tls { to, source })?;
        let number = self.connected.fetch_add(1, Ordering::Relaxed);
        let good_until = tls::good_until(&secured);
        let failure = secured.io.failure();
        let (requests, mut connection) =
            h2_settings::client().handshake(secured.io).await.map_err(|source| DialError::Http { to, source })?;

        let (over, is_over) = watch::channel(false);
        let pool = self.pool.clone();
        let shelf = key.clone();
        let pings = connection.ping_pong();
        tokio::spawn(async move {
            let dead = async {
                match pings {
                    Some(pings) => h2_settings::until_dead(pings).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = &mut connection => if let Err(error) = ended {
                    tracing::debug!(dst.agent = %to, error = %error, "tunnel connection ended");
                },
                () = dead => tracing::info!(dst.agent = %to, "tunnel connection is dead: no answer to pings"),
            }
            pool.remove(&shelf, number);
            over.send_replace(true);
            // Dropped last: its streams fail only now, with the connection out of the pool.
            drop(connection);
        });
        Ok(Connection { number, ours: secured.ours, good_until, requests, failure, over: is_over })
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

/// `:authority` only, as CONNECT demands (RFC 9113 §8.5).
fn connect_request(authority: SocketAddr, elsewhere: bool) -> Result<Request<()>, StreamError> {
    let failed = |error| StreamError::Authority(authority, error);
    let authority = uri::Authority::try_from(authority.to_string()).map_err(|error| failed(error.into()))?;
    let mut parts = uri::Parts::default();
    parts.authority = Some(authority);
    let uri = Uri::from_parts(parts).map_err(|error| failed(error.into()))?;
    let request = Request::builder().method(Method::CONNECT).uri(uri);
    let request = if elsewhere { request.header(ELSEWHERE_HEADER, "1") } else { request };
    request.body(()).map_err(failed)
}

/// Why an open stream failed before its answer.
async fn why(connection: &Connection, error: h2::Error) -> StreamError {
    match error.reason() {
        // The one reset that promises that nothing was done (RFC 9113 §8.7).
        Some(Reason::REFUSED_STREAM) => StreamError::Lost(error),
        _ if error.is_reset() => StreamError::Reset(error),
        _ => {
            let mut over = connection.over.clone();
            drop(timeout(CAUSE_WAIT, over.wait_for(|over| *over)).await);
            // TLS 1.3 lets us send before the peer has seen our certificate, so its verdict arrives only here.
            connection.failure.refusal().map_or(StreamError::Lost(error), StreamError::Rejected)
        }
    }
}

fn refused<B>(response: &Response<B>) -> StreamError {
    let number = response.headers().get(REFUSAL_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
    match number.and_then(Refusal::from_number) {
        Some(refusal) => StreamError::Refused(refusal),
        None => StreamError::Status(response.status()),
    }
}
