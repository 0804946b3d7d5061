//! The listeners of one namespace: who asks what, and in which order it is worked on. A slow resolver delays only who
//! asked it; garbage costs only who sent it.
//!
//! Knows the snapshot's readers and the core's answers; must not know a message's bytes.

use std::{
    cell::RefCell,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_core::resolve::{self, Naming};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    Context, Listeners,
    copies::Copies,
    forward::{self, ForwardError, read_message, write_message},
    wire::{self, Query, Received, Transport},
};

/// Most queries of one namespace that wait for a resolver.
const IN_FLIGHT: usize = 512;
/// Most TCP connections of one namespace.
const CONNECTIONS: usize = 256;
/// Replies of one TCP connection that wait to be written.
const PIPELINE: usize = 64;
/// A TCP connection on which nothing is asked, or nothing is read, for so long is closed (RFC 7766 §6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// How long a resolver may take for a name behind which the stub resolver has put a search domain, when the name alone is
/// the mesh's. Stub resolvers themselves wait for five seconds, which must not be over when the next name is asked for.
const SEARCH_PATIENCE: Duration = Duration::from_secs(1);
/// And how long one that has just been found silent: by and by an outage would cost a second for each name and domain.
const SILENT_PATIENCE: Duration = Duration::from_millis(100);
/// For so long it has "just" been found silent, unless it answers anything.
const SILENT_FOR: Duration = Duration::from_secs(10);
/// Room for a burst of queries while the agent is busy.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Pause after an error of the socket itself, such as no more file descriptors.
const BREATH: Duration = Duration::from_millis(50);

/// A server could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve DNS in a task namespace: the sockets must be non-blocking and bound")]
pub struct ServeError {
    #[from]
    source: io::Error,
}

/// Serves one namespace until the returned future is dropped; everything under way ends with it.
///
/// # Errors
/// A socket cannot be used. Nothing has been served.
pub async fn serve(context: Context, listeners: Listeners) -> Result<(), ServeError> {
    let udp = listeners.udp.into_iter().map(UdpSocket::from_std).collect::<Result<Vec<_>, _>>()?;
    let tcp = listeners.tcp.into_iter().map(TcpListener::from_std).collect::<Result<Vec<_>, _>>()?;
    let mut own = Vec::new();
    for socket in &udp {
        own.push(socket.local_addr()?);
        // Beyond the administrator's limit where we may, up to it where we may not.
        if setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err()
            && let Err(error) = setsockopt(socket, sockopt::RcvBuf, &RECEIVE_BUFFER)
        {
            debug!(%error, "dns receive buffer stays small");
        }
    }
    for socket in &tcp {
        own.push(socket.local_addr()?);
    }
    let shared =
        Arc::new(Shared { context, own, slots: Arc::new(Semaphore::new(IN_FLIGHT)), silent: Mutex::new(None) });
    let mut loops = JoinSet::new();
    for socket in udp {
        loops.spawn(datagrams(shared.clone(), Arc::new(socket)));
    }
    for socket in tcp {
        loops.spawn(connections(shared.clone(), socket));
    }
    while loops.join_next().await.is_some() {}
    Ok(())
}

/// What all listeners of a namespace share.
struct Shared {
    context: Context,
    /// Our own addresses, to which nothing may be forwarded.
    own: Vec<SocketAddr>,
    slots: Arc<Semaphore>,
    /// The resolver that was last found silent, and when.
    silent: Mutex<Option<(SocketAddr, Instant)>>,
}

/// What to do about a message.
enum Step {
    Say(Vec<u8>),
    Forward(Box<Query>, OwnedSemaphorePermit),
    Ignore,
}

thread_local! {
    /// Room for the datagram that is being looked at: there are two sockets for each task, and most are silent.
    static DATAGRAM: RefCell<Vec<u8>> = RefCell::new(vec![0; wire::TCP_MOST]);
}

async fn datagrams(shared: Arc<Shared>, socket: Arc<UdpSocket>) {
    let mut under_way = JoinSet::new();
    let mut copies = Copies::default();
    loop {
        tokio::select! {
            // An error is seen again by who reads.
            _ready = socket.readable() => {}
            Some(_) = under_way.join_next() => continue,
        }
        let received = DATAGRAM.with_borrow_mut(|buffer| {
            let (length, peer) = socket.try_recv_from(buffer)?;
            let bytes = buffer.get(..length).unwrap_or_default();
            let step = shared.step(bytes, Transport::Udp);
            // Only what is forwarded is looked at again.
            let kept: Arc<[u8]> = if let Step::Forward(..) = step { bytes.into() } else { Arc::default() };
            Ok::<_, io::Error>((step, kept, peer))
        });
        let (step, bytes, peer) = match received {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                debug!(%error, "dns datagram not received");
                sleep(BREATH).await;
                continue;
            }
        };
        match step {
            Step::Say(reply) => say(&socket, &reply, peer).await,
            Step::Ignore => {}
            Step::Forward(query, slot) => {
                // At once: with its next query the client may ask another resolver from the same port.
                let mut original = shared.context.originals.find(Transport::Udp, peer);
                if shared.context.fallback.len() > 1 {
                    let before = copies.before(peer, &bytes, Instant::now());
                    original = original.map(|asked| shared.other_than(asked, before));
                }
                let (shared, socket) = (shared.clone(), socket.clone());
                under_way.spawn(async move {
                    let reply = shared.forward(&query, &bytes, Transport::Udp, original).await;
                    say(&socket, &reply, peer).await;
                    drop(slot);
                });
            }
        }
    }
}

async fn say(socket: &UdpSocket, reply: &[u8], peer: SocketAddr) {
    if let Err(error) = socket.send_to(reply, peer).await {
        debug!(src.addr = %peer, %error, "dns reply not sent");
    }
}

async fn connections(shared: Arc<Shared>, listener: TcpListener) {
    let mut open = JoinSet::new();
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    debug!(%error, "dns connection not accepted");
                    sleep(BREATH).await;
                    continue;
                }
            },
            Some(_) = open.join_next() => continue,
        };
        // Also for a connection that is turned away: asking is what removes the record.
        let original = shared.context.originals.find(Transport::Tcp, peer);
        if open.len() >= CONNECTIONS {
            count(&shared.context.counters.overload);
            warn!(src.addr = %peer, limit = CONNECTIONS, "too many dns connections from one namespace, closed the newest");
            continue;
        }
        open.spawn(connection(shared.clone(), stream, original));
    }
}

/// Queries of one connection are worked on together and answered as they get ready (RFC 7766 §6.2.1.1).
async fn connection(shared: Arc<Shared>, stream: TcpStream, original: Option<SocketAddr>) {
    let (mut reader, mut writer) = stream.into_split();
    let (replies, mut ready) = mpsc::channel::<Vec<u8>>(PIPELINE);
    let read = async {
        let mut under_way = JoinSet::new();
        while let Ok(Ok(Some(bytes))) = timeout(IDLE, read_message(&mut reader)).await {
            while under_way.try_join_next().is_some() {}
            match shared.step(&bytes, Transport::Tcp) {
                Step::Ignore => break,
                Step::Say(reply) => {
                    if replies.send(reply).await.is_err() {
                        break;
                    }
                }
                Step::Forward(query, slot) => {
                    let (shared, replies) = (shared.clone(), replies.clone());
                    under_way.spawn(async move {
                        let reply = shared.forward(&query, &bytes, Transport::Tcp, original).await;
                        drop(slot);
                        // The writer is gone only with the connection.
                        replies.send(reply).await.ok();
                    });
                }
            }
        }
        while under_way.join_next().await.is_some() {}
        drop(replies);
    };
    let write = async {
        while let Some(reply) = ready.recv().await {
            if !matches!(timeout(IDLE, write_message(&mut writer, &reply)).await, Ok(Ok(()))) {
                return;
            }
        }
    };
    // A client that no longer reads is not read from either.
    tokio::pin!(write);
    tokio::select! {
        () = read => write.await,
        () = &mut write => {}
    }
}

impl Shared {
    /// Decides what to do about a message. Quick: no waiting here.
    fn step(&self, bytes: &[u8], transport: Transport) -> Step {
        let counters = &self.context.counters;
        let query = match wire::parse(bytes, transport) {
            Received::Query(query) => query,
            Received::Faulty(reply) => {
                count(&counters.garbage);
                return Step::Say(reply);
            }
            Received::Garbage => {
                count(&counters.garbage);
                return Step::Ignore;
            }
        };
        if let Some(question) = query.question {
            let naming = Naming::of(&self.context.config);
            let snapshot = self.context.published.load();
            let answer = resolve::answer(&snapshot, &naming, &query.name, question);
            if let Some(reply) = query.reply(&answer, snapshot.generation) {
                count(&counters.mesh);
                if let Some(service) = resolve::service(&snapshot, &naming, &query.name) {
                    self.context.published.uses.note(&service.name);
                }
                return Step::Say(reply);
            }
        }
        match self.slots.clone().try_acquire_owned() {
            Ok(slot) => Step::Forward(query, slot),
            Err(_) => {
                count(&counters.overload);
                Step::Say(query.server_failure())
            }
        }
    }

    /// The resolver's reply, or ours that there is none.
    async fn forward(
        &self,
        query: &Query,
        bytes: &[u8],
        transport: Transport,
        original: Option<SocketAddr>,
    ) -> Vec<u8> {
        let Context { config, netns, fallback, counters, published, .. } = &self.context;
        let naming = Naming::of(config);
        let search = config.search.as_deref().unwrap_or_default();
        let searched =
            query.question.is_some() && resolve::is_searched(&published.load(), &naming, search, &query.name);
        let original = original.filter(|resolver| !self.is_own(*resolver));
        // The host's resolvers are to be asked as the host does: 127.0.0.53 is nobody in a task's namespace.
        let (resolvers, netns) = match original {
            // Before a name is denied that another resolver of the list may know, that one is asked.
            Some(resolver) if searched && fallback.contains(&resolver) => {
                let others = fallback.iter().copied().filter(|other| *other != resolver);
                ([resolver].into_iter().chain(others).collect(), netns.as_ref())
            }
            Some(resolver) => (vec![resolver], netns.as_ref()),
            None => (fallback.to_vec(), None),
        };
        let share = config.upstream_timeout / u32::try_from(resolvers.len().max(1)).unwrap_or(1);
        for resolver in resolvers.iter().filter(|resolver| !self.is_own(**resolver)) {
            let limit = if searched { share.min(self.patience(*resolver)) } else { share };
            let answered = forward::ask(query, bytes, transport, *resolver, netns, limit).await;
            self.heard(*resolver, !matches!(answered, Err(ForwardError::Timeout { .. })));
            match answered {
                Ok(reply) if searched && wire::is_failure(&reply) => {
                    debug!(dst.addr = %resolver, "the resolver failed at a mesh name with a search domain");
                }
                Ok(mut reply) => {
                    count(&counters.forwarded);
                    if resolve::may_appear(&naming, &query.name) {
                        wire::forget_soon(&mut reply, config.ttl);
                    }
                    return query.fit(reply);
                }
                Err(error) => {
                    debug!(dst.addr = %resolver, error = &error as &dyn std::error::Error, "dns query not answered")
                }
            }
        }
        count(&counters.failed);
        // A failure would end the client's search (musl's at once) before it comes to the name that is ours.
        if searched { query.not_this_time() } else { query.server_failure() }
    }

    /// How long to wait for a resolver where the client is to go on to another name.
    fn patience(&self, resolver: SocketAddr) -> Duration {
        match *self.silent.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((silent, at)) if silent == resolver && at.elapsed() < SILENT_FOR => SILENT_PATIENCE,
            Some(_) | None => SEARCH_PATIENCE,
        }
    }

    fn heard(&self, resolver: SocketAddr, spoke: bool) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match *silent {
            _ if !spoke => *silent = Some((resolver, Instant::now())),
            Some((before, _)) if before == resolver => *silent = None,
            Some(_) | None => {}
        }
    }

    /// Whom a client means that has asked `asked` and, with so many copies before, others of the same list.
    fn other_than(&self, asked: SocketAddr, copies: usize) -> SocketAddr {
        let list = &self.context.fallback;
        let at = list.iter().position(|one| *one == asked);
        at.and_then(|at| list.get((at + copies) % list.len())).copied().unwrap_or(asked)
    }

    fn is_own(&self, resolver: SocketAddr) -> bool {
        let ip = resolver.ip().to_canonical();
        self.own.iter().any(|own| {
            own.port() == resolver.port() && (own.ip() == ip || own.ip().is_unspecified() && ip.is_loopback())
        })
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
