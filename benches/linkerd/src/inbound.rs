//! How a port of the task is spoken to: by whoever shows a certificate of the mesh, as requests or as bytes.
//!
//! This is Linkerd's default policy `all-authenticated`. It must not know who signs.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use linkerd2_proxy_api::{
    http_route::{HttpRouteMatch, PathMatch, path_match},
    inbound::{
        Authn, Authz, HttpRoute, IdentitySuffix, Network, ProxyProtocol, Server,
        authn::{
            Permit, PermitMeshTls,
            permit_mesh_tls::{Clients, PermitClientIdentities},
        },
        http_route::Rule,
        proxy_protocol::{Detect, Kind, Opaque},
    },
    meta::{Metadata, metadata},
};

use crate::world::Port;

/// The policy's name.
const NAME: &str = "all-authenticated";
/// How long the proxy waits for the first bytes that tell the protocol.
const DETECTION: Duration = Duration::from_secs(10);

/// What is told of a port.
pub(crate) fn server(port: Port) -> Server {
    let kind = if port.opaque {
        Kind::Opaque(Opaque {})
    } else {
        Kind::Detect(Detect {
            timeout: DETECTION.try_into().ok(),
            http_routes: vec![everything()],
            http_local_rate_limit: None,
        })
    };
    Server {
        protocol: Some(ProxyProtocol { kind: Some(kind) }),
        server_ips: Vec::new(),
        authorizations: vec![authenticated()],
        labels: labels(),
    }
}

fn everything() -> HttpRoute {
    let path = PathMatch { kind: Some(path_match::Kind::Prefix("/".to_owned())) };
    let every = HttpRouteMatch { path: Some(path), ..HttpRouteMatch::default() };
    HttpRoute {
        metadata: Some(named("default")),
        hosts: Vec::new(),
        // Those of the server hold.
        authorizations: Vec::new(),
        rules: vec![Rule { matches: vec![every], filters: Vec::new() }],
    }
}

/// From anywhere, but with a certificate.
fn authenticated() -> Authz {
    let networks = [(Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::UNSPECIFIED, 0).into()];
    // An empty suffix is that of every name.
    let identities =
        PermitClientIdentities { identities: Vec::new(), suffixes: vec![IdentitySuffix { parts: Vec::new() }] };
    let permit = Permit::MeshTls(PermitMeshTls { clients: Some(Clients::Identities(identities)) });
    Authz {
        networks: networks.map(|net| Network { net: Some(net), except: Vec::new() }).to_vec(),
        authentication: Some(Authn { permit: Some(permit) }),
        labels: labels(),
        metadata: Some(named(NAME)),
    }
}

fn labels() -> HashMap<String, String> {
    [("group", ""), ("kind", "default"), ("name", NAME)].map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

/// Something that no resource of a cluster stands for.
pub(crate) fn named(name: &str) -> Metadata {
    Metadata { kind: Some(metadata::Kind::Default(name.to_owned())) }
}
