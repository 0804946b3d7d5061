//! Which connection a new stream goes on: the open ones per (our identity, agent, expected identity), how many streams
//! each carries, and the one attempt to make another that all who need it wait for.
//!
//! Must not know how a connection is made or what HTTP/2 says on it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use mesh_core::id::SpiffeId;
use tokio::sync::watch;

use crate::{
    identity::Leaf,
    transport::{dial::DialError, h2_settings::STREAMS_PER_CONNECTION, hbone, mux, tunnel::Halves, unopened::Unopened},
};

/// What connections are shared by. Two workloads never share one: each proves its own identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub from: SpiffeId,
    pub agent: SocketAddr,
    pub expect: SpiffeId,
}

/// An open connection.
pub(super) struct Connection {
    pub number: u64,
    /// Which of our certificates it was made with.
    pub ours: Arc<Leaf>,
    /// New streams only before this: afterwards a certificate has expired.
    pub good_until: SystemTime,
    pub opener: Opener,
}

/// Asks for streams on a connection, in whatever the peer speaks.
pub(super) enum Opener {
    Mesh(mux::Opener),
    Hbone(hbone::Opener),
}

impl Opener {
    /// Asks for a stream to `target`, and waits for the answer.
    ///
    /// # Errors
    /// It was refused or reset, or the connection takes none or is lost.
    pub(super) async fn open(&self, target: SocketAddr, elsewhere: bool) -> Result<Halves, Unopened> {
        match self {
            Self::Mesh(opener) => opener.open(target, elsewhere).await.map(Halves::Mesh),
            Self::Hbone(opener) => opener.open(target, elsewhere).await.map(Halves::Hbone),
        }
    }

    /// How many streams the peer takes at once.
    fn room(&self) -> usize {
        match self {
            Self::Mesh(opener) if opener.takes_more() => STREAMS_PER_CONNECTION,
            Self::Mesh(_) => 0,
            Self::Hbone(opener) => opener.room(),
        }
    }
}

/// What an attempt to connect came to; `None` while it lasts.
pub(super) type Outcome = Option<Result<(), Arc<DialError>>>;

/// The answer to a wish for a stream.
pub(super) enum Turn {
    /// Use this connection.
    Ready(Lease),
    /// Wait for this attempt, then ask again.
    Wait(watch::Receiver<Outcome>),
    /// Make the attempt: connect, `add` on success, and tell the outcome either way.
    Connect(watch::Sender<Outcome>, watch::Receiver<Outcome>),
}

/// The connections of one dialler. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Pool {
    shelves: Arc<Mutex<HashMap<Key, Shelf>>>,
}

#[derive(Default)]
struct Shelf {
    open: Vec<Slot>,
    attempt: Option<watch::Receiver<Outcome>>,
}

struct Slot {
    connection: Arc<Connection>,
    streams: usize,
    idle_since: Instant,
}

impl Pool {
    /// A place for one more stream made with certificate `ours`, or what to do to get one.
    pub(super) fn turn(&self, key: &Key, ours: &Arc<Leaf>) -> Turn {
        let now = SystemTime::now();
        let mut shelves = self.lock();
        let shelf = shelves.entry(key.clone()).or_default();
        // A connection made with a certificate that was renewed since, or with one that has expired, takes no new
        // stream. It lives until its last one ends.
        shelf.open.retain(|slot| Arc::ptr_eq(&slot.connection.ours, ours) && now < slot.connection.good_until);
        for slot in &mut shelf.open {
            if slot.streams < STREAMS_PER_CONNECTION.min(slot.connection.opener.room()) {
                slot.streams += 1;
                let connection = slot.connection.clone();
                return Turn::Ready(Lease { pool: self.clone(), key: key.clone(), connection });
            }
        }
        match &shelf.attempt {
            // An attempt whose teller is gone was killed with its runtime; do not wait for it.
            Some(attempt) if attempt.has_changed().is_ok() => Turn::Wait(attempt.clone()),
            _ => {
                let (tell, hear) = watch::channel(None);
                shelf.attempt = Some(hear.clone());
                Turn::Connect(tell, hear)
            }
        }
    }

    /// An attempt ended: keeps the connection, if there is one.
    pub(super) fn attempted(&self, key: &Key, made: Option<Connection>) {
        let mut shelves = self.lock();
        let shelf = shelves.entry(key.clone()).or_default();
        shelf.attempt = None;
        if let Some(connection) = made {
            let slot = Slot { connection: Arc::new(connection), streams: 0, idle_since: Instant::now() };
            shelf.open.push(slot);
        } else if shelf.open.is_empty() {
            shelves.remove(key);
        }
    }

    /// A connection takes no more streams: it is over, or the peer is leaving.
    pub(super) fn remove(&self, key: &Key, number: u64) {
        let mut shelves = self.lock();
        if let Some(shelf) = shelves.get_mut(key) {
            shelf.open.retain(|slot| slot.connection.number != number);
            if shelf.open.is_empty() && shelf.attempt.is_none() {
                shelves.remove(key);
            }
        }
    }

    /// Lets go of connections without a stream for `idle` or longer. They close by themselves.
    pub(super) fn sweep(&self, idle: Duration) {
        self.lock().retain(|_, shelf| {
            shelf.open.retain(|slot| slot.streams > 0 || slot.idle_since.elapsed() < idle);
            !shelf.open.is_empty() || shelf.attempt.is_some()
        });
    }

    /// Open connections, and streams on them.
    pub(super) fn size(&self) -> (usize, usize) {
        let shelves = self.lock();
        let slots = || shelves.values().flat_map(|shelf| &shelf.open);
        (slots().count(), slots().map(|slot| slot.streams).sum())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Shelf>> {
        // Nothing panics while it is locked, and every state in between is a valid one.
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place for one stream on a connection; given back on drop.
pub(super) struct Lease {
    pool: Pool,
    key: Key,
    pub connection: Arc<Connection>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut shelves = self.pool.lock();
        let slots = shelves.get_mut(&self.key).into_iter().flat_map(|shelf| &mut shelf.open);
        for slot in slots.filter(|slot| slot.connection.number == self.connection.number) {
            slot.streams = slot.streams.saturating_sub(1);
            slot.idle_since = Instant::now();
        }
    }
}
