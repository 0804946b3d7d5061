//! Istio's ztunnel in its dedicated mode: one beside each task, HBONE between them.
//!
//! It carries bytes, and takes what is redirected to it, so the caller's network sends a virtual address there. Nobody
//! distributes its program for a machine without Kubernetes: whoever has one names it with `--ztunnel`. It is told of
//! workloads by a file in place of istiod, and makes its certificates itself, which it does only when it was built with
//! the feature `testing`. It must not know where it runs.

use std::{fmt::Write as _, net::Ipv4Addr};

use super::{Half, Launch, Layer, Peer, Programs, Side, redirected};
use crate::usage;

pub(super) const L4: Peer = Peer { name: "ztunnel", layer: Layer::L4, launch };

/// Of the range for benchmarks (RFC 2544).
pub(super) const VIRTUAL: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// Where the called one takes HBONE. Fixed in the program, as is the next.
pub(super) const HBONE: u16 = 15008;
const OUTBOUND: u16 = 15001;

const NAMESPACE: &str = "bench";
const CALLER: &str = "caller";
const CALLED: &str = "called";

fn launch(half: &Half<'_>, programs: &Programs) -> Launch {
    let own = match half.side {
        Side::Caller => CALLER,
        Side::Called => CALLED,
    };
    let environment = [
        "XDS_ADDRESS=".to_owned(),
        "LOCAL_XDS_PATH={}".to_owned(),
        "FAKE_CA=true".to_owned(),
        "PROXY_MODE=dedicated".to_owned(),
        format!("PROXY_WORKLOAD_INFO={NAMESPACE}/{own}/{own}"),
        // Two nodes, or it would not encrypt what stays on one.
        format!("NODE_NAME={own}"),
        "ENABLE_ORIG_SRC=false".to_owned(),
        "IPV6_ENABLED=false".to_owned(),
        "ISTIO_META_DNS_CAPTURE=false".to_owned(),
        format!("ZTUNNEL_WORKER_THREADS={}", usage::cpus()),
        // Without its access log, which is written at `info`.
        "RUST_LOG=warn".to_owned(),
    ];
    let program = programs.ztunnel.as_ref().map_or_else(|| "ztunnel".to_owned(), |path| path.display().to_string());
    let argv = std::iter::once("env".to_owned()).chain(environment).chain([program]).collect();
    let before = match half.side {
        Side::Caller => redirected(VIRTUAL, None, OUTBOUND),
        Side::Called => Vec::new(),
    };
    Launch { file: "ztunnel.yaml", text: workloads(half), argv, before, control: None }
}

/// What istiod would tell: who is where, and which service the virtual address is. Both ends get the same.
fn workloads(half: &Half<'_>) -> String {
    let service = format!("{CALLED}.{NAMESPACE}.svc.cluster.local");
    let mut text = "workloads:\n".to_owned();
    for (name, address) in [(CALLER, half.ends.caller), (CALLED, half.ends.called)] {
        write!(
            text,
            "- uid: bench//v1/Pod/{NAMESPACE}/{name}
  name: {name}
  namespace: {NAMESPACE}
  serviceAccount: {name}
  workloadIps: [\"{address}\"]
  protocol: HBONE
  node: {name}
  network: \"\"
"
        )
        .ok();
        if name == CALLED {
            write!(text, "  services:\n    \"{NAMESPACE}/{service}\":\n{}", ports(half, "      ")).ok();
        }
    }
    write!(
        text,
        "policies: []
services:
- name: {CALLED}
  namespace: {NAMESPACE}
  hostname: {service}
  vips: [\"/{VIRTUAL}\"]
  ports:
{}",
        ports(half, "    ")
    )
    .ok();
    text
}

/// Numbers and not texts, as its reader wants them.
fn ports(half: &Half<'_>, indent: &str) -> String {
    half.lanes.iter().fold(String::new(), |mut text, lane| {
        writeln!(text, "{indent}{}: {}", lane.listen.port(), lane.serves).ok();
        text
    })
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, path::Path};

    use super::*;
    use crate::{
        certificates::Leaf,
        peers::{Ends, Lane, Speaks},
    };

    fn launched(side: Side) -> Launch {
        let own = Leaf { certificate: "c".into(), key: "k".into(), both: "b".into() };
        let lane = |port, serves| Lane {
            speaks: Speaks::Bytes,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            to: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
            serves,
        };
        let half = Half {
            side,
            lanes: vec![lane(21_060, 8080), lane(21_061, 8082)],
            own: &own,
            issuer: &own,
            root: Path::new("root"),
            first_port: 21_060,
            ends: Ends { caller: Ipv4Addr::new(10, 0, 0, 1), called: Ipv4Addr::new(10, 0, 0, 2) },
            dir: Path::new("dir"),
        };
        launch(&half, &Programs { ztunnel: Some("/opt/ztunnel".into()), ..Programs::default() })
    }

    #[test]
    fn both_ends_know_the_same_workloads() {
        let (caller, called) = (launched(Side::Caller), launched(Side::Called));
        assert_eq!(caller.text, called.text);
        assert!(caller.text.contains("workloadIps: [\"10.0.0.2\"]"), "{}", caller.text);
        assert!(caller.text.contains("\n    21060: 8080\n    21061: 8082\n"), "{}", caller.text);
        assert!(caller.text.contains("vips: [\"/198.18.0.1\"]"));
    }

    #[test]
    fn each_end_is_itself_and_only_the_caller_is_redirected_to() {
        let (caller, called) = (launched(Side::Caller), launched(Side::Called));
        assert_eq!(caller.argv.first().map(String::as_str), Some("env"));
        assert_eq!(caller.argv.last().map(String::as_str), Some("/opt/ztunnel"));
        assert!(caller.argv.contains(&"PROXY_WORKLOAD_INFO=bench/caller/caller".to_owned()));
        assert!(called.argv.contains(&"PROXY_WORKLOAD_INFO=bench/called/called".to_owned()));
        assert_eq!((caller.before.len(), called.before.len()), (2, 0));
    }
}
