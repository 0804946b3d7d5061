//! How the task's proxy speaks to a service: balanced over its endpoints, as requests or as bytes.
//!
//! With what Linkerd gives a service without routes or annotations. It must not know the endpoints.

use std::time::Duration;

use linkerd2_proxy_api::{
    http_route::HttpRouteMatch,
    outbound::{
        Backend, HttpRoute, OpaqueRoute, OutboundPolicy, ProxyProtocol, Queue, backend,
        backend::{
            BalanceP2c, EndpointDiscovery,
            balance_p2c::{Load, PeakEwma},
            endpoint_discovery::{self, DestinationGet},
        },
        http_route, opaque_route,
        proxy_protocol::{Detect, Http1, Http2, Kind, Opaque},
    },
};

use crate::{inbound::named, world::Service};

/// How long the proxy waits for the first bytes that tell the protocol.
const DETECTION: Duration = Duration::from_secs(10);
/// Linkerd's defaults for its balancer and the queue before it.
const DEFAULT_RTT: Duration = Duration::from_millis(30);
const DECAY: Duration = Duration::from_secs(10);
const QUEUE: u32 = 100;
const FAIL_FAST: Duration = Duration::from_secs(3);

/// What is told of a service.
pub(crate) fn policy(service: &Service) -> OutboundPolicy {
    let opaque = Opaque { routes: vec![opaque_route(service)] };
    let kind = if service.opaque_by.is_some() {
        Kind::Opaque(opaque)
    } else {
        let routes = vec![http_route(service)];
        Kind::Detect(Detect {
            timeout: DETECTION.try_into().ok(),
            opaque: Some(opaque),
            http1: Some(Http1 { routes: routes.clone(), failure_accrual: None }),
            http2: Some(Http2 { routes, failure_accrual: None }),
        })
    };
    OutboundPolicy { protocol: Some(ProxyProtocol { kind: Some(kind) }), metadata: Some(named(&service.name)) }
}

fn http_route(service: &Service) -> HttpRoute {
    use http_route::{Distribution, RouteBackend, Rule, distribution};
    let backends = vec![RouteBackend { backend: Some(backend(service)), ..RouteBackend::default() }];
    let kind = distribution::Kind::FirstAvailable(distribution::FirstAvailable { backends });
    let rule = Rule {
        matches: vec![HttpRouteMatch::default()],
        backends: Some(Distribution { kind: Some(kind) }),
        ..Rule::default()
    };
    HttpRoute { metadata: Some(named("http")), hosts: Vec::new(), rules: vec![rule] }
}

fn opaque_route(service: &Service) -> OpaqueRoute {
    use opaque_route::{Distribution, RouteBackend, Rule, distribution};
    let backends = vec![RouteBackend { backend: Some(backend(service)), filters: Vec::new() }];
    let kind = distribution::Kind::FirstAvailable(distribution::FirstAvailable { backends });
    let rule = Rule { backends: Some(Distribution { kind: Some(kind) }), filters: Vec::new() };
    OpaqueRoute { metadata: Some(named("opaque")), rules: vec![rule] }
}

fn backend(service: &Service) -> Backend {
    let discovery =
        EndpointDiscovery { kind: Some(endpoint_discovery::Kind::Dst(DestinationGet { path: service.authority() })) };
    let load = PeakEwma { default_rtt: DEFAULT_RTT.try_into().ok(), decay: DECAY.try_into().ok() };
    Backend {
        metadata: Some(named(&service.name)),
        queue: Some(Queue { capacity: QUEUE, failfast_timeout: FAIL_FAST.try_into().ok() }),
        kind: Some(backend::Kind::Balancer(BalanceP2c {
            discovery: Some(discovery),
            load: Some(Load::PeakEwma(load)),
        })),
    }
}
