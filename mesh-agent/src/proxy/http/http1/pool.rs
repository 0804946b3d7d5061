//! Idle upstream connections, by endpoint and source identity.
//!
//! Reused for 3 s only: an HTTP server may close an idle connection at any moment, and a request must not be lost to
//! that race more often than needed. Must not know what was or will be sent on them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use mesh_core::{id::SpiffeId, model::EndpointId, plan::Delivery};

use super::{MOST_BUFFERED, answer::Upload};
use crate::{
    proxy::{
        Proxy,
        http::parting::Parting,
        route::{Route, Upstream},
        wire::{self, Wire},
    },
    transport::tunnel::UNTOLD,
};

/// Shorter than the keep-alive of every common server.
const IDLE: Duration = Duration::from_secs(3);
/// Idle connections kept per endpoint and source.
const MAX_IDLE: usize = 1024;
/// Locks over which the endpoints are spread.
const SHARDS: usize = 16;

/// An upstream connection that takes a request now.
pub(super) struct Sender {
    pub(super) requests: SendRequest<Upload>,
    /// Octets written to it.
    written: Arc<AtomicU64>,
    /// Of these, how many the application had taken when it ended the connection; `None` where nobody will say.
    taken: Option<Arc<AtomicU64>>,
    /// When a certificate that it was made with expires.
    good_until: Option<SystemTime>,
}

impl Sender {
    /// Whether the certificates are good that it was made with.
    fn is_good(&self) -> bool {
        self.good_until.is_none_or(|until| SystemTime::now() < until)
    }

    /// Where the next request begins in what is written.
    pub(super) fn position(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether somebody will say how much the application has taken.
    pub(super) fn is_told(&self) -> bool {
        self.taken.is_some()
    }

    /// Whether the application has ended the connection without having read one octet from `position` on: it had done so
    /// before, and the request has met its end on the way, or lay unread.
    pub(super) fn has_missed(&self, position: u64) -> bool {
        let taken = self.taken.as_ref().map(|taken| taken.load(Ordering::Relaxed));
        taken.is_some_and(|taken| taken != UNTOLD && taken <= position)
    }
}

/// Where a connection is put back.
#[derive(Clone)]
pub(super) struct Slot {
    pub(super) endpoint: EndpointId,
    pub(super) source: SpiffeId,
    /// How it was made. A plan that wants another way, plaintext or mTLS, must not get it.
    pub(super) delivery: Delivery,
}

/// The idle connections of all endpoints.
#[derive(Default)]
pub(in crate::proxy) struct Pool {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Default)]
struct Shard(HashMap<(EndpointId, SpiffeId), Vec<Idle>>);

struct Idle {
    sender: Sender,
    delivery: Delivery,
    since: Instant,
}

impl Pool {
    /// The connection that was used last, if one is fit.
    pub(super) fn take(&self, slot: &Slot) -> Option<Sender> {
        let mut shard = self.shard(&slot.endpoint);
        let idle = shard.0.get_mut(&(slot.endpoint, slot.source.clone()))?;
        while let Some(Idle { sender, delivery, since }) = idle.pop() {
            if sender.requests.is_ready() && delivery == slot.delivery && since.elapsed() < IDLE && sender.is_good() {
                return Some(sender);
            }
        }
        None
    }

    fn put(&self, slot: Slot, sender: Sender) {
        let mut shard = self.shard(&slot.endpoint);
        let idle = shard.0.entry((slot.endpoint, slot.source)).or_default();
        if idle.len() < MAX_IDLE {
            idle.push(Idle { sender, delivery: slot.delivery, since: Instant::now() });
        }
    }

    /// Closes what has been idle for too long.
    pub(in crate::proxy) fn sweep(&self) {
        for shard in &self.shards {
            shard.lock().unwrap_or_else(PoisonError::into_inner).0.retain(|_, idle| {
                idle.retain(|idle| idle.since.elapsed() < IDLE && !idle.sender.requests.is_closed());
                !idle.is_empty()
            });
        }
    }

    /// Closes what leads to endpoints that are no longer chosen.
    pub(in crate::proxy) fn retain(&self, chosen: impl Fn(&EndpointId) -> bool) {
        for shard in &self.shards {
            shard.lock().unwrap_or_else(PoisonError::into_inner).0.retain(|(endpoint, _), _| chosen(endpoint));
        }
    }

    /// Closes everything.
    pub(in crate::proxy) fn clear(&self) {
        for shard in &self.shards {
            shard.lock().unwrap_or_else(PoisonError::into_inner).0.clear();
        }
    }

    fn shard(&self, endpoint: &EndpointId) -> MutexGuard<'_, Shard> {
        // FNV-1a: spreads addresses well enough.
        let bytes = endpoint.0.ip.0.iter().chain(&endpoint.0.port);
        let hash = bytes
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        let index = (hash >> 32) as usize % SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts a connection back when it is fit for another request; it may still have to finish an upload.
pub(super) fn give_back(proxy: &Arc<Proxy>, slot: Slot, mut sender: Sender) {
    if *proxy.drain.borrow() || sender.requests.is_closed() {
        return;
    }
    if sender.requests.is_ready() {
        proxy.pool.put(slot, sender);
        return;
    }
    let proxy = proxy.clone();
    tokio::spawn(async move {
        if sender.requests.ready().await.is_ok() {
            proxy.pool.put(slot, sender);
        }
    });
}

/// Begins HTTP on a connected upstream.
///
/// # Errors
/// The connection ended at once.
pub(super) async fn handshake(wire: Wire) -> hyper::Result<Sender> {
    let (gone, good_until) = (wire.gone.clone(), wire.good_until());
    let parting = Parting::new(wire);
    let (written, taken) = (parting.written(), parting.taken());
    let mut builder = http1::Builder::new();
    builder.preserve_header_case(true).max_buf_size(MOST_BUFFERED);
    let (requests, connection) = builder.handshake(TokioIo::new(parting)).await?;
    tokio::spawn(async move {
        tokio::select! {
            ended = connection.with_upgrades() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "an upstream HTTP connection ended early");
                }
            }
            () = wire::gone(gone) => tracing::debug!("an upstream HTTP connection ended with its task"),
        }
    });
    Ok(Sender { requests, written, taken, good_until })
}

/// Makes a connection that was opened ahead an idle one.
pub(super) async fn donate(route: &Route, spare: Upstream) {
    let slot =
        Slot { endpoint: spare.plan.endpoint.id, source: route.source.identity.clone(), delivery: spare.plan.delivery };
    // One that has ended meanwhile is no loss.
    if let Ok(sender) = handshake(spare.wire).await {
        give_back(&route.proxy, slot, sender);
    }
}
