//! HBONE: streams as HTTP/2 CONNECT, as Istio's ztunnel speaks it, with agents that do not know `ecs-mesh/1`.
//!
//! Memory is bounded by HTTP/2 flow control: what was received is granted again only as it is consumed, and what is
//! written waits until the peer has room. Must not know identities, services, or what is carried.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::SendRequest, server::SendResponse};
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, Uri, uri};
use mesh_common::refusal::Refusal;
use tokio::{sync::watch, time::timeout};

use super::{
    h2_settings,
    inflow::Inflow,
    tls::{Failure, SecuredIo},
    tunnel::{LARGEST_FRAME, Payload, UNTOLD},
    unopened::Unopened,
};

/// Header of a CONNECT with which the caller says that it has another endpoint to go to.
pub(super) const ELSEWHERE_HEADER: &str = "ecs-mesh-elsewhere";
/// Header of a CONNECT answer that carries the number of our refusal, so that the caller's log names the same reason.
const REFUSAL_HEADER: &str = "ecs-mesh-refusal";
/// Trailer that ends a tunnel of our own agents. Strictly, nothing but DATA belongs on a CONNECT stream (RFC 9113 §8.5), so
/// it is sent only to who has shown to be one of them.
const TAKEN_TRAILER: HeaderName = HeaderName::from_static("ecs-mesh-taken");
/// Beside the other: the tunnel did not end in order. A reset of HTTP/2 has no room for what was taken.
const RESET_TRAILER: HeaderName = HeaderName::from_static("ecs-mesh-reset");

/// The most that one write hands over; h2 cuts it into frames.
const LARGEST_WRITE: usize = 4 * LARGEST_FRAME;

/// How long the cause of a connection's end may take to arrive after its streams have failed. Both come from one poll
/// of the same task, so this is never waited for in full.
const CAUSE_WAIT: Duration = Duration::from_secs(1);

/// Asks for streams on a connection.
pub(super) struct Opener {
    requests: SendRequest<Bytes>,
    failure: Failure,
    /// Turns true when the connection is over.
    over: watch::Receiver<bool>,
}

/// Begins a connection at the end that has dialled it; it is to be carried by [`Dialed::run`].
///
/// # Errors
/// The connection is lost.
pub(super) async fn dialing(io: SecuredIo) -> Result<(Opener, Dialed), h2::Error> {
    let failure = io.failure();
    let (requests, connection) = h2_settings::client().handshake(io).await?;
    let (over, is_over) = watch::channel(false);
    Ok((Opener { requests, failure, over: is_over }, Dialed { connection, over }))
}

/// A dialled connection, which someone has to carry.
pub(super) struct Dialed {
    connection: h2::client::Connection<SecuredIo, Bytes>,
    over: watch::Sender<bool>,
}

/// How a connection ended that was dialled.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error(transparent)]
    Http(#[from] h2::Error),
    #[error("the peer did not answer a ping")]
    Dead,
}

impl Dialed {
    /// Carries the connection to its end. `removed` is called when that is known, before its streams fail.
    pub(super) async fn run(mut self, removed: impl FnOnce()) -> Result<(), Ended> {
        let pings = self.connection.ping_pong();
        let dead = async {
            match pings {
                Some(pings) => h2_settings::until_dead(pings).await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            ended = &mut self.connection => ended.map_err(Ended::from),
            () = dead => Err(Ended::Dead),
        };
        removed();
        self.over.send_replace(true);
        // Dropped last: its streams fail only now.
        drop(self.connection);
        ended
    }
}

impl Opener {
    /// CONNECT, and the answer to it.
    ///
    /// # Errors
    /// It was refused or reset, or the connection takes none or is lost.
    pub(super) async fn open(&self, target: SocketAddr, elsewhere: bool) -> Result<(Receiving, Sending), Unopened> {
        let request = connect_request(target, elsewhere)?;
        let ask = async {
            let mut requests = self.requests.clone().ready().await?;
            let (response, send) = requests.send_request(request, false)?;
            Ok((response.await?, send))
        };
        let (response, send) = match ask.await {
            Ok(answer) => answer,
            Err(error) => return Err(self.why(error).await),
        };
        if response.status() != StatusCode::OK {
            return Err(refused(&response));
        }
        Ok((Receiving::new(response.into_body()), Sending::new(send)))
    }

    /// How many streams the peer takes at once.
    pub(super) fn room(&self) -> usize {
        self.requests.current_max_send_streams()
    }

    /// Why an open stream failed before its answer.
    async fn why(&self, error: h2::Error) -> Unopened {
        match error.reason() {
            // The one reset that promises that nothing was done (RFC 9113 §8.7).
            Some(Reason::REFUSED_STREAM) => Unopened::Lost(error.into()),
            _ if error.is_reset() => Unopened::Reset(error.into()),
            _ => {
                let mut over = self.over.clone();
                drop(timeout(CAUSE_WAIT, over.wait_for(|over| *over)).await);
                // TLS 1.3 lets us send before the peer has seen our certificate, so its verdict arrives only here.
                self.failure.refusal().map_or_else(|| Unopened::Lost(error.into()), Unopened::Rejected)
            }
        }
    }
}

/// `:authority` only, as CONNECT demands (RFC 9113 §8.5).
fn connect_request(target: SocketAddr, elsewhere: bool) -> Result<Request<()>, Unopened> {
    let authority = uri::Authority::try_from(target.to_string()).map_err(|error| Unopened::Authority(error.into()))?;
    let mut parts = uri::Parts::default();
    parts.authority = Some(authority);
    let uri = Uri::from_parts(parts).map_err(|error| Unopened::Authority(error.into()))?;
    let request = Request::builder().method(Method::CONNECT).uri(uri);
    let request = if elsewhere { request.header(ELSEWHERE_HEADER, "1") } else { request };
    request.body(()).map_err(Unopened::Authority)
}

fn refused<B>(response: &Response<B>) -> Unopened {
    let number = response.headers().get(REFUSAL_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
    match number.and_then(Refusal::from_number) {
        Some(refusal) => Unopened::Refused(Some(refusal)),
        None => Unopened::Status(response.status()),
    }
}

/// A connection at the end that was dialled.
pub(super) struct Accepting(h2::server::Connection<SecuredIo, Bytes>);

/// Begins it.
///
/// # Errors
/// The peer does not speak HTTP/2, or the connection is lost.
pub(super) async fn accepting(io: SecuredIo) -> Result<Accepting, h2::Error> {
    h2_settings::server().handshake(io).await.map(Accepting)
}

impl Accepting {
    /// Waits for its death: that pings are not answered.
    pub(super) fn dead(&mut self) -> impl Future<Output = ()> + use<> {
        let pings = self.0.ping_pong();
        async move {
            match pings {
                Some(pings) => h2_settings::until_dead(pings).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Carries it to its end. May be dropped and called again.
    ///
    /// # Errors
    /// It did not end in order.
    pub(super) async fn serve(&mut self, mut asked: impl FnMut(Asked)) -> Result<(), h2::Error> {
        while let Some(next) = self.0.accept().await {
            let (head, respond) = next?;
            if let Some(one) = Asked::new(head, respond) {
                asked(one);
            }
        }
        Ok(())
    }

    /// Takes no more streams; [`Accepting::serve`] returns when the last one has ended.
    pub(super) fn leave(&mut self) {
        self.0.graceful_shutdown();
    }
}

/// A stream that the peer asks for. Dropped without an answer, it is reset.
pub(super) struct Asked {
    pub(super) target: SocketAddr,
    pub(super) elsewhere: bool,
    receive: RecvStream,
    respond: SendResponse<Bytes>,
}

impl Asked {
    /// `None` where it was answered already because it is no CONNECT to an address and port.
    fn new(head: Request<RecvStream>, respond: SendResponse<Bytes>) -> Option<Self> {
        let (head, receive) = head.into_parts();
        let target = head.uri.authority().and_then(|authority| authority.as_str().parse().ok());
        let Some(target) = target.filter(|_| head.method == Method::CONNECT) else {
            answer(respond, StatusCode::BAD_REQUEST, Refusal::BadProtocol);
            return None;
        };
        let elsewhere = head.headers.contains_key(ELSEWHERE_HEADER);
        Some(Self { target, elsewhere, receive, respond })
    }

    /// Answers 200; bytes may flow.
    ///
    /// # Errors
    /// `ConnectionReset`: the peer has given up meanwhile.
    pub(super) fn accept(mut self) -> io::Result<(Receiving, Sending)> {
        let send = self.respond.send_response(Response::new(()), false).map_err(broken)?;
        Ok((Receiving::new(self.receive), Sending::new(send)))
    }

    /// Answers with the status that HBONE has for this refusal (400, 401 or 503), and with its number for our own
    /// agents.
    pub(super) fn refuse(self, refusal: Refusal) {
        answer(self.respond, status_of(refusal), refusal);
    }
}

fn answer(mut respond: SendResponse<Bytes>, status: StatusCode, refusal: Refusal) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    response.headers_mut().insert(REFUSAL_HEADER, (refusal as u32).into());
    // Fails only when the peer has given up meanwhile, and then nobody wants the answer.
    drop(respond.send_response(response, true));
}

fn status_of(refusal: Refusal) -> StatusCode {
    match refusal {
        Refusal::Denied | Refusal::UntrustedPeer | Refusal::ExpiredPeer | Refusal::UnexpectedIdentity => {
            StatusCode::UNAUTHORIZED
        }
        Refusal::BadProtocol | Refusal::BadRequest => StatusCode::BAD_REQUEST,
        Refusal::UnknownPort
        | Refusal::NoEndpoint
        | Refusal::NoHealthyEndpoint
        | Refusal::AgentAwayFailClosed
        | Refusal::MapFull
        | Refusal::PlaintextForbidden
        | Refusal::ConnectFailed
        | Refusal::ConnectTimeout
        | Refusal::HandshakeFailed
        | Refusal::TunnelRefused
        | Refusal::NotLocal
        | Refusal::NoIdentity
        | Refusal::OriginalLost
        | Refusal::Draining
        | Refusal::TaskGone
        | Refusal::NotReady
        | Refusal::UpstreamReset => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// The direction from the peer to us.
pub(super) struct Receiving {
    stream: Inflow,
    ended: bool,
    /// The peer has said that its end is a reset.
    reset: bool,
    /// What the peer said at its end about how much of ours its application had taken; [`UNTOLD`] until then.
    taken: Arc<AtomicU64>,
}

/// The direction from us to the peer.
pub(super) struct Sending {
    stream: SendStream<Bytes>,
    ended: bool,
}

impl Receiving {
    fn new(stream: RecvStream) -> Self {
        Self { stream: Inflow::new(stream), ended: false, reset: false, taken: Arc::new(AtomicU64::new(UNTOLD)) }
    }

    /// What comes next, `None` at the end.
    ///
    /// # Errors
    /// `ConnectionReset`, after what had come before it.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            if self.reset {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if self.ended {
                return Poll::Ready(Ok(None));
            }
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => return Poll::Ready(Ok(Some(data))),
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => {
                    let trailers = ready!(self.stream.poll_trailers(cx)).map_err(broken)?;
                    let said = trailers.as_ref().and_then(|said| said.get(TAKEN_TRAILER)?.to_str().ok()?.parse().ok());
                    self.taken.store(said.unwrap_or(UNTOLD), Ordering::Relaxed);
                    self.reset = trailers.is_some_and(|said| said.contains_key(RESET_TRAILER));
                    self.ended = true;
                }
            }
        }
    }

    /// So much of it has gone on its way: the peer may send as much again.
    pub(super) fn consumed(&mut self, octets: usize) {
        // Fails only when more is granted than was received.
        drop(self.stream.grant(octets));
    }

    pub(super) fn taken(&self) -> Arc<AtomicU64> {
        self.taken.clone()
    }

    /// Keeps what has come, so that it is no burden to the connection's other streams, and wakes `cx` when there is more.
    pub(super) fn gather(&mut self, cx: &mut Context<'_>) {
        self.stream.gather(cx);
    }
}

impl Sending {
    fn new(stream: SendStream<Bytes>) -> Self {
        Self { stream, ended: false }
    }

    /// Sends as much as there is room for, and returns how much that was.
    ///
    /// # Errors
    /// `ConnectionReset`; `BrokenPipe` after the end.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>, payload: Payload<'_>) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(cx, payload.len()))?;
        if room > 0 {
            self.stream.send_data(payload.take(room), false).map_err(broken)?;
        }
        Poll::Ready(Ok(room))
    }

    /// How much of `wanted` may be sent now; not 0, unless 0 is wanted.
    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let wanted = wanted.min(LARGEST_WRITE);
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        self.stream.reserve_capacity(wanted);
        let mut room = self.stream.capacity();
        while room == 0 {
            room = match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(room)) => room,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            };
        }
        Poll::Ready(Ok(room.min(wanted)))
    }

    /// Ends the direction in order, behind all that was sent; says how much of the other one the application has taken.
    ///
    /// # Errors
    /// `ConnectionReset`.
    pub(super) fn end(&mut self, taken: Option<u64>) -> io::Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        match taken {
            Some(taken) => {
                let said = HeaderMap::from_iter([(TAKEN_TRAILER, taken.into())]);
                self.stream.send_trailers(said).map_err(broken)
            }
            None => self.stream.send_data(Bytes::new(), true).map_err(broken),
        }
    }

    /// Resets our direction at once, and tells the peer how much of its bytes the application has taken.
    pub(super) fn reset(&mut self, taken: u64) {
        if !std::mem::replace(&mut self.ended, true) {
            let said = HeaderMap::from_iter([(TAKEN_TRAILER, taken.into()), (RESET_TRAILER, 1.into())]);
            // One that is broken already needs no reset.
            drop(self.stream.send_trailers(said));
        }
    }

    /// Waits until the peer has reset the stream, or the connection is lost.
    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_reset(cx).map(drop)
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        // h2 resets by itself what is dropped unfinished, but not before the other direction is dropped as well.
        if !self.ended {
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}

/// A stream that was reset and a connection that was lost are the same to its user.
fn broken(error: h2::Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
