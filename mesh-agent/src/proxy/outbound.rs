//! What a task opens: accept, find out where it meant to go and what it speaks, carry it there.
//!
//! ```text
//! accept → original destination → service port
//!   protocol tcp  → plan, connect, copy
//!   protocol http, http2, grpc → requests, each planned by itself; the client's first bytes tell the version
//!   protocol auto → whichever side speaks first decides:
//!       client, a request line or HTTP/2's preface → requests; an upstream already open becomes the first pooled one
//!       client, anything else    → copy
//!       server, or either ends   → copy; only one that greets as HTTP/2 does leaves the word to the client
//! ```
//!
//! Detection never stalls: the upstream is opened at the latest when the port's patience (see `seen`) is over, and from
//! then on both sides are listened to. A client that stops in the middle of something like a request line is given up
//! as HTTP after [`PAUSE`]. Must not know how requests are carried, nor bytes.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use futures_util::FutureExt as _;
use mesh_common::refusal::Refusal;
use mesh_core::{
    addr::OrigDst,
    model::{Protocol as Spoken, Workload},
    plan,
};
use tokio::{io::AsyncReadExt as _, net::TcpStream, sync::watch, task::JoinSet};

use super::{
    Proxy, copy,
    detect::{self, Verdict},
    http::{http1, http2},
    loads::InFlight,
    route::{self, Route, Upstream},
    seen::Spoke,
    wire::{self, Wire},
    workers::Workers,
};
use crate::{
    sys::{flows::Flows, socket::Acceptor},
    telemetry::{
        access::{Access, Destination, Source},
        metrics::{Direction, Open, Outcome, Protocol},
    },
};

/// A client that has begun something like a request line and pauses for this long speaks something else.
const PAUSE: Duration = Duration::from_millis(200);
/// How long a client of a server that has greeted in HTTP/2 may take to begin.
const GREETED: Duration = Duration::from_secs(10);
/// How long connections that have ended may hold their place when no other comes.
const COLLECT: Duration = Duration::from_secs(2);
/// Pause after the system has refused to accept, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Most requests' heads fit.
const FIRST_READ: usize = 2048;

/// Whose connections a listener takes.
#[derive(Clone)]
pub struct Place {
    /// Cookie of the namespace that the listener is in.
    pub netns: u64,
    pub who: Who,
    pub originals: Originals,
}

/// Which task opened a connection.
#[derive(Clone)]
pub enum Who {
    /// The only task of the namespace.
    Task(Arc<Workload>),
    /// The kernel says, by workload number: the host's namespace.
    ByNumber,
}

/// Where a connection was meant to go.
#[derive(Clone)]
pub enum Originals {
    /// As the connect hooks recorded it.
    Kernel(Flows),
    /// Always to the same address: a listener that stands for one service, without hooks.
    Fixed(SocketAddr),
}

/// Accepts on `listener` until `drain` turns true or its sender is gone, then returns when the last connection has ended.
/// Dropping the future closes the listener and cuts its connections: a socket of ours would keep the namespace of a task
/// alive that has gone.
pub async fn serve(workers: Arc<Workers>, listener: Acceptor, place: Place, mut drain: watch::Receiver<bool>) {
    if let Err(error) = wire::tune(&listener) {
        tracing::warn!(%error, "cannot set socket options on a listener");
    }
    let place = Arc::new(place);
    let mut connections = JoinSet::new();
    loop {
        // Collects what has ended, so that the set does not grow. Waiting for it would wake this task for each.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = tokio::time::sleep(COLLECT), if !connections.is_empty() => continue,
            // A sender that is gone means the same.
            _ = drain.wait_for(|drain| *drain) => break,
        };
        match accepted {
            Ok((client, peer)) => {
                // Whoever connects faster than this accepts must not stop what else the thread carries.
                tokio::task::consume_budget().await;
                let place = place.clone();
                workers.spawn(&mut connections, |proxy, busy| async move {
                    let _busy = busy;
                    match TcpStream::from_std(client) {
                        Ok(client) => carry(proxy, place, client, peer).await,
                        Err(error) => tracing::warn!(%error, "cannot watch a connection"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Carries a connection to its end. All that is only needed for a while is on the heap for a while: this is held as long as the
/// connection, and there may be many that are idle.
async fn carry(proxy: Arc<Proxy>, place: Arc<Place>, client: TcpStream, peer: SocketAddr) {
    let _live = proxy.live();
    let Some(Begun { open: _open, mut step }) = begin(&proxy, &place, client, peer) else { return };
    while let Some(Step(next)) = step.0.await {
        step = Step(next);
    }
}

/// A part of a connection's life, and what follows it. Each on its own piece of heap: every connection would otherwise be as
/// large as the largest of them for all its life.
struct Step(Pin<Box<dyn Future<Output = Option<Step>> + Send>>);

struct Begun {
    open: Open,
    step: Step,
}

impl Step {
    fn new(future: impl Future<Output = Option<Self>> + Send + 'static) -> Self {
        Self(Box::pin(future))
    }

    fn last(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Box::pin(future.map(|()| None)))
    }
}

fn begin(proxy: &Arc<Proxy>, place: &Place, client: TcpStream, peer: SocketAddr) -> Option<Begun> {
    let (route, client) = routed(proxy, place, client, peer)?;
    let open =
        proxy.telemetry.metrics.open(Direction::Outbound, route.source.service.as_str(), route.service.name.as_str());
    let protocol = route.service.ports.iter().find(|port| port.id == route.port_id).map(|port| port.protocol);
    let client = Wire::tcp(client);
    let step = match protocol.unwrap_or(Spoken::Tcp) {
        Spoken::Tcp => Step::new(async move { Some(stream(client, Opened::now(&route).await)) }),
        Spoken::Http | Spoken::Http2 | Spoken::Grpc => Step::new(async move {
            Some(match begins_http2(&route, client).await {
                (false, client) => Step::last(http1::serve(route, client, None)),
                (true, client) => Step::last(http2::serve(route, client, None)),
            })
        }),
        Spoken::Auto => Step::new(async move {
            let detected = detect(&route, client).await;
            Some(detected.step(route))
        }),
    };
    Some(Begun { open, step })
}

/// As [`route`]; what is refused is reset and recorded.
fn routed(proxy: &Arc<Proxy>, place: &Place, client: TcpStream, peer: SocketAddr) -> Option<(Arc<Route>, TcpStream)> {
    match route(proxy, place, peer) {
        Ok(route) => Some((Arc::new(route), client)),
        Err(mut access) => {
            // Before the record is dropped: nobody who sees the record may find the connection still open.
            wire::reset(&client);
            drop(client);
            access.outcome = Outcome::Refused;
            None
        }
    }
}

/// Finds out who connected, and to what; a refusal comes as its finished record.
fn route(proxy: &Arc<Proxy>, place: &Place, peer: SocketAddr) -> Result<Route, Box<Access>> {
    let refused = |src: Source, dst: Option<SocketAddr>, refusal| {
        let dst = Destination { addr: dst, ..Destination::default() };
        let mut access = Access::begin(&proxy.telemetry, Direction::Outbound, Protocol::Tcp, src, dst);
        access.refusal = Some(refusal);
        Box::new(access)
    };
    let nobody = || Source { addr: Some(peer), ..Source::default() };
    let (dst, number) = match &place.originals {
        Originals::Fixed(dst) => (*dst, None),
        Originals::Kernel(flows) => match flows.take_tcp(place.netns, peer) {
            Some(original) => (SocketAddr::from(original.addr), Some(original.workload)),
            None => return Err(refused(nobody(), None, Refusal::OriginalLost)),
        },
    };
    let snapshot = proxy.published.load();
    let source = match &place.who {
        Who::Task(workload) => Some(snapshot.workloads.get(&workload.task).unwrap_or(workload).clone()),
        Who::ByNumber => number.and_then(|number| snapshot.by_number.get(&number)).cloned(),
    };
    let Some(source) = source else {
        return Err(refused(nobody(), Some(dst), Refusal::NoIdentity));
    };
    match plan::destination(&snapshot, OrigDst(dst)) {
        Ok((service, index)) => {
            let (port, port_id) = (service.ports[index].port, service.ports[index].id);
            let proxy = proxy.clone();
            Ok(Route { proxy, source, src_addr: peer, dst: OrigDst(dst), service, port, port_id })
        }
        Err(denied) => {
            tracing::debug!(
                src.addr = %peer, src.service = %source.service, dst.addr = %dst,
                refusal = denied.refusal as u32, reasons = ?denied.reasons, "refused"
            );
            Err(refused(route::source(peer, &source), Some(dst), denied.refusal))
        }
    }
}

/// An upstream that was opened ahead, with the record that it was noted in; or why there is none.
struct Opened(Box<Access>, Result<Upstream, Refusal>);

impl Opened {
    async fn now(route: &Route) -> Box<Self> {
        let mut access = Box::new(route.record(Protocol::Tcp));
        let upstream = route.open(&mut access).await;
        Box::new(Self(access, upstream))
    }

    /// What a stream needs of it for the rest of its life.
    fn for_bytes(self) -> (Box<Access>, Result<(Wire, InFlight), Refusal>) {
        let Self(access, upstream) = self;
        (access, upstream.map(|Upstream { wire, in_flight, plan: _ }| (wire, in_flight)))
    }
}

/// Carries a byte stream.
fn stream(client: Wire, opened: Box<Opened>) -> Step {
    let (mut access, upstream) = opened.for_bytes();
    match upstream {
        Ok((wire, in_flight)) => {
            let copying = copy::both_ways(client, wire, access.counts.clone());
            Step::last(Streaming { copying, _in_flight: in_flight, access })
        }
        Err(refusal) => {
            access.refusal = Some(refusal);
            client.reset();
            // The record is dropped after the reset: nobody who sees the record may find the connection still open.
            drop(access);
            Step::last(std::future::ready(()))
        }
    }
}

/// A stream, and what an idle one holds.
struct Streaming {
    copying: copy::BothWays,
    _in_flight: InFlight,
    /// Dropped last: nobody who sees the record may find the connection still open.
    access: Box<Access>,
}

impl Future for Streaming {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.access.outcome = ready!(Pin::new(&mut self.copying).poll(cx));
        Poll::Ready(())
    }
}

/// Whether a client of an HTTP port begins with HTTP/2, as gRPC does.
async fn begins_http2(route: &Route, mut client: Wire) -> (bool, Wire) {
    let mut said = BytesMut::new();
    let mut drain = route.proxy.drain.subscribe();
    let http2 = loop {
        if let Some(http2) = detect::begins_http2(&said) {
            break http2;
        }
        tokio::select! {
            // A client that says no more, or is broken, is for the server of HTTP/1.1 to end.
            read = read(&mut client, &mut said) => if matches!(read, Ok(0) | Err(_)) { break false },
            _ = drain.wait_for(|drain| *drain) => break false,
        }
    };
    (http2, client.rewound(said.freeze()))
}

/// Adds to `said` what the client says next. Cancelling loses nothing. One that is silent costs no room.
async fn read(client: &mut Wire, said: &mut BytesMut) -> io::Result<usize> {
    poll_fn(|cx| client.poll_readable(cx)).await;
    said.reserve(FIRST_READ);
    client.read_buf(said).await
}

enum Detected {
    Http(Wire, Option<Upstream>),
    Http2(Wire, Option<Upstream>),
    Stream(Wire, Box<Opened>),
    /// Nobody has said anything, which may stay so.
    Silent(Box<Silent>),
}

/// What a connection holds whose ends are both silent.
struct Silent {
    client: Wire,
    said: BytesMut,
    access: Box<Access>,
    upstream: Upstream,
}

/// Finds out what is spoken, as far as that is told while the upstream is being opened.
async fn detect(route: &Route, mut client: Wire) -> Detected {
    let note = |spoke| route.proxy.seen.note(route.port_id, spoke);
    let mut said = BytesMut::new();
    // The record begins with the connection, also when the upstream is opened late.
    let mut access = Box::new(route.record(Protocol::Tcp));

    // The client alone, for a moment.
    let patience = route.proxy.seen.patience(route.port_id);
    if !patience.is_zero()
        && let Ok(heard) = tokio::time::timeout(patience, hear(&mut client, &mut said)).await
    {
        let client = client.rewound(said.freeze());
        if heard.is_http() {
            note(Spoke::Http);
            access.discard();
            return Detected::requests(heard, client, None);
        }
        note(Spoke::ClientFirst);
        let upstream = Box::pin(route.open(&mut access)).await;
        return Detected::Stream(client, Box::new(Opened(access, upstream)));
    }

    // The client, while the upstream is being opened.
    let mut heard = None;
    let opened = {
        let mut opening = Box::pin(route.open(&mut access));
        loop {
            tokio::select! {
                opened = &mut opening => break Some(opened),
                now = hear(&mut client, &mut said), if heard.is_none() => {
                    heard = Some(now);
                    if now.is_http() {
                        break None;
                    }
                }
            }
        }
    };
    let upstream = match opened {
        None => {
            note(Spoke::Http);
            access.discard();
            return Detected::requests(heard.unwrap_or(Heard::Other), client.rewound(said.freeze()), None);
        }
        Some(Err(refusal)) => return Detected::Stream(client, Box::new(Opened(access, Err(refusal)))),
        Some(Ok(upstream)) => upstream,
    };
    if heard.is_some() {
        note(Spoke::ClientFirst);
        return Detected::Stream(client.rewound(said.freeze()), Box::new(Opened(access, Ok(upstream))));
    }
    Detected::Silent(Box::new(Silent { client, said, access, upstream }))
}

/// Listens to both sides of a connection until one of them has spoken.
async fn listen(route: &Route, mut silent: Box<Silent>) -> Detected {
    let note = |spoke| route.proxy.seen.note(route.port_id, spoke);
    let heard = {
        let Silent { client, said, upstream, access: _ } = &mut *silent;
        tokio::select! {
            // The client first: an HTTP server that closes at the same moment is an HTTP server.
            biased;
            heard = hear(client, said) => Some(heard),
            () = greeted(&mut upstream.wire) => None,
        }
    };
    let Silent { client, said, access, upstream } = *silent;
    let client = client.rewound(said.freeze());
    match heard {
        Some(heard @ (Heard::Http | Heard::Http2)) => {
            note(Spoke::Http);
            access.discard();
            return Detected::requests(heard, client, Some(upstream));
        }
        Some(Heard::Other) => note(Spoke::ClientFirst),
        None => note(Spoke::ServerFirst),
    }
    Detected::Stream(client, Box::new(Opened(access, Ok(upstream))))
}

/// Waits until a server has spoken first. HTTP/2 servers do so too, without waiting for anybody; what follows then is
/// still the client's to say, who does not wait either.
async fn greeted(upstream: &mut Wire) {
    poll_fn(|cx| upstream.poll_speaks(cx)).await;
    if upstream.begins(detect::is_http2_server).await {
        Box::pin(tokio::time::sleep(GREETED)).await;
    }
}

impl Detected {
    /// What follows.
    fn step(self, route: Arc<Route>) -> Step {
        match self {
            Self::Http(client, spare) => Step::last(http1::serve(route, client, spare)),
            Self::Http2(client, spare) => Step::last(http2::serve(route, client, spare)),
            Self::Stream(client, opened) => stream(client, opened),
            Self::Silent(silent) => Step::new(async move {
                let detected = listen(&route, silent).await;
                Some(detected.step(route))
            }),
        }
    }

    fn requests(heard: Heard, client: Wire, spare: Option<Upstream>) -> Self {
        match heard {
            Heard::Http2 => Self::Http2(client, spare),
            Heard::Http | Heard::Other => Self::Http(client, spare),
        }
    }
}

/// What a client says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Heard {
    Http,
    Http2,
    /// Something else, or its end.
    Other,
}

impl Heard {
    fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2)
    }
}

/// Reads into `said` until it is clear what the client speaks. Cancelling loses nothing.
async fn hear(client: &mut Wire, said: &mut BytesMut) -> Heard {
    loop {
        match detect::judge(said) {
            Verdict::Http => return Heard::Http,
            Verdict::Http2 => return Heard::Http2,
            Verdict::Opaque => return Heard::Other,
            Verdict::More => {}
        }
        let begun = !said.is_empty();
        let read = read(client, said);
        let read = if begun {
            // Most clients say all at once, and those that say nothing need no room for a timer.
            match Box::pin(tokio::time::timeout(PAUSE, read)).await {
                Ok(read) => read,
                Err(_paused) => return Heard::Other,
            }
        } else {
            read.await
        };
        // A broken connection shows itself again to whoever goes on with it.
        if matches!(read, Ok(0) | Err(_)) {
            return Heard::Other;
        }
    }
}
