//! Carries the tasks' connections: [`outbound::serve`] for what a task opens, [`inbound::handle`] for what arrives by
//! tunnel.
//!
//! [`Proxy`] is what both share. `mesh-core` decides (`plan`), this performs: `route` turns a plan into a connected
//! [`wire`], `copy` moves bytes, `http` moves requests, `detect` says which of the two; `loads` remembers what the
//! balancer wants to know. Must not know where the snapshot comes from, nor when a namespace is armed.

pub mod inbound;
pub mod outbound;
pub mod places;
pub mod workers;

mod copy;
mod detect;
mod http;
mod loads;
mod route;
mod seen;
mod taken;
mod wire;

#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{
    balance::Load,
    model::{EndpointId, Health},
};
use tokio::sync::watch;

use crate::{state::Published, telemetry::Telemetry, transport::dial::Dialer};
use http::{http1, http2};
use loads::Loads;
use places::Namespaces;
use seen::Seen;

/// How often idle upstream connections are looked through.
const SWEEP: Duration = Duration::from_secs(1);

/// What every connection needs. One per worker; siblings share what all connections decide together.
pub struct Proxy {
    published: Published,
    dialer: Dialer,
    namespaces: Arc<Namespaces>,
    telemetry: Telemetry,
    connect_timeout: Duration,
    loads: Arc<Loads>,
    /// Upstream connections of HTTP/1.1 that are idle.
    pool: http1::pool::Pool,
    /// Upstream connections of HTTP/2.
    requests: http2::pool::Pool,
    seen: Arc<Seen>,
    clock: Instant,
    /// True from the moment on which no new work is taken.
    drain: watch::Sender<bool>,
    /// Connections under way.
    live: watch::Sender<usize>,
}

/// Counts a connection as under way until it is dropped.
struct Live(Arc<Proxy>);

impl Proxy {
    /// A proxy without listeners. `connect_timeout` is for one attempt at one endpoint.
    pub fn new(
        published: Published,
        dialer: Dialer,
        namespaces: Arc<Namespaces>,
        telemetry: Telemetry,
        connect_timeout: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            published,
            dialer,
            namespaces,
            telemetry,
            connect_timeout,
            loads: Arc::default(),
            pool: http1::pool::Pool::default(),
            requests: http2::pool::Pool::default(),
            seen: Arc::default(),
            clock: Instant::now(),
            drain: watch::Sender::new(false),
            live: watch::Sender::new(0),
        })
    }

    /// Another one of the same agent, with upstreams and tunnels of its own.
    #[must_use]
    pub fn sibling(&self, dialer: Dialer) -> Arc<Self> {
        Arc::new(Self {
            published: self.published.clone(),
            dialer,
            namespaces: self.namespaces.clone(),
            telemetry: self.telemetry.clone(),
            connect_timeout: self.connect_timeout,
            loads: self.loads.clone(),
            pool: http1::pool::Pool::default(),
            requests: http2::pool::Pool::default(),
            seen: self.seen.clone(),
            clock: self.clock,
            drain: self.drain.clone(),
            live: self.live.clone(),
        })
    }

    /// Keeps the house that all siblings share, until the writer of snapshots is gone: forgets endpoints that have left,
    /// publishes the snapshot's figures. To be spawned for one of them.
    pub async fn keep_common_house(self: Arc<Self>) {
        let mut published = self.published.clone();
        loop {
            let snapshot = published.load();
            self.telemetry.metrics.snapshot(&snapshot);
            self.loads.retain_known(&snapshot);
            self.seen.retain_known(&snapshot);
            if published.changed().await.is_err() {
                return;
            }
        }
    }

    /// Keeps its own house, likewise: closes upstreams that are idle or lead to who is not to be called. To be spawned for each
    /// sibling.
    pub async fn keep_house(self: Arc<Self>) {
        let mut published = self.published.clone();
        loop {
            let snapshot = published.load();
            let healthy = |id: &EndpointId| snapshot.endpoint(id).is_some_and(|it| it.health == Health::Healthy);
            self.pool.retain(healthy);
            self.requests.retain(healthy);
            loop {
                tokio::select! {
                    changed = published.changed() => match changed {
                        Ok(()) => break,
                        Err(_gone) => return,
                    },
                    () = tokio::time::sleep(SWEEP) => {
                        self.pool.sweep();
                        self.requests.sweep();
                    }
                }
            }
        }
    }

    /// Takes no new connection from now on, and neither do its siblings; HTTP connections end after their present request.
    pub fn drain(&self) {
        self.drain.send_replace(true);
        self.pool.clear();
        self.requests.clear();
    }

    /// Waits until no connection is under way.
    pub async fn idle(&self) {
        let mut live = self.live.subscribe();
        // The sender lives in `self`.
        drop(live.wait_for(|live| *live == 0).await);
    }

    /// How many connections are under way, siblings' included.
    pub fn connections(&self) -> usize {
        *self.live.borrow()
    }

    /// What is known of an endpoint's load.
    pub fn load(&self, endpoint: &EndpointId) -> Load {
        self.loads.load(endpoint)
    }

    /// Monotonic time since the proxy was made; the time in [`Load`].
    pub fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    fn live(self: &Arc<Self>) -> Live {
        self.live.send_modify(|live| *live += 1);
        Live(self.clone())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.live.send_modify(|live| *live -= 1);
    }
}

/// A uniformly drawn number. Good enough to balance by; no secret depends on it.
pub fn draw() -> u64 {
    fastrand::u64(..)
}
