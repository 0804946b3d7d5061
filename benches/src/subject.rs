//! What is measured: no mesh, our agents in each of their ways, and every peer that runs.
//!
//! It knows which work a subject can do. It must not know how work is done or what came out.

use std::collections::BTreeSet;

use anyhow::Result;

use crate::{
    agents::Agents,
    load::{Target, Work},
    peers::{Layer, Running},
    topology::{BULK, ECHO, FAR, HTTP, HTTP_AS_BYTES, HTTP2, HTTP2_AS_BYTES, NEAR, Seat, Topology},
};

/// No mesh, from host to host and on one host.
pub const DIRECT: &str = "direct";
pub const DIRECT_NEAR: &str = "direct-near";
/// Ours across hosts: requests, bytes.
pub const OURS_L7: &str = "ecs-mesh";
pub const OURS_L4: &str = "ecs-mesh-tcp";
/// Ours on one host: requests through one proxy, bytes through none.
pub const OURS_NEAR_L7: &str = "ecs-mesh-near";
pub const OURS_NEAR_L4: &str = "ecs-mesh-near-tcp";

const BYTES_ACROSS: [Work; 6] = [Work::Http, Work::Paced, Work::Large, Work::Fresh, Work::Grpc, Work::Bulk];
const REQUESTS: [Work; 5] = [Work::Http, Work::Paced, Work::Large, Work::Fresh, Work::Grpc];
const BYTES_NEAR: [Work; 8] = Work::ALL;

/// Whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    NoMesh,
    Ours,
    Peer(Layer),
}

/// One thing to measure.
#[derive(Clone, Debug)]
pub struct Subject {
    pub name: &'static str,
    pub kind: Kind,
    /// Whether its client is the one on the hosts with agents.
    pub meshed: bool,
    pub client: Seat,
    pub target: Target,
    pub works: &'static [Work],
    /// The processes that carry the work between client and server.
    pub pids: BTreeSet<u32>,
}

/// All of them, in the order of the tables.
///
/// # Errors
/// A proxy has ended already.
pub fn all(topology: &Topology, agents: &Agents, peers: &[Running]) -> Result<Vec<Subject>> {
    let near = topology.plain.address(Seat::Near).to_string();
    let far = topology.plain.address(Seat::Far).to_string();
    let mut subjects = vec![
        no_mesh(DIRECT, &far, &BYTES_ACROSS),
        ours(OURS_L7, target(FAR, HTTP, HTTP2), &REQUESTS, agents)?,
        ours(OURS_L4, target(FAR, HTTP_AS_BYTES, HTTP2_AS_BYTES), &BYTES_ACROSS, agents)?,
    ];
    for peer in peers {
        subjects.push(Subject {
            name: peer.peer.name,
            kind: Kind::Peer(peer.peer.layer),
            meshed: false,
            client: Seat::Client,
            target: peer.target(),
            works: if peer.peer.layer == Layer::L4 { &BYTES_ACROSS } else { &REQUESTS },
            pids: peer.pids()?,
        });
    }
    subjects.push(no_mesh(DIRECT_NEAR, &near, &BYTES_NEAR));
    subjects.push(ours(OURS_NEAR_L7, target(NEAR, HTTP, HTTP2), &REQUESTS, agents)?);
    subjects.push(ours(OURS_NEAR_L4, target(NEAR, HTTP_AS_BYTES, HTTP2_AS_BYTES), &BYTES_NEAR, agents)?);
    Ok(subjects)
}

fn no_mesh(name: &'static str, host: &str, works: &'static [Work]) -> Subject {
    let target = target(host, HTTP, HTTP2);
    Subject { name, kind: Kind::NoMesh, meshed: false, client: client(name), target, works, pids: BTreeSet::new() }
}

fn ours(name: &'static str, target: Target, works: &'static [Work], agents: &Agents) -> Result<Subject> {
    Ok(Subject { name, kind: Kind::Ours, meshed: true, client: client(name), target, works, pids: agents.pids()? })
}

/// Whether client and server are on one host.
#[must_use]
pub fn is_near(name: &str) -> bool {
    [DIRECT_NEAR, OURS_NEAR_L4, OURS_NEAR_L7].contains(&name)
}

fn client(name: &str) -> Seat {
    if is_near(name) { Seat::Neighbour } else { Seat::Client }
}

fn target(host: &str, http: u16, http2: u16) -> Target {
    Target {
        http: format!("{host}:{http}"),
        http2: format!("{host}:{http2}"),
        bulk: Some((host.to_owned(), BULK)),
        echo: Some(format!("{host}:{ECHO}")),
    }
}
