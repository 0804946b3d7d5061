//! Envoy: the HTTP connection manager at L7, the TCP proxy at L4.
//!
//! Its program is no Debian package; `cargo xtask bench peers` takes it from PyPI. It must not know where it runs.

use serde_json::{Value, json};

use super::{Half, Lane, Launch, Layer, Peer, Programs, Side, Speaks};
use crate::certificates::CALLED;

pub(super) const L7: Peer = Peer { name: "envoy", layer: Layer::L7, launch };
pub(super) const L4: Peer = Peer { name: "envoy-tcp", layer: Layer::L4, launch };

const TYPES: &str = "type.googleapis.com/envoy.extensions";

fn launch(half: &Half<'_>, programs: &Programs) -> Launch {
    let lanes = || half.lanes.iter().enumerate();
    let configuration = json!({
        "static_resources": {
            "listeners": lanes().map(|(index, lane)| listener(half, index, lane)).collect::<Vec<_>>(),
            "clusters": lanes().map(|(index, lane)| cluster(half, index, lane)).collect::<Vec<_>>(),
        },
    });
    let program = programs.envoy.as_ref().map_or_else(|| "envoy".to_owned(), |path| path.display().to_string());
    let argv = [program.as_str(), "--disable-hot-restart", "--log-level", "warn", "-c", "{}"];
    Launch {
        file: "envoy.json",
        text: configuration.to_string(),
        argv: argv.map(str::to_owned).to_vec(),
        before: Vec::new(),
        control: None,
    }
}

fn listener(half: &Half<'_>, index: usize, lane: &Lane) -> Value {
    let up = format!("up{index}");
    let filter = match lane.speaks {
        Speaks::Bytes => json!({
            "name": "tcp",
            "typed_config": {
                "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
                "stat_prefix": up,
                "cluster": up,
            },
        }),
        Speaks::Http1 | Speaks::Http2 => json!({
            "name": "http",
            "typed_config": {
                "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
                "stat_prefix": up,
                "codec_type": "AUTO",
                "generate_request_id": false,
                "route_config": { "virtual_hosts": [{
                    "name": "all", "domains": ["*"],
                    "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": up, "timeout": "0s" } }],
                }] },
                "http_filters": [{
                    "name": "router",
                    "typed_config": {
                        "@type": format!("{TYPES}.filters.http.router.v3.Router"),
                        "suppress_envoy_headers": true,
                    },
                }],
            },
        }),
    };
    let mut chain = json!({ "filters": [filter] });
    if half.side == Side::Called {
        chain["transport_socket"] = json!({
            "name": "tls",
            "typed_config": {
                "@type": format!("{TYPES}.transport_sockets.tls.v3.DownstreamTlsContext"),
                "require_client_certificate": true,
                "common_tls_context": tls(half, lane, false),
            },
        });
    }
    json!({ "name": format!("in{index}"), "address": socket(lane.listen), "filter_chains": [chain] })
}

fn cluster(half: &Half<'_>, index: usize, lane: &Lane) -> Value {
    let up = format!("up{index}");
    let mut cluster = json!({
        "name": up,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": up,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": socket(lane.to) } }] }],
        },
    });
    if lane.speaks == Speaks::Http2 {
        let options = format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions");
        cluster["typed_extension_protocol_options"] = json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": options,
            "explicit_http_config": { "http2_protocol_options": {} },
        } });
    }
    if half.side == Side::Caller {
        cluster["transport_socket"] = json!({
            "name": "tls",
            "typed_config": {
                "@type": format!("{TYPES}.transport_sockets.tls.v3.UpstreamTlsContext"),
                "sni": CALLED,
                "common_tls_context": tls(half, lane, true),
            },
        });
    }
    cluster
}

fn tls(half: &Half<'_>, lane: &Lane, check_name: bool) -> Value {
    let mut validation = json!({ "trusted_ca": { "filename": half.root } });
    if check_name {
        validation["match_typed_subject_alt_names"] = json!([{ "san_type": "DNS", "matcher": { "exact": CALLED } }]);
    }
    let protocols: &[&str] = match lane.speaks {
        Speaks::Http1 => &["http/1.1"],
        Speaks::Http2 => &["h2"],
        Speaks::Bytes => &[],
    };
    json!({
        // Its client side speaks at most TLS 1.2 unless it is told.
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{
            "certificate_chain": { "filename": half.own.certificate },
            "private_key": { "filename": half.own.key },
        }],
        "validation_context": validation,
        "alpn_protocols": protocols,
    })
}

fn socket(at: std::net::SocketAddr) -> Value {
    json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } })
}
