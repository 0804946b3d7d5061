//! HTTP/1.1: each request of a client's connection is planned, sent and recorded by itself.
//!
//! hyper parses and writes both sides; heads pass with their names' case, bodies stream with backpressure. What is
//! connection-level is removed ([`hop`]); `Upgrade` and `CONNECT` become a byte stream when the server agrees. Request
//! smuggling ends here: what hyper cannot frame without doubt is refused, and what is sent on is framed anew.
//! Must not know how a client was found to speak HTTP.

mod answer;
mod exchange;
mod linger;
pub(in crate::proxy) mod pool;
mod upgrade;

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::{Version, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use mesh_common::refusal::Refusal;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use upgrade::Switched;

use super::client::Client;
use crate::{
    proxy::{
        route::{Route, Upstream},
        wire::Wire,
    },
    telemetry::metrics::Protocol,
};

/// How often a client is looked at while it waits for an answer. One that died without a word is found by keepalive
/// first, so there is no hurry.
const LOOK: Duration = Duration::from_secs(2);

/// What a connection may hold of heads and bodies each way, which bounds how long a head may be too: twice what Envoy takes, and eight
/// times what servers usually do.
const MOST_BUFFERED: usize = 128 << 10;

/// A client's connection.
struct Connection {
    client: Client,
    /// The client speaks HTTP/1.0, to which the end of the connection may be the end of an answer.
    old: AtomicBool,
    /// What the connection is when it is no longer HTTP.
    switched: Mutex<Option<Switched>>,
}

/// Serves a client until its connection ends. `spare` is an upstream that was opened while the protocol was not yet
/// known; it becomes the first pooled one.
pub(in crate::proxy) async fn serve(route: Arc<Route>, client: Wire, spare: Option<Upstream>) {
    if let Some(spare) = spare {
        pool::donate(&route, spare).await;
    }
    let (watched, closing) = (client.watched(), client.watched());
    let state = Arc::new(Connection {
        client: Client::new(route.clone()),
        old: AtomicBool::default(),
        switched: Mutex::default(),
    });
    let shared = state.clone();
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let connection = shared.clone();
        connection.old.store(request.version() == Version::HTTP_10, Ordering::Relaxed);
        async move { exchange::answer(connection, request).await }
    });
    let connection = http1::Builder::new()
        .preserve_header_case(true)
        .half_close(true)
        .auto_date_header(false)
        .max_buf_size(MOST_BUFFERED)
        .serve_connection(TokioIo::new(client), service)
        .with_upgrades();
    let mut drain = route.proxy.drain.subscribe();
    let ended = {
        let mut connection = std::pin::pin!(connection);
        let mut broken = std::pin::pin!(broken(watched));
        let ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            // Dropping the connection drops the request on it, and with that its upstream.
            () = &mut broken => return,
            // The sender lives in the proxy that we hold.
            () = async { drop(drain.wait_for(|drain| *drain).await) } => None,
        };
        match ended {
            Some(ended) => ended,
            None => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = connection => ended,
                    () = broken => return,
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(src.addr = %route.src_addr, %error, "a client's HTTP connection ended early");
        if error.is_parse() {
            // hyper has answered 400 or 431 and closed; no request came out of it that could tell.
            let mut access = route.record(Protocol::Http);
            access.refusal = Some(Refusal::BadRequest);
        }
        if let Some(closing) = &closing
            && error.is_user()
            && state.old.load(Ordering::Relaxed)
        {
            // The answer broke off, and must not look whole.
            return linger::reset(closing);
        }
    }
    let switched = state.switched.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (switched, closing) {
        (Some(switched), closing) => {
            drop(closing);
            switched.await;
        }
        // Idle connections are closed by a drain; there are many, and they have no answer to lose.
        (None, Some(closing)) if !*route.proxy.drain.borrow() => linger::close(closing).await,
        (None, _) => {}
    }
}

/// Waits until the client's socket is broken. hyper does not read while a request is being answered, because a client
/// may end its direction and still wait for the answer; so nobody else would see a client that has died.
async fn broken(watched: Option<OwnedFd>) {
    let Some(fd) = watched else { return std::future::pending().await };
    let mut turn = tokio::time::interval(LOOK);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        turn.tick().await;
        // Both directions over, or an error, are always reported.
        let mut asked = [PollFd::new(fd.as_fd(), PollFlags::empty())];
        if !matches!(poll(&mut asked, PollTimeout::ZERO), Ok(0)) {
            return;
        }
    }
}

impl Connection {
    /// It becomes this when the present answer has been sent.
    fn becomes(&self, switched: Switched) {
        *self.switched.lock().unwrap_or_else(PoisonError::into_inner) = Some(switched);
    }
}

/// A service never fails: what cannot be answered is an answer that breaks off.
type Answered = Result<hyper::Response<answer::Answer>, exchange::ClientGone>;
