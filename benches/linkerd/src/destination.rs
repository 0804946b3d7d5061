//! Where a service is, and who answers there. It must not know policies.

use std::net::SocketAddr;

use linkerd2_proxy_api::destination::{
    DestinationProfile, NoEndpoints, ProtocolHint, TlsIdentity, Update, WeightedAddr, WeightedAddrSet,
    protocol_hint::{self, OpaqueTransport},
    tls_identity::{DnsLikeIdentity, Strategy},
    update,
};

use crate::world::Service;

/// What an endpoint weighs that nobody gave a weight.
const WEIGHT: u32 = 10_000;

/// The one that is asked for by `name:port` or `address:port`.
pub(crate) fn find<'a>(services: &'a [Service], path: &str) -> Option<&'a Service> {
    let address: Option<SocketAddr> = path.parse().ok();
    services.iter().find(|service| Some(service.address) == address || service.authority() == path)
}

/// The endpoints of a service.
pub(crate) fn endpoints(service: &Service) -> Update {
    let addrs = vec![endpoint(service)];
    Update { update: Some(update::Update::Add(WeightedAddrSet { addrs, ..WeightedAddrSet::default() })) }
}

/// That there is no such service.
pub(crate) fn nowhere() -> Update {
    Update { update: Some(update::Update::NoEndpoints(NoEndpoints { exists: false })) }
}

/// What older proxies ask beside the policy.
pub(crate) fn profile(service: &Service) -> DestinationProfile {
    DestinationProfile {
        fully_qualified_name: service.name.clone(),
        opaque_protocol: service.opaque_by.is_some(),
        ..DestinationProfile::default()
    }
}

fn endpoint(service: &Service) -> WeightedAddr {
    let name = || DnsLikeIdentity { name: service.identity.clone() };
    // Between proxies requests are HTTP/2 even when neither end speaks it; bytes go to the other proxy's own port.
    let hint = match service.opaque_by {
        None => {
            ProtocolHint { protocol: Some(protocol_hint::Protocol::H2(protocol_hint::H2 {})), opaque_transport: None }
        }
        Some(port) => ProtocolHint {
            protocol: Some(protocol_hint::Protocol::Opaque(protocol_hint::Opaque {})),
            opaque_transport: Some(OpaqueTransport { inbound_port: port.into() }),
        },
    };
    WeightedAddr {
        addr: Some(service.endpoint.into()),
        weight: WEIGHT,
        tls_identity: Some(TlsIdentity {
            strategy: Some(Strategy::DnsLikeIdentity(name())),
            server_name: Some(name()),
        }),
        protocol_hint: Some(hint),
        ..WeightedAddr::default()
    }
}
