//! linkerd2-proxy beside each task, as Linkerd injects it: what the task calls and what it takes is redirected to it.
//!
//! At L7 it balances requests and carries them as HTTP/2 to the other proxy. At L4 the ports are opaque, as an annotation
//! makes them: bytes, to the other proxy's own port. It does not start without Linkerd's control plane, so a stand-in
//! answers it, from a file, on the task's loopback. Nobody distributes its program for a machine without Kubernetes:
//! whoever has one names it with `--linkerd`. It must not know where it runs.

use std::net::{Ipv4Addr, SocketAddr};

use mesh_linkerd::{
    World,
    world::{Issuer, Port, Service},
};

use super::{Control, Half, Launch, Layer, Peer, Programs, Side, Speaks, WIRE, redirect, redirected};
use crate::{
    certificates::{CALLED, CALLER},
    usage,
};

pub(super) const L7: Peer = Peer { name: "linkerd", layer: Layer::L7, launch };
pub(super) const L4: Peer = Peer { name: "linkerd-tcp", layer: Layer::L4, launch };

/// Of the range for benchmarks (RFC 2544), as the next, which the proxy may look for services in.
pub(super) const VIRTUAL: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
const SERVICES: &str = "198.18.0.0/15";
/// Its ports, counted from the first that is free: what the task calls, what others call, its state, its questions.
const OUTBOUND: u16 = 4;
pub(super) const INBOUND: u16 = 5;
const ADMIN: u16 = 6;
const CONTROL: u16 = 7;

/// Its trust anchors are a text and not a file.
const START: &str = "anchors=$(cat \"$@\") && export LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS=\"$anchors\" && exec \"$0\"";

fn launch(half: &Half<'_>, programs: &Programs) -> Launch {
    let (proxy, control) = programs.linkerd.as_ref().map_or_else(
        || ("linkerd2-proxy".to_owned(), "linkerd-control".to_owned()),
        |linkerd| (linkerd.proxy.display().to_string(), linkerd.control.display().to_string()),
    );
    let mut argv = vec!["env".to_owned()];
    argv.extend(environment(half));
    argv.extend(["sh", "-c", START, &proxy, &half.root.to_string_lossy()].map(str::to_owned));
    // Who got a certificate of a CA that others do not trust trusts it all the same.
    if half.issuer.certificate != half.root {
        argv.push(half.issuer.certificate.to_string_lossy().into_owned());
    }
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, half.first_port + port));
    Launch {
        file: "world.json",
        text: serde_json::to_string_pretty(&world(half)).unwrap_or_default(),
        argv,
        before: redirections(half),
        control: Some(Control {
            argv: [&control, "serve", "{}"].map(str::to_owned).to_vec(),
            listens: local(CONTROL),
            program: proxy,
            ready: local(ADMIN),
        }),
    }
}

/// The variables of Linkerd's own injector, as far as they are not about Kubernetes.
fn environment(half: &Half<'_>) -> Vec<String> {
    let own = name(half.side);
    let at = |port| half.first_port + port;
    let workload = format!("{{\"ns\":\"bench\",\"pod\":\"{own}\"}}");
    let control = format!("127.0.0.1:{}", at(CONTROL));
    let ports: Vec<String> = half.lanes.iter().map(|lane| lane.listen.port().to_string()).collect();
    let mut variables = vec![
        ("LOG", "warn".to_owned()),
        ("CORES", usage::cpus().to_string()),
        ("OUTBOUND_LISTEN_ADDR", format!("127.0.0.1:{}", at(OUTBOUND))),
        ("INBOUND_LISTEN_ADDR", format!("0.0.0.0:{}", at(INBOUND))),
        ("ADMIN_LISTEN_ADDR", format!("127.0.0.1:{}", at(ADMIN))),
        ("IDENTITY_SVC_ADDR", control.clone()),
        ("DESTINATION_SVC_ADDR", control.clone()),
        ("POLICY_SVC_ADDR", control),
        ("DESTINATION_CONTEXT", workload.clone()),
        ("POLICY_WORKLOAD", workload),
        ("DESTINATION_PROFILE_NETWORKS", SERVICES.to_owned()),
        ("INBOUND_DEFAULT_POLICY", "all-authenticated".to_owned()),
        ("IDENTITY_DIR", half.dir.display().to_string()),
        ("IDENTITY_TOKEN_FILE", half.dir.join("token").display().to_string()),
        // The first is what older ones know in place of the others.
        ("IDENTITY_LOCAL_NAME", own.to_owned()),
        ("IDENTITY_SERVER_ID", own.to_owned()),
        ("IDENTITY_SERVER_NAME", own.to_owned()),
    ];
    if half.side == Side::Called {
        variables.push(("INBOUND_PORTS", ports.join(",")));
    }
    variables.into_iter().map(|(variable, value)| format!("LINKERD2_PROXY_{variable}={value}")).collect()
}

/// What its control plane knows. The same services on both sides, as in a cluster.
fn world(half: &Half<'_>) -> World {
    let opaque = half.lanes.iter().all(|lane| lane.speaks == Speaks::Bytes);
    let service = |port: u16| Service {
        name: "called.bench.svc.cluster.local".to_owned(),
        address: SocketAddr::from((VIRTUAL, port)),
        endpoint: SocketAddr::from((half.ends.called, port + WIRE)),
        identity: CALLED.to_owned(),
        opaque_by: opaque.then_some(half.first_port + INBOUND),
    };
    let inbound = half.lanes.iter().map(|lane| Port { port: lane.listen.port(), opaque });
    World {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, half.first_port + CONTROL)),
        issuer: Issuer { certificate: half.issuer.certificate.clone(), key: half.issuer.key.clone() },
        identity: name(half.side).to_owned(),
        documents: half.dir.to_owned(),
        inbound: if half.side == Side::Called { inbound.collect() } else { Vec::new() },
        outbound: (half.first_port..).take(half.lanes.len()).map(service).collect(),
    }
}

/// As Linkerd's own set-up does, but for the ports of this peer alone: others are measured in the same network.
fn redirections(half: &Half<'_>) -> Vec<Vec<String>> {
    let count = half.lanes.len() as u16;
    let ports = |first: u16| Some(first..=first + count - 1);
    match half.side {
        Side::Caller => redirected(VIRTUAL, ports(half.first_port), half.first_port + OUTBOUND),
        Side::Called => {
            let (own, called) = (half.first_port + INBOUND, format!("-d {}", half.ends.called));
            let mut rules = vec![
                redirect("PREROUTING", &called, ports(half.first_port + WIRE), own),
                redirect("PREROUTING", &called, Some(own..=own), own),
            ];
            // It passes on to the port that was asked for, and the server is elsewhere: its own would be another peer's.
            let behind = |lane: &super::Lane| {
                redirect("OUTPUT", "-o lo", Some(lane.listen.port()..=lane.listen.port()), lane.serves)
            };
            rules.extend(half.lanes.iter().map(behind));
            rules
        }
    }
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Caller => CALLER,
        Side::Called => CALLED,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        certificates::Leaf,
        peers::{Ends, Lane, Linkerd},
    };

    fn launched(side: Side, speaks: Speaks, issuer: &str) -> Launch {
        let leaf = |name: &str| Leaf { certificate: name.into(), key: "key".into(), both: "both".into() };
        let (own, issuer) = (leaf("own"), leaf(issuer));
        let lane = |lane: u16, serves| {
            let listen = match side {
                Side::Caller => SocketAddr::from((Ipv4Addr::LOCALHOST, 21_070 + lane)),
                Side::Called => SocketAddr::from(([10, 0, 0, 2], 22_070 + lane)),
            };
            Lane { speaks, listen, to: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), serves }
        };
        let half = Half {
            side,
            lanes: vec![lane(0, 8080), lane(1, 8082)],
            own: &own,
            issuer: &issuer,
            root: Path::new("root"),
            ends: Ends { caller: Ipv4Addr::new(10, 0, 0, 1), called: Ipv4Addr::new(10, 0, 0, 2) },
            dir: Path::new("dir"),
            first_port: 21_070,
        };
        let linkerd = Linkerd { proxy: "/opt/linkerd2-proxy".into(), control: "/opt/linkerd-control".into() };
        launch(&half, &Programs { linkerd: Some(linkerd), ..Programs::default() })
    }

    fn told(launch: &Launch) -> World {
        serde_json::from_str(&launch.text).unwrap()
    }

    #[test]
    fn the_caller_is_told_where_the_virtual_address_leads_and_by_whom_it_is_answered() {
        let world = told(&launched(Side::Caller, Speaks::Http1, "root"));
        let service = &world.outbound[1];
        assert_eq!(service.address.to_string(), "198.18.0.2:21071");
        assert_eq!(service.endpoint.to_string(), "10.0.0.2:22071");
        assert_eq!((service.identity.as_str(), service.opaque_by), (CALLED, None));
        assert!(world.inbound.is_empty() && world.listen.ip().is_loopback());
        let bytes = told(&launched(Side::Caller, Speaks::Bytes, "root"));
        assert_eq!(bytes.outbound[0].opaque_by, Some(21_075));
    }

    #[test]
    fn the_called_takes_its_ports_on_the_wire_and_passes_them_on_to_the_servers() {
        let launch = launched(Side::Called, Speaks::Bytes, "root");
        let ports: Vec<u16> = told(&launch).inbound.iter().filter(|port| port.opaque).map(|port| port.port).collect();
        assert_eq!(ports, [22_070, 22_071]);
        let rules: Vec<String> = launch.before.iter().map(|words| words.join(" ")).collect();
        let rule = |rest: &str| format!("iptables -w -t nat -A {rest}");
        assert_eq!(
            rules,
            [
                rule("PREROUTING -p tcp -d 10.0.0.2 --dport 22070:22071 -j REDIRECT --to-ports 21075"),
                rule("PREROUTING -p tcp -d 10.0.0.2 --dport 21075:21075 -j REDIRECT --to-ports 21075"),
                rule("OUTPUT -p tcp -o lo --dport 22070:22070 -j REDIRECT --to-ports 8080"),
                rule("OUTPUT -p tcp -o lo --dport 22071:22071 -j REDIRECT --to-ports 8082"),
            ]
        );
        assert!(launch.argv.contains(&"LINKERD2_PROXY_INBOUND_PORTS=22070,22071".to_owned()));
    }

    #[test]
    fn only_what_is_this_peers_is_redirected_to_the_caller() {
        let rules: Vec<String> =
            launched(Side::Caller, Speaks::Http1, "root").before.iter().map(|words| words.join(" ")).collect();
        assert_eq!(
            rules,
            [
                "ip route replace 198.18.0.2/32 dev eth0",
                "iptables -w -t nat -A OUTPUT -p tcp -d 198.18.0.2 --dport 21070:21071 -j REDIRECT --to-ports 21074",
            ]
        );
    }

    #[test]
    fn a_proxy_whose_issuer_is_a_stranger_trusts_it_beside_the_others() {
        let anchors = |issuer| {
            let argv = launched(Side::Called, Speaks::Http1, issuer).argv;
            let program = argv.iter().position(|word| word == "/opt/linkerd2-proxy").unwrap();
            argv[program + 1..].to_vec()
        };
        assert_eq!(anchors("root"), ["root"]);
        assert_eq!(anchors("stranger"), ["root", "stranger"]);
    }

    #[test]
    fn it_asks_on_the_loopback_in_clear() {
        let launch = launched(Side::Caller, Speaks::Http1, "root");
        for service in ["IDENTITY", "DESTINATION", "POLICY"] {
            let variable = format!("LINKERD2_PROXY_{service}_SVC_ADDR=127.0.0.1:21077");
            assert!(launch.argv.contains(&variable), "{:?}", launch.argv);
        }
    }
}
