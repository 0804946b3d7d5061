//! One request and its answer: plan, connection, send, and another endpoint where that is safe.
//!
//! A request is sent again only when the server cannot have acted on it, or when that does no harm: no connection was made,
//! the request never left us, or the connection closed without an answer under a request without a body whose method is
//! idempotent (RFC 9110 §9.2.2, RFC 9112 §9.3.1). The last happens when a server leaves: connections that it had not yet
//! accepted end with its listener. On a new connection it is done once, because the request itself may be what the server
//! does not survive. Any request is sent again when the other agent says, or of a task of this host the kernel, that the
//! application has closed the connection and not read one octet of it. Must not know how bodies are moved.

use std::sync::{Arc, atomic::Ordering};

use http::{HeaderValue, Method, StatusCode, Version, header, request};
use hyper::{
    Request, Response,
    body::{Body as _, Incoming},
    client::conn::TrySendError,
};
use mesh_common::refusal::Refusal;
use mesh_core::{model::Health, plan::Plan};

use super::{
    Answered, Connection,
    answer::{self, Answer, Rest, Upload},
    pool::{self, Sender, Slot},
    upgrade,
};
use crate::{
    proxy::{
        draw,
        http::{
            client::{self, Client},
            hop,
        },
        loads::InFlight,
        route::Attempts,
    },
    telemetry::{access::Access, metrics::Protocol},
};

/// The client broke off before there was an answer; its connection is closed.
#[derive(Debug, thiserror::Error)]
#[error("the client broke off its request")]
pub(super) struct ClientGone;

/// An upstream connection for one request.
struct Lease {
    sender: Sender,
    slot: Slot,
    in_flight: InFlight,
    /// It has carried requests before, and may have been closed meanwhile.
    used: bool,
    /// The task is leaving, and the client has named it itself.
    leaving: bool,
}

enum Failed {
    /// Nothing was sent: the request is still here, and other endpoints may do.
    Refused(Refusal),
    ClientGone,
}

/// Answers one request of a client.
pub(super) async fn answer(connection: Arc<Connection>, mut request: Request<Incoming>) -> Answered {
    let client = &connection.client;
    let mut access = client.record(Protocol::Http, request.method(), request.uri());
    if let Err(refusal) = check(&request) {
        return Ok(refuse(access, refusal));
    }
    let switching = switches(&request);
    let client_side = switching.then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    prepare(&mut head, switching);
    let (lease, response) = match send(client, &mut access, head, body).await {
        Ok(sent) => sent,
        Err(Failed::Refused(refusal)) => {
            client.link(&mut access);
            return Ok(refuse(access, refusal));
        }
        Err(Failed::ClientGone) => return Err(ClientGone),
    };
    client.link(&mut access);
    access.status = Some(response.status().as_u16());
    let Lease { sender, slot, in_flight, used: _, leaving } = lease;
    if let Some(client_side) = client_side
        && agreed(&access, response.status())
    {
        let (response, switched) = upgrade::switch(client_side, response, access, in_flight);
        connection.becomes(switched);
        return Ok(response);
    }
    let (mut head, body) = response.into_parts();
    // 426 names the protocol that the client should ask for.
    let proposes = head.status == StatusCode::UPGRADE_REQUIRED && hop::upgrades(&head.headers);
    hop::strip(&mut head.headers, proposes);
    if head.headers.contains_key(header::TRANSFER_ENCODING) {
        // The body was read by its chunks, so the length is wrong (RFC 9112 §6.3).
        head.headers.remove(header::CONTENT_LENGTH);
    }
    if leaving {
        // Every request of this connection goes there: the client shall look for another.
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    // hyper speaks to the client in the client's own version.
    head.version = Version::HTTP_11;
    let rest = Rest { proxy: client.route.proxy.clone(), access, in_flight, sender, slot };
    Ok(Response::from_parts(head, Answer::relay(body, rest)))
}

/// What hyper lets through and we do not.
fn check(request: &Request<Incoming>) -> Result<(), Refusal> {
    let headers = request.headers();
    // Two ways to tell the length of a body are one too many (RFC 9112 §6.3): the next reader may believe the other.
    let both = headers.contains_key(header::CONTENT_LENGTH) && headers.contains_key(header::TRANSFER_ENCODING);
    // A proxy must refuse these (RFC 9112 §3.2).
    let hosts = headers.get_all(header::HOST).iter().count();
    let host_missing = hosts == 0 && request.version() == Version::HTTP_11;
    if both || hosts > 1 || host_missing { Err(Refusal::BadRequest) } else { Ok(()) }
}

fn switches(request: &Request<Incoming>) -> bool {
    request.method() == Method::CONNECT || request.version() == Version::HTTP_11 && hop::upgrades(request.headers())
}

/// Whether the server has switched protocols.
fn agreed(access: &Access, status: StatusCode) -> bool {
    let connect = access.request.as_ref().is_some_and(|request| request.method == Method::CONNECT);
    status == StatusCode::SWITCHING_PROTOCOLS || connect && status.is_success()
}

fn prepare(head: &mut request::Parts, switching: bool) {
    hop::strip(&mut head.headers, switching && head.method != Method::CONNECT);
    // Ours is a connection of its own (RFC 9110 §2.5). Without a host it would be no HTTP/1.1 request.
    if head.headers.contains_key(header::HOST) {
        head.version = Version::HTTP_11;
    }
}

fn refuse(mut access: Access, refusal: Refusal) -> Response<Answer> {
    let response = answer::refusal(refusal);
    access.refusal = Some(refusal);
    access.status = Some(response.status().as_u16());
    response
}

/// Sends the request until somebody answers it.
async fn send(
    client: &Client,
    access: &mut Access,
    head: request::Parts,
    body: Incoming,
) -> Result<(Lease, Response<Incoming>), Failed> {
    let proxy = &client.route.proxy;
    let repeatable = body.is_end_stream() && client::is_idempotent(&head.method);
    let (upload, broken) = Upload::new(body, access.counts.clone());
    let sent = upload.sent();
    let mut request = Request::from_parts(head, upload);
    let mut attempts = Attempts::default();
    let mut fresh = false;
    let mut lost = false;
    loop {
        let plan = attempts.plan(&client.route, access).map_err(Failed::Refused)?;
        let endpoint = plan.endpoint.clone();
        let mut lease = match lease(client, plan, fresh).await {
            Ok(lease) => lease,
            Err(refusal) => {
                attempts.failed(&client.route, &endpoint.id, refusal).map_err(Failed::Refused)?;
                continue;
            }
        };
        let copy = (repeatable && !lost || lease.sender.is_told()).then(|| copy_of(&request));
        let position = lease.sender.position();
        let began = proxy.now();
        let error = match lease.sender.requests.try_send_request(request).await {
            Ok(response) => {
                let now = proxy.now();
                lease.in_flight.succeeded(now.saturating_sub(began), now);
                return Ok((lease, response));
            }
            Err(error) => error,
        };
        let failure = judge(&error);
        tracing::debug!(
            src.addr = %client.route.src_addr, dst.endpoint = %lease.slot.endpoint, error = %error.error(),
            pooled = lease.used, "no answer to a request"
        );
        request = match (unsent(error), copy) {
            (Some(request), _) => request,
            (None, _) if broken.load(Ordering::Relaxed) => return Err(Failed::ClientGone),
            (None, Some(copy)) if repeatable && !lost => copy,
            (None, copy) => {
                let missed = copy.filter(|_| lease.sender.has_missed(position)).zip(sent.again());
                let Some((copy, body)) = missed else {
                    lease.in_flight.failed(proxy.now(), draw());
                    return Err(Failed::Refused(failure));
                };
                copy.map(|_none| body)
            }
        };
        if lease.used {
            // It was closed while it lay idle, which says nothing about the endpoint.
            proxy.telemetry.metrics.retries.inc();
            fresh = true;
        } else {
            lost = true;
            lease.in_flight.failed(proxy.now(), draw());
            attempts.failed(&client.route, &endpoint.id, failure).map_err(Failed::Refused)?;
        }
    }
}

/// A connection to the planned endpoint: an idle one, unless it has to be `fresh`, or a new one.
async fn lease(client: &Client, plan: Plan, fresh: bool) -> Result<Lease, Refusal> {
    let route = &client.route;
    let leaving = plan.endpoint.health == Health::Draining;
    let slot =
        Slot { endpoint: plan.endpoint.id, source: route.source.identity.clone(), delivery: plan.delivery.clone() };
    if !fresh && let Some(sender) = route.proxy.pool.take(&slot) {
        let in_flight = route.proxy.loads.start(&slot.endpoint);
        return Ok(Lease { sender, slot, in_flight, used: true, leaving });
    }
    let upstream = route.connect(plan).await?;
    match pool::handshake(upstream.wire).await {
        Ok(sender) => Ok(Lease { sender, slot, in_flight: upstream.in_flight, used: false, leaving }),
        Err(_ended) => {
            upstream.in_flight.failed(route.proxy.now(), draw());
            Err(Refusal::UpstreamReset)
        }
    }
}

/// What it means that there was no answer.
fn judge(error: &TrySendError<Request<Upload>>) -> Refusal {
    if error.error().is_parse() { Refusal::BadProtocol } else { Refusal::UpstreamReset }
}

/// The request, if not one byte of it was sent.
fn unsent(mut error: TrySendError<Request<Upload>>) -> Option<Request<Upload>> {
    error.take_message()
}

/// A copy of a request without a body.
fn copy_of(request: &Request<Upload>) -> Request<Upload> {
    let mut copy = Request::new(Upload::empty());
    copy.method_mut().clone_from(request.method());
    copy.uri_mut().clone_from(request.uri());
    *copy.version_mut() = request.version();
    copy.headers_mut().clone_from(request.headers());
    copy.extensions_mut().clone_from(request.extensions());
    copy
}
