//! The threads that carry connections, and which of them takes the next one.
//!
//! Each has a runtime, a pool of upstreams and a pool of tunnels of its own, so that whatever belongs to one connection
//! stays on one thread: no wake-up crosses threads and no byte changes caches. What is decided by what all connections
//! do (load, who speaks first) they share. Must not know what a connection carries.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tokio::{
    runtime::{self, Handle},
    sync::oneshot,
    task::JoinSet,
};

use mesh_core::{balance::Load, model::EndpointId};

use super::{Proxy, loads::UNMEASURED};
use crate::{sys::netns, transport::dial::Figures};

/// A thread's stack. Futures live on the heap; the deepest calls are a TLS handshake and BPF map access.
const STACK: usize = 1 << 20;

/// By what share of the idlest worker's connections the calling one may have more: an eighth.
const SLACK: usize = 8;

/// A thread that was to carry connections.
#[derive(Debug, thiserror::Error)]
#[error("cannot start thread {number} for connections: the system is out of threads or files; see ulimit -u and -n")]
pub struct WorkerError {
    number: usize,
    source: io::Error,
}

/// The threads of an agent. They end when this is dropped.
pub struct Workers {
    each: Vec<Worker>,
    /// Counts tasks that are accepted for.
    turn: AtomicUsize,
}

struct Worker {
    runtime: Handle,
    proxy: Arc<Proxy>,
    /// Connections under way.
    load: Arc<AtomicUsize>,
    /// Dropped, it ends the thread.
    _running: Option<oneshot::Sender<()>>,
}

/// Counts on a worker until it is dropped, which the future of a connection does at its end.
pub(crate) struct Busy(Arc<AtomicUsize>);

impl Workers {
    /// Starts `count` threads, at least one; `make` gives each its proxy, and is called within its runtime.
    ///
    /// # Errors
    /// The system refuses a thread or a runtime, or `make` fails.
    pub fn start<E>(count: usize, mut make: impl FnMut() -> Result<Arc<Proxy>, E>) -> Result<Self, E>
    where
        E: From<WorkerError>,
    {
        let mut each = Vec::new();
        for number in 0..count.max(1) {
            let (runtime, running) = start(number).map_err(|source| WorkerError { number, source })?;
            let proxy = {
                let _inside = runtime.enter();
                make()?
            };
            if number == 0 {
                runtime.spawn(proxy.clone().keep_common_house());
            }
            runtime.spawn(proxy.clone().keep_house());
            each.push(Worker { runtime, proxy, load: Arc::default(), _running: Some(running) });
        }
        Ok(Self { each, turn: AtomicUsize::new(0) })
    }

    /// One worker, which is the calling runtime.
    #[cfg(test)]
    pub(crate) fn here(proxy: Arc<Proxy>) -> Arc<Self> {
        let worker = Worker { runtime: Handle::current(), proxy, load: Arc::default(), _running: None };
        Arc::new(Self { each: vec![worker], turn: AtomicUsize::new(0) })
    }

    /// Whose turn it is to accept for one more task.
    pub(crate) fn turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Accepts on the worker that has this turn, until `set` is dropped: most connections are then carried where they were
    /// accepted, and wake no other thread.
    pub(crate) fn accept<F>(&self, turn: usize, set: &mut JoinSet<()>, accept: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if let Some(worker) = self.each.get(turn % self.each.len().max(1)) {
            set.spawn_on(accept, &worker.runtime);
        }
    }

    /// Carries a connection on the calling worker, or on the one that has the fewest if that has clearly fewer; it is cut when
    /// `set` is dropped. The future is as large as the memory that an idle connection takes, and would be twice as large wrapped in
    /// another: it keeps the [`Busy`] itself.
    pub(crate) fn spawn<F>(&self, set: &mut JoinSet<()>, carry: impl FnOnce(Arc<Proxy>, Busy) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let load = |worker: &Worker| worker.load.load(Ordering::Relaxed);
        let Some(idlest) = self.each.iter().min_by_key(|worker| load(worker)) else { return };
        let here = Handle::try_current().ok().map(|runtime| runtime.id());
        let here = self.each.iter().find(|worker| Some(worker.runtime.id()) == here);
        let worker = here.filter(|worker| load(worker) <= load(idlest) + load(idlest) / SLACK).unwrap_or(idlest);
        worker.load.fetch_add(1, Ordering::Relaxed);
        let busy = Busy(worker.load.clone());
        set.spawn_on(carry(worker.proxy.clone(), busy), &worker.runtime);
    }

    /// Takes no new connection from now on; HTTP connections end after their present request.
    pub fn drain(&self) {
        for worker in &self.each {
            worker.proxy.drain();
        }
    }

    /// Waits until no connection is under way.
    pub async fn idle(&self) {
        if let Some(worker) = self.each.first() {
            worker.proxy.idle().await;
        }
    }

    /// How many connections are under way.
    pub fn connections(&self) -> usize {
        self.any(Proxy::connections).unwrap_or_default()
    }

    /// What is known of an endpoint's load.
    pub fn load(&self, endpoint: &EndpointId) -> Load {
        self.any(|proxy| proxy.load(endpoint)).unwrap_or(UNMEASURED)
    }

    /// Monotonic time; the time in [`Load`].
    pub fn now(&self) -> Duration {
        self.any(Proxy::now).unwrap_or_default()
    }

    /// What all diallers together have done and hold.
    pub fn tunnels(&self) -> Figures {
        let each = self.each.iter().map(|worker| worker.proxy.dialer.figures());
        each.fold(Figures::default(), |all, one| Figures {
            handshakes: all.handshakes + one.handshakes,
            connections: all.connections + one.connections,
            streams: all.streams + one.streams,
        })
    }

    /// Asks a worker about what all share.
    fn any<T>(&self, ask: impl FnOnce(&Proxy) -> T) -> Option<T> {
        self.each.first().map(|worker| ask(&worker.proxy))
    }

    /// Returns when every worker has found time for it: never, if one hangs.
    pub async fn answered(&self) {
        for worker in &self.each {
            // Fails only when the worker is ending, and then nobody waits for a sign of life.
            drop(worker.runtime.spawn(async {}).await);
        }
    }
}

/// A thread with a runtime, and what ends it when dropped.
fn start(number: usize) -> io::Result<(Handle, oneshot::Sender<()>)> {
    let (tell, hear) = mpsc::channel();
    let (running, until) = oneshot::channel::<()>();
    thread::Builder::new().name(format!("proxy-{number}")).stack_size(STACK).spawn(move || {
        let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(tell.send(Err(error))),
        };
        netns::keep_home();
        drop(tell.send(Ok(runtime.handle().clone())));
        // Nothing is ever sent: the sender is dropped.
        drop(runtime.block_on(until));
        runtime.shutdown_background();
    })?;
    let runtime = hear.recv().map_err(io::Error::other)??;
    Ok((runtime, running))
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
