//! From a method and a URI to an answer.
//!
//! Must not know sockets. Answers of the admin socket are JSON, those of the metrics port are text.

use bytes::Bytes;
use http::{Method, Response, StatusCode, Uri, header};
use http_body_util::Full;
use serde::Serialize;

use super::{Handles, explain};
use crate::api::{Failure, Services};

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
/// OpenMetrics 1.0, as `prometheus-client` writes it.
const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The unix socket's paths.
pub(super) fn admin(handles: &Handles, method: &Method, uri: &Uri) -> Response<Full<Bytes>> {
    let paths = ["/v1/status", "/v1/services", "/v1/explain"];
    if !paths.contains(&uri.path()) {
        let remedy = format!("ask for one of {}", paths.join(", "));
        return failure(StatusCode::NOT_FOUND, &Failure { error: format!("no path {}", uri.path()), remedy });
    }
    if method != Method::GET {
        return wrong_method(failure(
            StatusCode::METHOD_NOT_ALLOWED,
            &Failure { error: format!("no method {method}"), remedy: "use GET: nothing can be changed here".into() },
        ));
    }
    match uri.path() {
        "/v1/status" => json(StatusCode::OK, &(handles.status)()),
        "/v1/services" => {
            let load = |endpoint: &_| (handles.load)(endpoint);
            json(StatusCode::OK, &Services::of(&handles.snapshot.load(), &load, (handles.now)()))
        }
        _ => match explain::Asked::parse(uri.query().unwrap_or_default())
            .and_then(|asked| explain::explain(handles, &handles.snapshot.load(), &asked))
        {
            Ok(explained) => json(StatusCode::OK, &explained),
            Err(not_understood) => failure(StatusCode::BAD_REQUEST, &not_understood),
        },
    }
}

/// The loopback port's paths.
pub(super) fn metrics(handles: &Handles, method: &Method, uri: &Uri) -> Response<Full<Bytes>> {
    if !["/metrics", "/healthz", "/readyz"].contains(&uri.path()) {
        return answer(StatusCode::NOT_FOUND, TEXT, "try /metrics, /healthz or /readyz\n");
    }
    if method != Method::GET {
        return wrong_method(answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET\n"));
    }
    match uri.path() {
        "/metrics" => answer(StatusCode::OK, METRICS, (handles.metrics)()),
        "/healthz" => answer(StatusCode::OK, TEXT, "alive\n"),
        _ => match (handles.ready)() {
            Ok(()) => answer(StatusCode::OK, TEXT, "ready\n"),
            Err(missing) => {
                answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("not ready\n{}\n", missing.join("\n")))
            }
        },
    }
}

fn failure(status: StatusCode, failure: &Failure) -> Response<Full<Bytes>> {
    json(status, failure)
}

fn json(status: StatusCode, document: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_string_pretty(document) {
        Ok(text) => answer(status, JSON, text + "\n"),
        Err(error) => answer(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
    }
}

fn wrong_method(mut answer: Response<Full<Bytes>>) -> Response<Full<Bytes>> {
    answer.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET"));
    answer
}

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    answer
}
