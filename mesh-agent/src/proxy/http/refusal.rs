//! The answer to a request that is not served: poorer than what the operator's log says. Pure.
//!
//! Must not know which version of HTTP carries it.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use mesh_common::refusal::Refusal;

const REFUSAL: HeaderName = HeaderName::from_static("ecs-mesh-refusal");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// gRPC status codes, as far as we say them.
const PERMISSION_DENIED: u16 = 7;
const INTERNAL: u16 = 13;
const UNAVAILABLE: u16 = 14;

/// With a status code that says the same.
pub(super) fn plain(refusal: Refusal) -> Response<Bytes> {
    let mut response = Response::new(format!("{}\n", sentence(refusal)).into());
    *response.status_mut() = status(refusal);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    name(refusal, headers);
    response
}

/// For a gRPC client, which looks at the HTTP status only when there is nothing else: "trailers only", that is a head
/// without a body whose header fields are the trailers.
pub(super) fn grpc(refusal: Refusal) -> Response<()> {
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.extend(grpc_trailers(refusal));
    name(refusal, headers);
    response
}

/// The end of a gRPC answer that broke off.
pub(super) fn grpc_trailers(refusal: Refusal) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(4);
    trailers.insert(GRPC_STATUS, HeaderValue::from(grpc_status(refusal)));
    // Nothing in it needs the percent-encoding of the gRPC mapping.
    if let Ok(message) = HeaderValue::try_from(sentence(refusal)) {
        trailers.insert(GRPC_MESSAGE, message);
    }
    trailers
}

/// Whether this is the content type of gRPC over HTTP/2; gRPC-Web is an ordinary request.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let of = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let rest = of.and_then(|of| of.strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The status that a gRPC server put into a head or trailers.
pub(super) fn grpc_status_of(headers: &HeaderMap) -> Option<u16> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

fn sentence(refusal: Refusal) -> String {
    format!("ecs-mesh: request refused, reason {} ({})", refusal as u32, refusal.label())
}

fn name(refusal: Refusal, headers: &mut HeaderMap) {
    if let Ok(value) = HeaderValue::try_from(format!("{} {}", refusal as u32, refusal.label())) {
        headers.insert(REFUSAL, value);
    }
}

/// As a gRPC client would translate the HTTP status itself, but for timeouts: the client's own deadline tells those.
pub(super) fn grpc_status(refusal: Refusal) -> u16 {
    match status(refusal) {
        StatusCode::BAD_REQUEST => INTERNAL,
        StatusCode::FORBIDDEN => PERMISSION_DENIED,
        _ => UNAVAILABLE,
    }
}

fn status(refusal: Refusal) -> StatusCode {
    match refusal {
        Refusal::BadRequest => StatusCode::BAD_REQUEST,
        Refusal::Denied => StatusCode::FORBIDDEN,
        Refusal::ConnectTimeout => StatusCode::GATEWAY_TIMEOUT,
        Refusal::UpstreamReset
        | Refusal::BadProtocol
        | Refusal::UntrustedPeer
        | Refusal::ExpiredPeer
        | Refusal::UnexpectedIdentity
        | Refusal::HandshakeFailed => StatusCode::BAD_GATEWAY,
        Refusal::UnknownPort
        | Refusal::NoEndpoint
        | Refusal::NoHealthyEndpoint
        | Refusal::AgentAwayFailClosed
        | Refusal::MapFull
        | Refusal::PlaintextForbidden
        | Refusal::ConnectFailed
        | Refusal::TunnelRefused
        | Refusal::NotLocal
        | Refusal::NoIdentity
        | Refusal::OriginalLost
        | Refusal::Draining
        | Refusal::NotReady
        | Refusal::TaskGone => StatusCode::SERVICE_UNAVAILABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_an_answer_in_both_forms() {
        for refusal in Refusal::ALL {
            assert!(plain(*refusal).status().as_u16() >= 400, "{refusal:?}");
            let response = grpc(*refusal);
            assert_eq!(response.status(), 200, "{refusal:?}: gRPC ignores trailers of others");
            assert_eq!(grpc_status_of(response.headers()), Some(grpc_status(*refusal)));
            let message = response.headers()[GRPC_MESSAGE].to_str().expect("text");
            assert!(message.bytes().all(|b| matches!(b, 0x20..=0x7e) && b != b'%'), "{message}");
            assert!(message.contains(&format!("reason {} ({})", *refusal as u32, refusal.label())), "{message}");
        }
        assert_eq!(grpc_status(Refusal::Denied), PERMISSION_DENIED);
        assert_eq!(grpc_status(Refusal::NoEndpoint), UNAVAILABLE);
        assert_eq!(grpc_status(Refusal::BadRequest), INTERNAL);
    }

    #[test]
    fn grpc_is_told_by_its_content_type() {
        for (value, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;x=y", true),
            ("application/grpc-web", false),
            ("application/grpc-web+proto", false),
            ("application/json", false),
        ] {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(value))]);
            assert_eq!(is_grpc(&headers), expected, "{value}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }
}
