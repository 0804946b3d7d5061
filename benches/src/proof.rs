//! That every subject with a mesh encrypts both ways and refuses strangers: a fast proxy that does neither is no peer.
//!
//! Each proof has its counter-proof: the wire without a mesh does show the texts, and the right certificate is let
//! in. It must not measure.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_lab::{Output, StreamKind};

use crate::{
    agents::TUNNELS,
    certificates::{Authority, CALLED, Leaf},
    peers::{Peer, Programs, Running},
    subject::Subject,
    topology::{MARKER_ANSWER, MARKER_QUESTION, Pair, Seat, Topology},
};

/// Requests with the marker; enough that two connections at least carry it.
const REQUESTS: usize = 8;

/// What was shown of one subject.
#[derive(Clone, Debug)]
pub struct Proof {
    pub subject: String,
    pub facts: Vec<String>,
}

/// Asks for the marker through `subject` while everything on the wire is recorded. `hidden` says whether the texts must
/// not be seen there, or must.
///
/// # Errors
/// The wire shows what it must not, or nothing passed.
pub fn wire(topology: &Topology, subject: &Subject, hidden: bool) -> Result<Vec<String>> {
    let pair = if subject.meshed { &topology.meshed } else { &topology.plain };
    let capture = topology.cluster.capture(&format!("proof-{}", subject.name))?;
    let url = format!("http://{}/marker", subject.target.http);
    let header = format!("X-Marker: {MARKER_QUESTION}");
    for _ in 0..REQUESTS {
        let answer = pair.ask(&topology.cluster, subject.client, &["curl", "-sS", "-m", "10", "-H", &header, &url])?;
        ensure!(answer == MARKER_ANSWER, "{url} answered {answer:?}");
    }
    let wire = capture.stop()?;
    let seen = [MARKER_QUESTION, MARKER_ANSWER].map(|text| wire.contains(text.as_bytes()));
    if !hidden {
        ensure!(seen == [true, true], "the capture shows nothing even of plain text, so it would prove nothing");
        return Ok(vec!["in clear on the wire, as the capture shows".to_owned()]);
    }
    ensure!(seen == [false, false], "{}: question seen, answer seen on the wire: {seen:?}", subject.name);
    let far = pair.address(Seat::Far);
    let streams: Vec<_> =
        wire.streams().into_iter().filter(|each| [each.from.ip(), each.to.ip()].contains(&far.into())).collect();
    let both = [true, false].map(|out| {
        let direction = streams.iter().filter(|each| (each.to.ip() == far) == out);
        direction.filter(|each| matches!(each.kind, StreamKind::Tls { .. })).map(|each| each.bytes).sum::<usize>()
    });
    let other = streams.iter().find(|each| !matches!(each.kind, StreamKind::Tls { .. }));
    ensure!(other.is_none(), "{}: not TLS from end to end: {other:?}", subject.name);
    let least = REQUESTS * MARKER_QUESTION.len();
    ensure!(both.iter().all(|bytes| *bytes > least), "{}: too few bytes were seen in TLS: {both:?}", subject.name);
    Ok(vec![format!("TLS and nothing else both ways, no text of question or answer in {} bytes", wire.len())])
}

/// That the called side of a peer lets in whom its CA knows, and nobody else; and that its caller asks for a name and
/// a CA. `index` is of free ports.
///
/// # Errors
/// Somebody was let in who must not be, or the right one was not.
pub fn certificates(
    topology: &Topology,
    programs: &Programs,
    running: &Running,
    (trusted, stranger): (&Authority, &Authority),
    index: u16,
) -> Result<Vec<String>> {
    let name = running.peer.name;
    if !running.peer.is_configurable() {
        refuses(topology, &topology.plain, running.tls(), stranger).with_context(|| name.to_owned())?;
        return Ok(vec!["the called side ends the handshake of a foreign client certificate, and of none".to_owned()]);
    }
    let ask = |leaf: Option<&Leaf>| match running.peer.knocker(programs) {
        None => knock(topology, running.tls(), leaf, &trusted.root),
        Some(knocker) => knock_by(topology, &knocker, running, leaf, &trusted.root),
    };
    let right = ask(Some(&trusted.caller))?;
    ensure!(right.stdout == MARKER_ANSWER, "{name}: the right certificate is refused: {right:?}");
    for (who, leaf) in [("a certificate of another CA", Some(&stranger.caller)), ("no certificate", None)] {
        let answer = ask(leaf)?;
        ensure!(!answer.stdout.contains(MARKER_ANSWER), "{name} lets in {who}: {answer:?}");
    }
    // The same product called, with a certificate that its caller must not accept.
    let Authority { called, issuer, .. } = stranger.clone();
    let impostor = Authority { called, issuer, ..trusted.clone() };
    let peer: Peer = running.peer;
    let pair = peer.start(topology, programs, index, trusted, &impostor)?;
    let url = format!("http://{}/marker", pair.target().http);
    let pod = &topology.plain;
    let answer =
        pod.host(&topology.cluster, Seat::Client).exec_in(pod.task(Seat::Client), &["curl", "-sS", "-m", "5", &url])?;
    ensure!(!answer.stdout.contains(MARKER_ANSWER), "{name} talks to a server of another CA: {answer:?}");
    Ok(vec![
        "the called side refuses a client certificate of another CA, and none".to_owned(),
        "the calling side refuses a server certificate of another CA".to_owned(),
    ])
}

/// That an agent ends the handshake of whoever has no certificate of its CA.
///
/// # Errors
/// Somebody was let in.
pub fn agents(topology: &Topology, stranger: &Authority) -> Result<Vec<String>> {
    refuses(topology, &topology.meshed, TUNNELS, stranger)?;
    Ok(vec!["the called agent ends the handshake of a client certificate of another CA, and of none".to_owned()])
}

/// That who takes tunnels on `port` of the far host refuses, with an alert, whoever has no certificate that it trusts.
fn refuses(topology: &Topology, pair: &Pair, port: u16, stranger: &Authority) -> Result<()> {
    let far = pair.address(Seat::Far);
    for leaf in [Some(&stranger.caller), None] {
        let url = format!("https://{far}:{port}/");
        let mut argv = vec!["curl", "-sS", "-k", "-m", "5", "--http2-prior-knowledge", &url];
        let files = leaf.map(|leaf| (leaf.certificate.to_string_lossy(), leaf.key.to_string_lossy()));
        if let Some((certificate, key)) = &files {
            argv.extend(["--cert", certificate, "--key", key]);
        }
        // From the other host, whose own agent has no part in it: it is no task that asks.
        let said = pair.host(&topology.cluster, Seat::Client).exec(&argv)?;
        // 35: the handshake failed; 56: in TLS 1.3 the alert comes after the client's own part of it.
        let alert = said.stderr.contains("alert");
        if said.ok() || !alert {
            bail!("a certificate of another CA was not refused with an alert: {said:?}");
        }
    }
    Ok(())
}

/// Asks the called side over TLS from the client's place, as the other proxy would.
fn knock(topology: &Topology, port: u16, leaf: Option<&Leaf>, root: &Path) -> Result<Output> {
    let far = topology.plain.address(Seat::Far);
    let (resolve, url) = (format!("{CALLED}:{port}:{far}"), format!("https://{CALLED}:{port}/marker"));
    let root = root.to_str().context("temporary paths are UTF-8")?;
    let mut argv = vec!["curl", "-sS", "-m", "5", "--http1.1", "--cacert", root, "--resolve", &resolve, &url];
    let files = leaf.map(|leaf| (leaf.certificate.to_string_lossy(), leaf.key.to_string_lossy()));
    if let Some((certificate, key)) = &files {
        argv.extend(["--cert", certificate, "--key", key]);
    }
    topology.plain.run_beside(&topology.cluster, Seat::Client, &argv)
}

/// The same of a port that wants to be told first whom the bytes are for.
fn knock_by(
    topology: &Topology,
    knocker: &Path,
    running: &Running,
    leaf: Option<&Leaf>,
    root: &Path,
) -> Result<Output> {
    let at = format!("{}:{}", topology.plain.address(Seat::Far), running.tls());
    let (knocker, root, lane) = (knocker.to_string_lossy(), root.to_string_lossy(), running.lane().to_string());
    let mut argv = vec![&*knocker, "knock", &at, CALLED, &root, &lane];
    let files = leaf.map(|leaf| (leaf.certificate.to_string_lossy(), leaf.key.to_string_lossy()));
    if let Some((certificate, key)) = &files {
        argv.extend([&**certificate, &**key]);
    }
    topology.plain.run_beside(&topology.cluster, Seat::Client, &argv)
}
