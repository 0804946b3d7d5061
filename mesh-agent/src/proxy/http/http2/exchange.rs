//! One request and its answer: plan, a place on a connection, both bodies, and another endpoint where that is safe.
//!
//! ```text
//! plan → lease → head sent ─► answer's head ─► both bodies ─► settled
//!   ▲                  │ not processed (REFUSED_STREAM, beyond GOAWAY's last stream), and what was sent is still here
//!   └──────────────────┘
//! ```
//!
//! What either side says to end a stream early is said to the other: a reset by its code, in both directions. What is our
//! own doing is an HTTP answer, for gRPC its status. Must not know how bodies are moved, nor who else is on the connection.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::ResponseFuture, server::SendResponse};
use http::{Method, Request, Response, Version, header, request};
use mesh_common::refusal::Refusal;
use mesh_core::{model::Health, plan::Plan};

use super::{
    pool::{self, AtHand, Lease},
    relay::{Broken, Passed, Pipe, Replay},
};
use crate::{
    proxy::{
        draw,
        http::{
            client::{self, Client},
            refusal,
        },
        loads::InFlight,
        route::Attempts,
    },
    telemetry::{
        access::Access,
        metrics::{Outcome, Protocol},
    },
    transport::inflow::Inflow,
};

/// A request that was answered: the answer's head, and what both bodies need.
struct Answered {
    response: Response<RecvStream>,
    upload: Pipe,
    lease: Lease,
    in_flight: InFlight,
}

/// Why there is no answer.
enum Failed {
    /// The client is to be told.
    Refused(Refusal),
    /// The server has reset the stream, so we do.
    Reset(Reason),
    /// The client has reset it, or has gone.
    ClientGone,
}

/// What came of one attempt.
enum Heard {
    Head(Response<RecvStream>),
    Failed(h2::Error),
    ClientGone(Reason),
}

/// How the bodies ended.
enum Ended {
    Both,
    /// The answer broke off.
    Upstream(h2::Error),
    ClientGone(Reason),
}

/// Answers one request of a client.
pub(super) async fn answer(
    client: Arc<Client>,
    at_hand: Arc<AtHand>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (head, body) = request.into_parts();
    let grpc = refusal::is_grpc(&head.headers);
    let protocol = if grpc { Protocol::Grpc } else { Protocol::Http2 };
    // Boxed, because it is handed on: thousands of these futures may wait.
    let mut access = Box::new(client.record(protocol, &head.method, &head.uri));
    let answered = match check(&head) {
        Ok(()) => send(&client, &at_hand, &mut access, &head, body, &mut respond).await,
        Err(refusal) => Err(Failed::Refused(refusal)),
    };
    client.link(&mut access);
    match answered {
        Ok(answered) => relay(&client, answered, access, &mut respond).await,
        Err(Failed::Refused(refusal)) => refuse(&mut respond, &mut access, &head.method, refusal),
        Err(Failed::Reset(reason)) => {
            access.refusal = Some(Refusal::UpstreamReset);
            respond.send_reset(reason);
        }
        Err(Failed::ClientGone) => {}
    }
}

/// What h2 lets through and we do not: the host named twice or not at all (RFC 9113 §8.3.1).
fn check(head: &request::Parts) -> Result<(), Refusal> {
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let named = match (head.uri.authority(), hosts.next()) {
        (Some(_), None) | (None, Some(_)) => true,
        (Some(authority), Some(host)) => host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()),
        (None, None) => false,
    };
    if named && hosts.next().is_none() { Ok(()) } else { Err(Refusal::BadRequest) }
}

fn refuse(respond: &mut SendResponse<Bytes>, access: &mut Access, method: &Method, refusal: Refusal) {
    access.refusal = Some(refusal);
    // A client that takes no answer has gone.
    let sent = if access.protocol == Protocol::Grpc {
        access.grpc_status = Some(refusal::grpc_status(refusal));
        let response = refusal::grpc(refusal);
        access.status = Some(response.status().as_u16());
        respond.send_response(response, true).map(drop)
    } else {
        let (head, text) = refusal::plain(refusal).into_parts();
        access.status = Some(head.status.as_u16());
        let head = Response::from_parts(head, ());
        if *method == Method::HEAD {
            respond.send_response(head, true).map(drop)
        } else {
            respond.send_response(head, false).and_then(|mut body| body.send_data(text, true))
        }
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "a refusal was not taken");
    }
}

/// Sends the request until somebody answers it.
async fn send(
    client: &Client,
    at_hand: &AtHand,
    access: &mut Access,
    head: &request::Parts,
    body: RecvStream,
    respond: &mut SendResponse<Bytes>,
) -> Result<Answered, Failed> {
    let route = &client.route;
    let proxy = &route.proxy;
    let bodiless = body.is_end_stream();
    let mut attempts = Attempts::default();
    let mut replay = Replay::default();
    let mut pending = Pending::First(Inflow::new(body));
    // What a server did not process says nothing bad about it once: it is going, or its limits were not known yet.
    let mut again = false;
    let mut refused = false;
    // A connection that nobody has used is wanted.
    let mut fresh = false;
    loop {
        let plan = match attempts.plan(route, access) {
            Ok(plan) => plan,
            // As the last server said: the client may do what we could not.
            Err(_nobody_left) if refused => return Err(Failed::Reset(Reason::REFUSED_STREAM)),
            Err(refusal) => return Err(Failed::Refused(refusal)),
        };
        let endpoint = plan.endpoint.clone();
        if endpoint.health == Health::Draining {
            // The client has named it itself, and shall look for another.
            client.leave();
        }
        let leased = match at_hand.lease(route, &plan) {
            Some(lease) if !fresh => Ok(lease),
            // Boxed, because it is rare and large.
            _ => match Box::pin(opened(client, plan, at_hand, fresh, respond)).await {
                Some(opened) => opened,
                None => return Err(Failed::ClientGone),
            },
        };
        let lease = match leased {
            Ok(lease) => lease,
            Err(refusal) => {
                attempts.failed(route, &endpoint.id, refusal).map_err(Failed::Refused)?;
                continue;
            }
        };
        let in_flight = proxy.loads.start(&endpoint.id);
        let began = proxy.now();
        let (mut response, to) = match lease.send(copy_of(head), bodiless) {
            Ok(sent) => sent,
            // What h2 does not take on a new connection it takes on none.
            Err(error) if is_ours(&error) && !lease.used => return Err(Failed::Refused(Refusal::BadRequest)),
            // It has ended or has no room: that comes out only now.
            Err(_not_sent) if lease.used => {
                fresh = true;
                proxy.telemetry.metrics.retries.inc();
                continue;
            }
            Err(_ended) => {
                in_flight.failed(proxy.now(), draw());
                attempts.failed(route, &endpoint.id, Refusal::UpstreamReset).map_err(Failed::Refused)?;
                continue;
            }
        };
        let mut upload = pending.go(to, bodiless);
        let mut watch = |passed: Passed<'_>| {
            replay.note(&passed);
            if let Passed::Data(chunk) = passed {
                access.counts.add_sent(chunk.len());
            }
        };
        let heard = poll_fn(|cx| poll_head(cx, &mut response, &mut upload, respond, &mut watch)).await;
        let error = match heard {
            Heard::Head(response) => {
                let now = proxy.now();
                in_flight.succeeded(now.saturating_sub(began), now);
                return Ok(Answered { response, upload, lease, in_flight });
            }
            Heard::ClientGone(reason) => {
                upload.to().send_reset(reason);
                return Err(Failed::ClientGone);
            }
            Heard::Failed(error) => error,
        };
        tracing::debug!(
            src.addr = %route.src_addr, dst.endpoint = %endpoint.id, %error, pooled = lease.used,
            "no answer to a request"
        );
        if !error.is_reset() {
            lease.give_up();
        }
        let unprocessed = error.is_remote() && (error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM));
        let harmless = error.is_io() && bodiless && client::is_idempotent(&head.method);
        let sent = if unprocessed || harmless { replay.take() } else { None };
        let Some(sent) = sent else {
            return Err(failure(&error, &in_flight, proxy.now()));
        };
        pending = Pending::Again(upload, sent);
        refused = unprocessed;
        if again {
            in_flight.failed(proxy.now(), draw());
            let told = |refusal| if refused { Failed::Reset(Reason::REFUSED_STREAM) } else { Failed::Refused(refusal) };
            attempts.failed(route, &endpoint.id, Refusal::UpstreamReset).map_err(told)?;
        } else {
            again = true;
            proxy.telemetry.metrics.retries.inc();
        }
    }
}

/// Opens a connection for the request; `None` when the client resets it meanwhile.
async fn opened(
    client: &Client,
    plan: Plan,
    at_hand: &AtHand,
    fresh: bool,
    respond: &mut SendResponse<Bytes>,
) -> Option<Result<Lease, Refusal>> {
    tokio::select! {
        biased;
        opened = pool::open(&client.route, plan, at_hand, fresh) => Some(opened),
        _reset = poll_fn(|cx| respond.poll_reset(cx)) => None,
    }
}

/// What is to be sent as the body.
enum Pending {
    First(Inflow),
    Again(Pipe, Replay),
}

impl Pending {
    fn go(self, to: SendStream<Bytes>, bodiless: bool) -> Pipe {
        match self {
            Self::First(body) => Pipe::new(body, to, bodiless),
            Self::Again(pipe, sent) => pipe.again(sent, to, bodiless),
        }
    }
}

/// Goes on with the upload until the answer's head is there. Interim answers pass.
fn poll_head(
    cx: &mut Context<'_>,
    response: &mut ResponseFuture,
    upload: &mut Pipe,
    respond: &mut SendResponse<Bytes>,
    watch: &mut impl FnMut(Passed<'_>),
) -> Poll<Heard> {
    match upload.poll(cx, watch) {
        Poll::Ready(Err(Broken::From(error))) => return Poll::Ready(Heard::ClientGone(said(&error))),
        // The answer tells why, if there is one.
        Poll::Ready(Ok(()) | Err(Broken::To)) | Poll::Pending => {}
    }
    loop {
        let Poll::Ready(interim) = response.poll_informational(cx) else { break };
        match interim {
            Some(Ok(interim)) => {
                if let Err(error) = respond.send_informational(interim) {
                    tracing::debug!(%error, "an interim answer was not taken");
                }
            }
            Some(Err(error)) => return Poll::Ready(Heard::Failed(error)),
            None => return Pin::new(response).poll(cx).map(|answer| answer.map_or_else(Heard::Failed, Heard::Head)),
        }
    }
    // An upload may wait for the server, and would not see it.
    let reset = ready!(respond.poll_reset(cx));
    Poll::Ready(Heard::ClientGone(reset.unwrap_or(Reason::CANCEL)))
}

/// Passes the answer on, and the rest of the request.
async fn relay(client: &Client, answered: Answered, mut access: Box<Access>, respond: &mut SendResponse<Bytes>) {
    let Answered { response, mut upload, lease, in_flight } = answered;
    let (head, body) = response.into_parts();
    let end = body.is_end_stream();
    let grpc = access.protocol == Protocol::Grpc;
    access.status = Some(head.status.as_u16());
    if grpc {
        access.grpc_status = refusal::grpc_status_of(&head.headers);
    }
    let to = match respond.send_response(Response::from_parts(head, ()), end) {
        Ok(to) => to,
        Err(error) => {
            upload.to().send_reset(said(&error));
            return;
        }
    };
    let mut download = Pipe::new(Inflow::new(body), to, end);
    // Until the answer has ended.
    let mut open = Some((access, in_flight));
    match poll_fn(|cx| poll_bodies(cx, &mut upload, &mut download, &mut open)).await {
        Ended::Both => {}
        Ended::ClientGone(reason) => upload.to().send_reset(reason),
        Ended::Upstream(error) => {
            tracing::debug!(src.addr = %client.route.src_addr, %error, "an answer broke off");
            let Some((mut access, in_flight)) = open else { return };
            access.refusal = Some(Refusal::UpstreamReset);
            if error.is_reset() {
                download.to().send_reset(said(&error));
                return;
            }
            lease.give_up();
            in_flight.failed(client.route.proxy.now(), draw());
            // A gRPC client hears why. Any other must not take what it has for the whole.
            if !grpc || download.to().send_trailers(refusal::grpc_trailers(Refusal::UpstreamReset)).is_err() {
                download.to().send_reset(Reason::INTERNAL_ERROR);
            }
        }
    }
}

/// Goes on with both bodies. The record and the endpoint's load are settled when the answer has ended, whatever may
/// still be uploaded.
fn poll_bodies(
    cx: &mut Context<'_>,
    upload: &mut Pipe,
    download: &mut Pipe,
    open: &mut Option<(Box<Access>, InFlight)>,
) -> Poll<Ended> {
    let mut untaken = false;
    let sent = |passed: Passed<'_>| {
        if let (Passed::Data(chunk), Some((access, _))) = (passed, open.as_ref()) {
            access.counts.add_sent(chunk.len());
        }
    };
    match upload.poll(cx, sent) {
        Poll::Ready(Err(Broken::From(error))) => return Poll::Ready(Ended::ClientGone(said(&error))),
        Poll::Ready(Err(Broken::To)) => untaken = true,
        Poll::Ready(Ok(())) | Poll::Pending => {}
    }
    if !download.is_done() {
        let received = |passed: Passed<'_>| match (passed, open.as_mut()) {
            (Passed::Data(chunk), Some((access, _))) => access.counts.add_received(chunk.len()),
            (Passed::Trailers(trailers), Some((access, _))) if access.protocol == Protocol::Grpc => {
                access.grpc_status = refusal::grpc_status_of(trailers);
            }
            _ => {}
        };
        match download.poll(cx, received) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(Broken::From(error))) => return Poll::Ready(Ended::Upstream(error)),
            Poll::Ready(Err(Broken::To)) => return Poll::Ready(Ended::ClientGone(Reason::CANCEL)),
            Poll::Pending => {
                // A download may wait for the server, and would not see that the client has gone.
                let reset = ready!(download.to().poll_reset(cx));
                return Poll::Ready(Ended::ClientGone(reset.unwrap_or(Reason::CANCEL)));
            }
        }
    }
    if let Some((mut access, _in_flight)) = open.take() {
        access.outcome = Outcome::Ok;
    }
    // A server may end its answer first and go on reading, or say that it does not.
    if upload.is_done() || untaken || upload.to().poll_reset(cx).is_ready() {
        return Poll::Ready(Ended::Both);
    }
    Poll::Pending
}

/// What is made of a failure after which the request cannot be sent again.
fn failure(error: &h2::Error, in_flight: &InFlight, now: Duration) -> Failed {
    if error.is_reset() && error.is_remote() {
        return Failed::Reset(said(error));
    }
    in_flight.failed(now, draw());
    Failed::Refused(if error.is_library() { Refusal::BadProtocol } else { Refusal::UpstreamReset })
}

/// The code with which one side ended a stream, for the other.
fn said(error: &h2::Error) -> Reason {
    error.reason().unwrap_or(Reason::CANCEL)
}

/// Whether h2 did not take what we gave it, and the connection is well.
fn is_ours(error: &h2::Error) -> bool {
    error.reason().is_none() && !error.is_io()
}

/// The request's head, once more: it is needed again if the server does not process it.
fn copy_of(head: &request::Parts) -> Request<()> {
    let mut request = Request::new(());
    request.method_mut().clone_from(&head.method);
    request.uri_mut().clone_from(&head.uri);
    // A client may name the host in a field and not in `:authority`. h2 passes that on for what comes from HTTP/1.1.
    let whole = head.uri.authority().is_some() || head.method == Method::CONNECT;
    *request.version_mut() = if whole { Version::HTTP_2 } else { Version::HTTP_11 };
    request.headers_mut().clone_from(&head.headers);
    request
}
