//! What would happen to a connection now, and why: the same pure decision as the proxy's, with its real loads, and
//! no effect.
//!
//! Must not know how the question travelled. It decides nothing itself; it only finds out who asks, and for which
//! address.

use std::net::{IpAddr, SocketAddr};

use mesh_common::maps::{self, EndpointKey, GrantKey};
use mesh_core::{
    addr::OrigDst,
    dataplane,
    model::{EndpointId, Protocol, Service, Snapshot, Workload},
    plan::{self, Outbound},
    resolve::{self, Answer, Naming, Question},
    task::NetworkMode,
};

use super::Handles;
use crate::api::{self, Explain, Failure, Verdict};

/// The port of a name that is asked about without one, where the service has several.
const HTTP: u16 = 80;

/// The question as asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// A task id, the beginning of one, or a service with a task on this host.
    source: String,
    /// `host`, `host:port`, `ip`, `ip:port` or `[ip]:port`.
    to: String,
}

/// Where `to` leads, before the mesh is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct To<'a> {
    host: Host<'a>,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host<'a> {
    Ip(IpAddr),
    Name(&'a str),
}

impl Asked {
    /// Reads the query of a URI. Both keys are needed, each once, and no other.
    pub(super) fn parse(query: &str) -> Result<Self, Failure> {
        let (mut source, mut to) = (None, None);
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let place = match &*key {
                "source" => &mut source,
                "to" => &mut to,
                other => return Err(not_understood(format!("no parameter `{other}`"))),
            };
            if value.is_empty() || place.replace(value.into_owned()).is_some() {
                return Err(not_understood(format!("parameter `{key}` is empty or given twice")));
            }
        }
        match (source, to) {
            (Some(source), Some(to)) => Ok(Self { source, to }),
            _ => Err(not_understood("`source` and `to` are both needed".into())),
        }
    }
}

/// Answers the question from one snapshot.
pub(super) fn explain(handles: &Handles, snapshot: &Snapshot, asked: &Asked) -> Result<Explain, Failure> {
    let mut reasons = Vec::new();
    let source = find_source(snapshot, &asked.source, &mut reasons)?;
    let to = parse_to(&asked.to)?;
    let (destination, verdict) = match find_destination(handles, snapshot, &to, &mut reasons)? {
        Err(verdict) => (None, verdict),
        Ok(dst) => (Some(dst), decide(handles, snapshot, source, dst, &mut reasons)),
    };
    Ok(Explain {
        question: api::Question {
            source: source.task.to_string(),
            source_service: source.service.to_string(),
            source_identity: source.identity.to_string(),
            to: asked.to.clone(),
            destination,
        },
        generation: snapshot.generation,
        verdict,
        reasons,
    })
}

fn decide(
    handles: &Handles,
    snapshot: &Snapshot,
    source: &Workload,
    dst: SocketAddr,
    reasons: &mut Vec<String>,
) -> Verdict {
    let virtual_address = match dst.ip() {
        IpAddr::V4(ip) => handles.vips.v4.contains(&ip),
        IpAddr::V6(ip) => handles.vips.v6.contains(&ip),
    };
    if !virtual_address && snapshot.target(dst).is_none() {
        reasons.push(format!("{dst} is neither a virtual address nor a known endpoint: the hooks leave it alone"));
        return Verdict::Pass;
    }
    if let Some(verdict) = direct(snapshot, source, dst, reasons) {
        return verdict;
    }
    let load = |endpoint: &EndpointId| (handles.load)(endpoint);
    let ask =
        Outbound { source, dst: OrigDst(dst), tried: &[], load: &load, now: (handles.now)(), draw: (handles.draw)() };
    match plan::explain(snapshot, &ask) {
        Ok(plan) => {
            reasons.extend(plan.reasons.iter().map(|reason| reason.0.clone()));
            Verdict::plan(&plan)
        }
        Err(refused) => {
            reasons.extend(refused.reasons.iter().map(|reason| reason.0.clone()));
            Verdict::refusal(refused.refusal)
        }
    }
}

/// Whether the hooks connect the task without the agent, read from the very image that their maps are written from.
fn direct(snapshot: &Snapshot, source: &Workload, dst: SocketAddr, reasons: &mut Vec<String>) -> Option<Verdict> {
    // Other tasks of the host are reached from the bridge and from the host itself, not from a task's own ENI.
    let near = match source.mode {
        NetworkMode::Bridge | NetworkMode::Host => true,
        NetworkMode::Awsvpc | NetworkMode::None => false,
    };
    let (service, port) = plan::destination(snapshot, OrigDst(dst)).ok()?;
    if !near || service.ports[port].protocol != Protocol::Tcp {
        return None;
    }
    let image = dataplane::image_at(snapshot, dst);
    let entry = image.services.get(&dst.into())?;
    let opaque = entry.flags & maps::service::OPAQUE != 0;
    let open = entry.flags & maps::service::GRANTED_ONLY == 0;
    let granted = open || image.grants.contains_key(&GrantKey { workload: source.number, service: entry.id });
    if !opaque || entry.local == 0 || !granted {
        return None;
    }
    reasons.push(format!(
        "port {} of service {} is a byte stream, so no request needs to be seen",
        service.ports[port].port, service.name
    ));
    reasons.push(match open {
        true => "the policy allows everybody to call it".into(),
        false => format!("the policy allows {} to call it", source.identity),
    });
    reasons.push(format!("{} of its endpoints can be connected to on this host", entry.local));
    let slot = |slot| image.endpoints.get(&EndpointKey { service: entry.id, slot });
    Some(Verdict::Direct {
        service: service.name.to_string(),
        port: service.ports[port].port,
        endpoints: (0..entry.local).filter_map(slot).map(|endpoint| endpoint.addr.into()).collect(),
    })
}

/// The task that asks: by its id, by the beginning of its id, or any task of a service.
fn find_source<'a>(snapshot: &'a Snapshot, source: &str, reasons: &mut Vec<String>) -> Result<&'a Workload, Failure> {
    let mut of_service = snapshot.workloads.values().filter(|w| w.service.as_str() == source);
    if let Some(first) = of_service.next() {
        reasons.push(format!("source: task {} of service {source} on this host", first.task));
        return Ok(first);
    }
    // An exact id sorts before all longer ones that begin with it.
    let mut by_id = snapshot.workloads.values().filter(|w| w.task.as_str().starts_with(source));
    match (by_id.next(), by_id.next()) {
        (Some(found), other) if other.is_none() || found.task.as_str() == source => {
            reasons.push(format!("source: task {}, service {}", found.task, found.service));
            Ok(found)
        }
        (Some(_), _) => Err(Failure {
            error: format!("several tasks of this host have ids that begin with `{source}`"),
            remedy: "give more of the id".into(),
        }),
        (None, _) => Err(Failure {
            error: format!("no enrolled task of this host is, or belongs to, `{source}`"),
            remedy: "take a task or service from `mesh-agent status`, or ask on the host where the task runs".into(),
        }),
    }
}

fn parse_to(to: &str) -> Result<To<'_>, Failure> {
    if let Ok(addr) = to.parse::<SocketAddr>() {
        // A v4-mapped destination is the IPv4 one, as in the hooks.
        return Ok(To { host: Host::Ip(addr.ip().to_canonical()), port: Some(addr.port()) });
    }
    if let Ok(ip) = to.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        return Ok(To { host: Host::Ip(ip.to_canonical()), port: None });
    }
    let (host, port) = match to.rsplit_once(':') {
        None => (to, None),
        Some((host, port)) => match port.parse::<u16>() {
            Ok(port) if port != 0 => (host, Some(port)),
            Ok(_) | Err(_) => return Err(not_understood(format!("`{port}` in `{to}` is no port"))),
        },
    };
    if host.is_empty() || host.contains([':', '/', ' ']) {
        return Err(not_understood(format!("`{to}` is neither a name nor an address")));
    }
    Ok(To { host: Host::Name(host), port })
}

/// The address that the application would connect to; `Err` where it would not come to a connection, or to one that
/// the mesh cannot know.
fn find_destination(
    handles: &Handles,
    snapshot: &Snapshot,
    to: &To<'_>,
    reasons: &mut Vec<String>,
) -> Result<Result<SocketAddr, Verdict>, Failure> {
    let name = match to.host {
        Host::Ip(ip) => {
            let port = match to.port {
                Some(port) => port,
                None => the_port(snapshot.service_at(ip).map(|s| &**s))?,
            };
            return Ok(Ok(SocketAddr::new(ip, port)));
        }
        Host::Name(name) => name,
    };
    let naming = Naming::of(&handles.dns);
    if let Some(service) = resolve::service(snapshot, &naming, name) {
        let port = match to.port {
            Some(port) => port,
            None => the_port(Some(service))?,
        };
        reasons.push(format!("name: `{name}` is service {}, virtual address {}", service.name, service.vip.v4));
        return Ok(Ok(SocketAddr::new(service.vip.v4.into(), port)));
    }
    Ok(Err(match resolve::answer(snapshot, &naming, name, Question::A) {
        Answer::NoSuchName { .. } => {
            reasons.push(format!("name: `{name}` has a suffix of the mesh, and no service bears it"));
            Verdict::NoSuchName
        }
        Answer::Forward
        | Answer::NoData { .. }
        | Answer::Addresses { .. }
        | Answer::Services { .. }
        | Answer::Name { .. } => {
            reasons.push(format!(
                "name: `{name}` is no name of the mesh: the application's own resolver is asked, and what it answers \
                 is left alone unless it is a known endpoint; ask again with that address"
            ));
            Verdict::Pass
        }
    }))
}

/// The port that is meant where none was given.
fn the_port(service: Option<&Service>) -> Result<u16, Failure> {
    match service.map(|service| service.ports.as_slice()) {
        Some([only]) => Ok(only.port),
        Some(ports) if ports.iter().any(|port| port.port == HTTP) => Ok(HTTP),
        Some(ports) => {
            let ports: Vec<_> = ports.iter().map(|port| port.port.to_string()).collect();
            Err(not_understood(format!("the service has several ports or none ({})", ports.join(", "))))
        }
        None => Err(not_understood("an address outside the mesh needs a port".into())),
    }
}

fn not_understood(error: String) -> Failure {
    Failure { error, remedy: "ask with source=<task id or service> and to=<name or address>[:<port>]".into() }
}

#[cfg(test)]
mod tests;
