//! The admin servers: a unix socket for the command line, a loopback port for metrics and health.
//!
//! Reads only: everything comes through [`Handles`]. Must not know who made them, and changes nothing. One request
//! per connection, bounded in size, time and number, so that a stuck or hostile client costs only itself.

mod explain;
mod routes;
mod socket_file;

use std::{convert::Infallible, future::Future, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::{balance::Load, config, model::EndpointId};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::JoinSet,
};
use tracing::{debug, warn};

use crate::{api, state::Published};
use socket_file::SocketFile;

/// A request's head may be this large. The longest honest one is an `explain` with two names.
const MAX_HEAD: usize = 16 * 1024;
/// How long answers under way may take to finish on stop.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// What clients may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Most connections served at once by each listener; others wait in its backlog.
    connections: usize,
    /// A connection that lasts longer is closed: a request takes milliseconds.
    lifetime: Duration,
}

const LIMITS: Limits = Limits { connections: 64, lifetime: Duration::from_secs(10) };

/// What the servers may read.
#[derive(Clone)]
pub struct Handles {
    pub snapshot: Published,
    pub status: Arc<dyn Fn() -> api::Status + Send + Sync>,
    /// Prometheus text.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// Whether the agent does its job, or what is still missing.
    pub ready: Arc<dyn Fn() -> Result<(), Vec<String>> + Send + Sync>,
    pub load: Arc<dyn Fn(&EndpointId) -> Load + Send + Sync>,
    /// Monotonic time since the agent started, as in [`Load`].
    pub now: Arc<dyn Fn() -> Duration + Send + Sync>,
    /// A uniformly drawn number; `explain` balances with it as the proxy does.
    pub draw: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// How names are served.
    pub dns: config::Dns,
    /// Which addresses are virtual.
    pub vips: config::VipRanges,
}

/// An admin listener could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("cannot open the admin socket {path}: another agent answers on it; stop that one first")]
    Answered { path: PathBuf },
    #[error("cannot open the admin socket {path}: it exists and is no socket; remove it, or set `admin.socket`")]
    NotASocket { path: PathBuf },
    #[error("cannot open the admin socket {path}: its directory must exist or be creatable, and be writable by root")]
    Socket { path: PathBuf, source: io::Error },
    #[error("cannot listen for metrics on {addr}: free the port, or set `admin.metrics`")]
    Metrics { addr: SocketAddr, source: io::Error },
}

/// Both listeners, open. The socket's file is removed when this is dropped.
pub struct Admin {
    unix: UnixListener,
    tcp: TcpListener,
    _file: SocketFile,
    handles: Handles,
    limits: Limits,
}

#[derive(Clone, Copy)]
enum Listener {
    Admin,
    Metrics,
}

impl Admin {
    /// Opens both listeners. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The socket is in use or cannot be made, or the port is taken.
    pub async fn bind(config: &config::Admin, handles: Handles) -> Result<Self, AdminError> {
        let addr = config.metrics;
        let tcp = TcpListener::bind(addr).await.map_err(|source| AdminError::Metrics { addr, source })?;
        let (unix, file) = SocketFile::bind(&config.socket)?;
        Ok(Self { unix, tcp, _file: file, handles, limits: LIMITS })
    }

    /// Where metrics are served; tells the port where the configuration left it to the system.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn metrics_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Serves until `stop` completes, then lets answers under way finish, for a second at most.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let Self { unix, tcp, _file, handles, limits } = self;
        // Counted apart: the port is open to every task in the host's namespace, the socket to root alone.
        let (mut admins, mut scrapers) = (JoinSet::new(), JoinSet::new());
        let mut stop = std::pin::pin!(stop);
        loop {
            let failed = tokio::select! {
                () = &mut stop => break,
                Some(_) = admins.join_next() => continue,
                Some(_) = scrapers.join_next() => continue,
                accepted = unix.accept(), if admins.len() < limits.connections => accepted.map(|(stream, _)| {
                    admins.spawn(connection(stream, Listener::Admin, handles.clone(), limits));
                }),
                accepted = tcp.accept(), if scrapers.len() < limits.connections => accepted.map(|(stream, _)| {
                    scrapers.spawn(connection(stream, Listener::Metrics, handles.clone(), limits));
                }),
            };
            if let Err(error) = failed {
                warn!(error = %error, "admin connection not accepted");
                // Out of descriptors, most likely: the next attempt would fail at once and spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        drop((unix, tcp));
        let finish = async {
            while admins.join_next().await.is_some() {}
            while scrapers.join_next().await.is_some() {}
        };
        if tokio::time::timeout(LAST_ANSWERS, finish).await.is_err() {
            debug!("admin connections cut on stop");
        }
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin, listener: Listener, handles: Handles, limits: Limits) {
    let answer = service_fn(|request: Request<Incoming>| {
        let (head, _body) = request.into_parts();
        let answer: Response<Full<Bytes>> = match listener {
            Listener::Admin => routes::admin(&handles, &head.method, &head.uri),
            Listener::Metrics => routes::metrics(&handles, &head.method, &head.uri),
        };
        async { Ok::<_, Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.lifetime)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match tokio::time::timeout(limits.lifetime, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(error = %error, "admin connection closed"),
        Err(_) => debug!("admin connection closed: too slow"),
    }
}

#[cfg(test)]
mod tests;
