//! Takes tunnels: accepts connections of other agents, proves both sides, hands each stream that is asked for to a handler.
//!
//! Must not know whether a caller is allowed or where its bytes go; the handler decides.

use std::{error::Error, future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use mesh_common::refusal::Refusal;
use mesh_core::id::SpiffeId;
use tokio::{net::TcpStream, sync::watch, task::JoinSet, time::timeout};

use crate::{
    identity::Identities,
    sys::socket::Acceptor,
    transport::{
        hbone, mux,
        tls::{Framing, Presents, Secured, Tls, TlsError},
        tunnel::{Halves, Tunnel},
    },
};

/// How long connections that have ended may hold their place when no other comes.
const COLLECT: Duration = Duration::from_secs(10);
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
    #[error("the peer broke the protocol that it had agreed to")]
    Protocol(#[source] Box<dyn Error + Send + Sync>),
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
            () = tokio::time::sleep(COLLECT), if !connections.is_empty() => continue,
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
        drain: watch::Receiver<bool>,
    ) -> Result<(), AcceptError>
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(secured) = self.secure(tcp).await? else { return Ok(()) };
        let from = From { peer: secured.peer.id, presented: secured.ours.id.clone(), remote: self.remote, local };
        let handle = |asked| drop(tokio::spawn(handler(from.request(asked))));
        match secured.framing {
            Framing::Mesh => serve_mesh(mux::accepting(secured.io), handle, drain).await,
            Framing::Hbone => {
                let limit = self.acceptance.handshake_timeout;
                match timeout(limit, hbone::accepting(secured.io)).await {
                    Ok(Ok(connection)) => serve_hbone(connection, handle, drain).await,
                    Ok(Err(error)) => Err(AcceptError::Protocol(error.into())),
                    Err(_elapsed) => Err(AcceptError::Tls(TlsError::TimedOut(limit))),
                }
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

async fn serve_mesh(
    mut connection: mux::Accepting,
    handle: impl Fn(Asked),
    mut drain: watch::Receiver<bool>,
) -> Result<(), AcceptError> {
    let mut draining = false;
    loop {
        tokio::select! {
            ended = connection.serve(|asked| handle(Asked::Mesh(asked))) => return match ended {
                // A connection that is cut is no fault of the protocol.
                Ok(()) | Err(mux::Ended::Cut(_)) => Ok(()),
                Err(mux::Ended::Dead) => Err(AcceptError::Dead),
                Err(error @ mux::Ended::Malformed(_)) => Err(AcceptError::Protocol(error.into())),
            },
            () = asked_to_drain(&mut drain), if !draining => {
                draining = true;
                connection.leave();
            }
        }
    }
}

async fn serve_hbone(
    mut connection: hbone::Accepting,
    handle: impl Fn(Asked),
    mut drain: watch::Receiver<bool>,
) -> Result<(), AcceptError> {
    let dead = connection.dead();
    tokio::pin!(dead);
    let mut draining = false;
    loop {
        tokio::select! {
            ended = connection.serve(|asked| handle(Asked::Hbone(asked))) => return match ended {
                Err(error) if !error.is_io() => Err(AcceptError::Protocol(error.into())),
                // Likewise.
                Ok(()) | Err(_) => Ok(()),
            },
            () = asked_to_drain(&mut drain), if !draining => {
                draining = true;
                connection.leave();
            }
            () = &mut dead => return Err(AcceptError::Dead),
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

/// A stream that is asked for, as what the agents speak has it.
enum Asked {
    Mesh(mux::Asked),
    Hbone(hbone::Asked),
}

impl From {
    fn request(&self, asked: Asked) -> Request {
        let (target, elsewhere) = match &asked {
            Asked::Mesh(asked) => (asked.target, asked.elsewhere),
            Asked::Hbone(asked) => (asked.target, asked.elsewhere),
        };
        Request {
            peer: self.peer.clone(),
            presented: self.presented.clone(),
            target,
            remote: self.remote,
            local: self.local,
            elsewhere,
            asked,
        }
    }
}

/// A peer agent asks for a tunnel. Dropped without an answer, it is reset.
pub struct Request {
    /// Proved by the peer's certificate.
    pub peer: SpiffeId,
    /// Whose certificate we showed.
    pub presented: SpiffeId,
    /// The endpoint that is asked for, by its registered address.
    pub target: SocketAddr,
    pub remote: SocketAddr,
    pub local: SocketAddr,
    /// The caller has another endpoint to go to.
    pub elsewhere: bool,
    asked: Asked,
}

impl Request {
    /// Accepts; bytes may flow.
    ///
    /// # Errors
    /// The peer has given up meanwhile.
    pub fn accept(self) -> io::Result<Tunnel> {
        let halves = match self.asked {
            Asked::Mesh(asked) => asked.accept().map(Halves::Mesh),
            Asked::Hbone(asked) => asked.accept().map(Halves::Hbone),
        };
        let tunnel = Tunnel::new(self.peer, halves?, None);
        // Only our agents ask to be sent elsewhere. What the application has not taken, they may send there.
        Ok(if self.elsewhere { tunnel.asked() } else { tunnel })
    }

    /// Refuses, and tells our own agents why.
    pub fn refuse(self, refusal: Refusal) {
        match self.asked {
            Asked::Mesh(asked) => asked.refuse(refusal),
            Asked::Hbone(asked) => asked.refuse(refusal),
        }
    }

    /// Waits until the peer gives up. Over HBONE that is only heard of when the request is accepted.
    pub async fn given_up(&self) {
        match &self.asked {
            Asked::Mesh(asked) => asked.given_up().await,
            Asked::Hbone(_) => std::future::pending().await,
        }
    }
}
