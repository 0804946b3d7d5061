//! Proof of what happened: identities that each side saw, the capture, and what the agent says of itself.
//!
//! It must not know how the traffic was made.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Result, ensure};
use mesh_lab::{Cluster, Pcap, StreamKind};
use serde_json::Value;

use super::{
    agents::{Agents, TRUST_DOMAIN, ctl},
    play::MARKER,
    show::{Show, until},
};

/// Port of the tunnels between hosts.
const TUNNEL: u16 = 15008;
const LINE_LIMIT: Duration = Duration::from_secs(10);

/// Access-log lines of both hosts that name the caller and the called.
///
/// # Errors
/// A host has none.
pub(super) fn show_identities(agents: &Agents, show: &mut Show) -> Result<()> {
    show.step("Who saw whom: the access log of both hosts");
    let identity = |service: &str| format!("spiffe://{TRUST_DOMAIN}/ns/demo/sa/{service}");
    for (host, side) in [(0, "calling"), (1, "called")] {
        for (from, to) in [("web", "world"), ("web", "cache")] {
            let both = BTreeSet::from([identity(from), identity(to)]);
            // The called side writes when the stream ends, and an idle one is kept for some seconds.
            let line = until(LINE_LIMIT, &format!("host {} logs {from} calling {to}", host + 1), || {
                let log = agents.log(host)?;
                let names_both =
                    |line: &&str| identities(&serde_json::from_str(line).unwrap_or_default()).is_superset(&both);
                Ok(log.lines().rfind(names_both).map(str::to_owned).ok_or_else(|| "no such line".to_owned()))
            })?;
            show.note(&format!("host {} ({side} side): {} -> {}", host + 1, identity(from), identity(to)));
            show.block(&brief(&line));
        }
    }
    show.proved("both sides name the same two identities for the same traffic");
    Ok(())
}

/// What passed between the hosts while the mesh was on.
///
/// # Errors
/// Something else than TLS passed, or the marker.
pub(super) fn show_capture(pcap: &Pcap, show: &mut Show) -> Result<()> {
    show.step("The network between the hosts saw only TLS");
    let streams = pcap.streams();
    let mut by_port: BTreeMap<u16, (usize, usize, usize)> = BTreeMap::new();
    for stream in &streams {
        let sum = by_port.entry(stream.server_port).or_default();
        sum.0 += 1;
        sum.1 += stream.bytes;
        if let StreamKind::Tls { records } = stream.kind {
            sum.2 += records;
        }
    }
    for (port, (count, bytes, records)) in &by_port {
        show.block(&format!("port {port}: {count} streams, {bytes} bytes, {records} TLS records"));
    }
    let others: Vec<_> = pcap.others().iter().map(|(what, count)| format!("{what} × {count}")).collect();
    show.block(&format!("besides TCP: {}", if others.is_empty() { "nothing".to_owned() } else { others.join(", ") }));
    for stream in &streams {
        ensure!(
            stream.server_port == TUNNEL && matches!(stream.kind, StreamKind::Tls { .. }),
            "something else than TLS on port {TUNNEL} passed between the hosts: {stream}"
        );
    }
    ensure!(!streams.is_empty(), "nothing passed between the hosts at all");
    ensure!(!pcap.contains(MARKER.as_bytes()), "the marker text {MARKER:?} passed in clear");
    show.proved(&format!("every byte of every stream is a TLS record on port {TUNNEL}; {MARKER:?} is nowhere in it"));
    Ok(())
}

/// What the operator's commands say.
///
/// # Errors
/// A command fails.
pub(super) fn show_commands(cluster: &Cluster, show: &mut Show) -> Result<()> {
    show.step("What the operator sees on host 1");
    let host = &cluster.hosts()[0];
    for arguments in [&["status"][..], &["services"], &["explain", "--from", "web", "world"]] {
        show.typed(&format!("mesh-agent {}", arguments.join(" ")));
        let said = ctl(host, arguments)?;
        show.block(said.stdout.trim_end());
        ensure!(said.ok(), "mesh-agent {arguments:?} ended with {:?}: {}", said.code, said.stderr);
        ensure!(said.stdout.contains("world"), "mesh-agent {arguments:?} says nothing of `world`");
    }
    show.proved("explain names the verdict, the endpoint and each reason");
    Ok(())
}

/// Every SPIFFE id in a log line, whatever the field.
fn identities(line: &Value) -> BTreeSet<String> {
    match line {
        Value::String(text) if text.starts_with("spiffe://") => BTreeSet::from([text.clone()]),
        Value::Array(all) => all.iter().flat_map(identities).collect(),
        Value::Object(fields) => fields.values().flat_map(identities).collect(),
        _ => BTreeSet::new(),
    }
}

/// A line that fits on a screen.
fn brief(line: &str) -> String {
    const LIMIT: usize = 600;
    if line.chars().count() <= LIMIT { line.to_owned() } else { line.chars().take(LIMIT).chain(['…']).collect() }
}
