//! Takes tunnels: accepts connections of other agents, proves both sides, hands each CONNECT to a handler.
//!
//! Must not know whether a caller is allowed or where its bytes go; the handler decides.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, Method, Response, StatusCode};
use mesh_common::refusal::Refusal;
use mesh_core::id::SpiffeId;
use tokio::{net::TcpStream, sync::watch, task::JoinSet, time::timeout};

use crate::{
    identity::Identities,
    sys::socket::Acceptor,
    transport::{
        ELSEWHERE_HEADER, REFUSAL_HEADER, h2_settings,
        tls::{Presents, Secured, Tls, TlsError},
        tunnel::Tunnel,
    },
};

/// Pause after the system has refused to accept, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How tunnels are accepted.
#[derive(Clone)]
pub struct Acceptance {
    /// Which of our workloads a connection is for.
    pub presents: Arc<Presents>,
    /// Told of every connection that failed: to be counted and logged.
    pub failed: Arc<dyn Fn(Failed) + Send + Sync>,
    /// A peer that does not finish its handshake within this is closed.
    pub handshake_timeout: Duration,
    /// How long streams may finish once the drain signal has come.
    pub drain: Duration,
}

/// A connection that failed.
#[derive(Debug)]
pub struct Failed {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub error: AcceptError,
}

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    #[error("cannot accept connections")]
    Listener(#[source] io::Error),
    #[error("cannot secure the connection")]
    Tls(#[source] TlsError),
    #[error("the peer broke the HTTP/2 protocol")]
    Protocol(#[source] h2::Error),
    #[error("the peer did not answer pings")]
    Dead,
}

impl AcceptError {
    /// The number by which this is reported.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Tls(error) => error.refusal(),
            Self::Protocol(_) => Refusal::BadProtocol,
            Self::Listener(_) | Self::Dead => Refusal::ConnectFailed,
        }
    }
}

/// Accepts tunnels on `listener` until `drain` turns true or its sender is gone; then tells the peers to go elsewhere
/// and returns when the last stream has ended or the drain time is over. `spawn` says where a connection runs, and with
/// which handler of its requests.
///
/// # Errors
/// The trust bundle cannot be used.
pub async fn serve(
    listener: Acceptor,
    identities: Identities,
    acceptance: Acceptance,
    spawn: impl Fn(&mut JoinSet<()>, Arrival),
    mut drain: watch::Receiver<bool>,
) -> Result<(), TlsError> {
    let tls = Arc::new(Tls::new(identities)?);
    let mut connections = JoinSet::new();
    loop {
        // Collects what has ended, so that the set does not grow.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = asked_to_drain(&mut drain) => break,
        };
        match accepted {
            Ok((tcp, remote)) => {
                let peer = Peer { tls: tls.clone(), acceptance: acceptance.clone(), remote };
                spawn(&mut connections, Arrival { peer, tcp, drain: drain.clone() });
            }
            Err(error) => {
                let at = listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
                (acceptance.failed)(Failed { local: at, remote: at, error: AcceptError::Listener(error) });
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    // What is left after the drain time is cut off as the set is dropped.
    drop(timeout(acceptance.drain, all).await);
    Ok(())
}

async fn asked_to_drain(drain: &mut watch::Receiver<bool>) {
    // A sender that is gone means the same.
    drop(drain.wait_for(|drain| *drain).await);
}

/// A connection that was accepted; to be run on the runtime that is to carry its streams.
pub struct Arrival {
    peer: Peer,
    tcp: std::net::TcpStream,
    drain: watch::Receiver<bool>,
}

impl Arrival {
    /// Serves it to its end; each request is handled by a task of its own.
    pub async fn run<H, F>(self, handler: H)
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        match TcpStream::from_std(self.tcp) {
            Ok(tcp) => self.peer.run(tcp, handler, self.drain).await,
            Err(error) => tracing::warn!(%error, "cannot watch a connection"),
        }
    }
}

/// One connection of a peer.
struct Peer {
    tls: Arc<Tls>,
    acceptance: Acceptance,
    remote: SocketAddr,
}

impl Peer {
    async fn run<H, F>(self, tcp: TcpStream, handler: H, drain: watch::Receiver<bool>)
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let Ok(local) = tcp.local_addr() else { return };
        if let Err(error) = self.serve(tcp, local, handler, drain).await {
            (self.acceptance.failed)(Failed { local, remote: self.remote, error });
        }
    }

    async fn serve<H, F>(
        &self,
        tcp: TcpStream,
        local: SocketAddr,
        handler: H,
        mut drain: watch::Receiver<bool>,
    ) -> Result<(), AcceptError>
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(secured) = self.secure(tcp).await? else { return Ok(()) };
        let from = From { peer: secured.peer.id, presented: secured.ours.id.clone(), remote: self.remote, local };
        let limit = self.acceptance.handshake_timeout;
        let mut connection = match timeout(limit, h2_settings::server().handshake(secured.io)).await {
            Ok(connection) => connection.map_err(AcceptError::Protocol)?,
            Err(_elapsed) => return Err(AcceptError::Tls(TlsError::TimedOut(limit))),
        };
        let pings = connection.ping_pong();
        let dead = async {
            match pings {
                Some(pings) => h2_settings::until_dead(pings).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(dead);
        let mut draining = false;
        loop {
            tokio::select! {
                next = connection.accept() => match next {
                    None => return Ok(()),
                    Some(Ok((head, respond))) => {
                        if let Some(request) = from.request(head, respond) {
                            tokio::spawn(handler(request));
                        }
                    }
                    // A connection that is cut is no fault of the protocol.
                    Some(Err(error)) if error.is_io() => return Ok(()),
                    Some(Err(error)) => return Err(AcceptError::Protocol(error)),
                },
                () = asked_to_drain(&mut drain), if !draining => {
                    draining = true;
                    connection.graceful_shutdown();
                }
                () = &mut dead => return Err(AcceptError::Dead),
            }
        }
    }

    /// `None`: closed without a byte, as port checks do.
    async fn secure(&self, tcp: TcpStream) -> Result<Option<Secured>, AcceptError> {
        let handshake = async {
            if matches!(tcp.peek(&mut [0]).await, Ok(0) | Err(_)) {
                return Ok(None);
            }
            drop(tcp.set_nodelay(true));
            self.tls.accept(tcp, &*self.acceptance.presents).await.map(Some)
        };
        let limit = self.acceptance.handshake_timeout;
        match timeout(limit, handshake).await {
            Ok(secured) => secured.map_err(AcceptError::Tls),
            Err(_elapsed) => Err(AcceptError::Tls(TlsError::TimedOut(limit))),
        }
    }
}

/// What all requests of a connection have in common.
struct From {
    peer: SpiffeId,
    presented: SpiffeId,
    remote: SocketAddr,
    local: SocketAddr,
}

impl From {
    /// The request, or `None` where it was answered already because it is no CONNECT to an address and port.
    fn request(&self, head: http::Request<RecvStream>, respond: SendResponse<Bytes>) -> Option<Request> {
        let (head, receive) = head.into_parts();
        let target = head.uri.authority().and_then(|authority| authority.as_str().parse().ok());
        let Some(target) = target.filter(|_| head.method == Method::CONNECT) else {
            answer(respond, StatusCode::BAD_REQUEST, Refusal::BadProtocol);
            return None;
        };
        Some(Request {
            peer: self.peer.clone(),
            presented: self.presented.clone(),
            target,
            remote: self.remote,
            local: self.local,
            headers: head.headers,
            receive,
            respond,
        })
    }
}

/// A peer agent asks for a tunnel. Dropped without an answer, it is reset.
pub struct Request {
    /// Proved by the peer's certificate.
    pub peer: SpiffeId,
    /// Whose certificate we showed.
    pub presented: SpiffeId,
    /// `:authority` of the CONNECT.
    pub target: SocketAddr,
    pub remote: SocketAddr,
    pub local: SocketAddr,
    /// Of the CONNECT: `traceparent`, `baggage`, `forwarded`.
    pub headers: HeaderMap,
    receive: RecvStream,
    respond: SendResponse<Bytes>,
}

impl Request {
    /// Answers 200; bytes may flow.
    ///
    /// # Errors
    /// The peer has given up meanwhile.
    pub fn accept(mut self) -> io::Result<Tunnel> {
        let send = self
            .respond
            .send_response(Response::new(()), false)
            .map_err(|error| io::Error::new(io::ErrorKind::ConnectionReset, error))?;
        let tunnel = Tunnel::new(self.peer, send, self.receive, None);
        // Only our agents ask to be sent elsewhere. What the application has not taken, they may send there.
        Ok(if self.headers.contains_key(ELSEWHERE_HEADER) { tunnel.asked() } else { tunnel })
    }

    /// Answers with the status that HBONE has for this refusal (400, 401 or 503), and with its number for our own
    /// agents.
    pub fn refuse(self, refusal: Refusal) {
        answer(self.respond, status_of(refusal), refusal);
    }
}

fn answer(mut respond: SendResponse<Bytes>, status: StatusCode, refusal: Refusal) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    response.headers_mut().insert(REFUSAL_HEADER, (refusal as u32).into());
    // Fails only when the peer has given up meanwhile, and then nobody wants the answer.
    drop(respond.send_response(response, true));
}

fn status_of(refusal: Refusal) -> StatusCode {
    match refusal {
        Refusal::Denied | Refusal::UntrustedPeer | Refusal::ExpiredPeer | Refusal::UnexpectedIdentity => {
            StatusCode::UNAUTHORIZED
        }
        Refusal::BadProtocol | Refusal::BadRequest => StatusCode::BAD_REQUEST,
        Refusal::UnknownPort
        | Refusal::NoEndpoint
        | Refusal::NoHealthyEndpoint
        | Refusal::AgentAwayFailClosed
        | Refusal::MapFull
        | Refusal::PlaintextForbidden
        | Refusal::ConnectFailed
        | Refusal::ConnectTimeout
        | Refusal::HandshakeFailed
        | Refusal::TunnelRefused
        | Refusal::NotLocal
        | Refusal::NoIdentity
        | Refusal::OriginalLost
        | Refusal::Draining
        | Refusal::TaskGone
        | Refusal::NotReady
        | Refusal::UpstreamReset => StatusCode::SERVICE_UNAVAILABLE,
    }
}
