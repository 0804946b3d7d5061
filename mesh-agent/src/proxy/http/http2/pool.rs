//! Upstream HTTP/2 connections, by endpoint and source identity; each carries many requests at once.
//!
//! Every worker has its own, so a connection and the requests on it stay on one thread. Another one is opened when the
//! server takes no more streams on those that are there. Must not know what was or will be sent on them.

use std::{
    collections::HashMap,
    future::{Future as _, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::Poll,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::{
    Reason, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::Request;
use mesh_common::refusal::Refusal;
use mesh_core::{
    id::SpiffeId,
    model::EndpointId,
    plan::{Delivery, Plan},
};
use tokio::time::timeout;

use super::{CONNECTION_WINDOW, FAULTS_FORGIVEN, HEADER_LIST, RESETS_REMEMBERED, SEND_BUFFER, STREAM_WINDOW, STREAMS};
use crate::proxy::{
    draw,
    http::parting::Parting,
    loads::InFlight,
    route::{Route, Upstream},
    wire,
};

/// A connection without a request is closed after this. A server that closes it earlier says so, and no request is lost.
const IDLE: Duration = Duration::from_secs(30);

/// Streams that h2 lets us open before the server has said how many it takes.
const NOT_GREETED: usize = 0;

/// Endpoints whose connections a client has at hand; more than these are looked up each time.
const MAX_AT_HAND: usize = 64;

/// The connections that a client has at hand.
#[derive(Default)]
pub(super) struct AtHand(Mutex<Vec<(EndpointId, Arc<Group>)>>);

impl AtHand {
    /// A place on an open connection to the planned endpoint.
    pub(super) fn lease(&self, route: &Route, plan: &Plan) -> Option<Lease> {
        self.group(route, &plan.endpoint.id).take(&plan.delivery)
    }

    fn group(&self, route: &Route, endpoint: &EndpointId) -> Arc<Group> {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, group)) = groups.iter().find(|(known, _)| known == endpoint) {
            return group.clone();
        }
        let key = Key { endpoint: *endpoint, source: route.source.identity.clone() };
        let group = route.proxy.requests.group(key);
        if groups.len() == MAX_AT_HAND {
            groups.clear();
        }
        groups.push((*endpoint, group.clone()));
        group
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    endpoint: EndpointId,
    source: SpiffeId,
}

/// The connections to all endpoints.
#[derive(Default)]
pub(in crate::proxy) struct Pool(Mutex<HashMap<Key, Arc<Group>>>);

/// The connections that are alike.
#[derive(Default)]
struct Group {
    open: Mutex<Vec<Arc<Shared>>>,
    /// Held by who opens another one, so that those who wait find it.
    opening: tokio::sync::Mutex<Option<Refusal>>,
    /// Counts the attempts to open one.
    attempts: AtomicU64,
}

/// One connection.
struct Shared {
    sender: Mutex<SendRequest<Bytes>>,
    /// How it was made. A plan that wants another way, plaintext or mTLS, must not get it.
    delivery: Delivery,
    requests: AtomicUsize,
    /// It takes no more requests.
    closed: Arc<AtomicBool>,
    /// It takes no more afterwards: a certificate that it was made with has expired.
    good_until: Option<SystemTime>,
    idle_since: Mutex<Instant>,
}

/// The right to one request on a connection.
pub(super) struct Lease {
    shared: Arc<Shared>,
    /// The connection has carried requests before, and may have been closed meanwhile.
    pub(super) used: bool,
}

impl Pool {
    fn group(&self, key: Key) -> Arc<Group> {
        self.groups().entry(key).or_default().clone()
    }

    /// Closes what has been idle for too long.
    pub(in crate::proxy) fn sweep(&self) {
        self.groups().retain(|_, group| {
            let mut open = group.open();
            open.retain(|shared| !shared.is_closed() && !shared.is_idle());
            // A client has it at hand, or is about to open a connection.
            !open.is_empty() || Arc::strong_count(group) > 1
        });
    }

    /// Closes what leads to endpoints that are no longer chosen; what carries a request closes after it.
    pub(in crate::proxy) fn retain(&self, chosen: impl Fn(&EndpointId) -> bool) {
        for (key, group) in self.groups().iter() {
            if !chosen(&key.endpoint) {
                group.open().clear();
            }
        }
    }

    /// Closes everything; what carries a request closes after it.
    pub(in crate::proxy) fn clear(&self) {
        for (_, group) in self.groups().drain() {
            group.open().clear();
        }
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<Key, Arc<Group>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    /// The connection with the fewest requests, if one takes another.
    fn take(&self, delivery: &Delivery) -> Option<Lease> {
        let mut open = self.open();
        open.retain(|shared| !shared.is_closed());
        let fits = open.iter().filter(|shared| shared.delivery == *delivery && shared.has_room());
        fits.min_by_key(|shared| shared.requests.load(Ordering::Relaxed)).map(|shared| Lease::new(shared, true))
    }

    fn put(&self, shared: &Arc<Shared>) {
        self.open().push(shared.clone());
    }

    fn open(&self) -> MutexGuard<'_, Vec<Arc<Shared>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed) || self.good_until.is_some_and(|until| until <= SystemTime::now())
    }

    fn is_idle(&self) -> bool {
        let since = *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner);
        self.requests.load(Ordering::Relaxed) == 0 && since.elapsed() >= IDLE
    }

    fn has_room(&self) -> bool {
        let most = self.sender.lock().unwrap_or_else(PoisonError::into_inner).current_max_send_streams();
        self.requests.load(Ordering::Relaxed) < most.min(STREAMS as usize)
    }
}

impl Lease {
    fn new(shared: &Arc<Shared>, used: bool) -> Self {
        shared.requests.fetch_add(1, Ordering::Relaxed);
        Self { shared: shared.clone(), used }
    }

    /// Begins the request.
    ///
    /// # Errors
    /// The connection takes no more; nothing was sent.
    pub(super) fn send(&self, head: Request<()>, end: bool) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let sent = self.shared.sender.lock().unwrap_or_else(PoisonError::into_inner).send_request(head, end);
        if sent.as_ref().is_err_and(|error| error.reason().is_some() || error.is_io()) {
            self.give_up();
        }
        sent
    }

    /// Nobody is to use the connection any more.
    pub(super) fn give_up(&self) {
        self.shared.closed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.shared.requests.fetch_sub(1, Ordering::Relaxed) == 1 {
            *self.shared.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
    }
}

/// A place on a connection to the planned endpoint: on one that somebody else has opened meanwhile, unless it has to be
/// `fresh`, or on a new one. A failure is charged to the endpoint once, also when many wait for the connection.
///
/// # Errors
/// No connection could be made.
pub(super) async fn open(route: &Route, plan: Plan, at_hand: &AtHand, fresh: bool) -> Result<Lease, Refusal> {
    let group = at_hand.group(route, &plan.endpoint.id);
    let before = group.attempts.load(Ordering::Relaxed);
    let mut failed = group.opening.lock().await;
    if !fresh && let Some(lease) = group.take(&plan.delivery) {
        return Ok(lease);
    }
    // Another's attempt began after we had found nothing: ours would not fare better.
    if let Some(refusal) = *failed
        && group.attempts.load(Ordering::Relaxed) != before
    {
        return Err(refusal);
    }
    let connected = match route.connect(plan).await {
        Ok(upstream) => handshake(upstream, route.proxy.connect_timeout).await.map_err(|(refusal, in_flight)| {
            in_flight.failed(route.proxy.now(), draw());
            refusal
        }),
        Err(refusal) => Err(refusal),
    };
    group.attempts.fetch_add(1, Ordering::Relaxed);
    *failed = connected.as_ref().err().copied();
    let shared = connected?;
    if !*route.proxy.drain.borrow() {
        group.put(&shared);
    }
    Ok(Lease::new(&shared, false))
}

/// Begins HTTP/2 on a connected upstream, and waits until the server has greeted: only then is it known how many streams
/// it takes, and that it speaks HTTP/2 at all. Nothing was sent yet that could be lost.
async fn handshake(upstream: Upstream, within: Duration) -> Result<Arc<Shared>, (Refusal, InFlight)> {
    let Upstream { wire, plan, in_flight } = upstream;
    let (gone, good_until) = (wire.gone.clone(), wire.good_until());
    let (sender, mut connection) = match settings().handshake::<_, Bytes>(Parting::new(wire)).await {
        Ok(begun) => begun,
        Err(error) => return Err((judge(&error), in_flight)),
    };
    let greeted = poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
        Poll::Ready(ended) => Poll::Ready(ended.and(Err(Reason::NO_ERROR.into()))),
        Poll::Pending if connection.max_concurrent_send_streams() != NOT_GREETED => Poll::Ready(Ok(())),
        Poll::Pending => Poll::Pending,
    });
    match timeout(within, greeted).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::debug!(dst.endpoint = %plan.endpoint.id, %error, "no HTTP/2 with an endpoint");
            return Err((judge(&error), in_flight));
        }
        Err(_elapsed) => return Err((Refusal::ConnectTimeout, in_flight)),
    }
    let closed = Arc::new(AtomicBool::new(false));
    let shared = Shared {
        sender: Mutex::new(sender),
        delivery: plan.delivery,
        requests: AtomicUsize::new(0),
        closed: closed.clone(),
        good_until,
        idle_since: Mutex::new(Instant::now()),
    };
    tokio::spawn(async move {
        tokio::select! {
            ended = connection => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "an upstream HTTP/2 connection ended early");
                }
            }
            () = wire::gone(gone) => tracing::debug!("an upstream HTTP/2 connection ended with its task"),
        }
        closed.store(true, Ordering::Relaxed);
    });
    Ok(Arc::new(shared))
}

/// What it means that a connection could not begin.
fn judge(error: &h2::Error) -> Refusal {
    if error.is_io() || error.is_remote() { Refusal::UpstreamReset } else { Refusal::BadProtocol }
}

/// Makes a connection that was opened ahead one of the pool.
pub(super) async fn donate(route: &Route, at_hand: &AtHand, spare: Upstream) {
    let group = at_hand.group(route, &spare.plan.endpoint.id);
    // One that has ended meanwhile is no loss.
    if let Ok(shared) = handshake(spare, route.proxy.connect_timeout).await
        && !*route.proxy.drain.borrow()
    {
        group.put(&shared);
    }
}

fn settings() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_max_send_streams(NOT_GREETED)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .max_local_error_reset_streams(Some(FAULTS_FORGIVEN))
        .enable_push(false);
    builder
}
