//! From several sources and the host's own tasks to one snapshot.
//!
//! Order of arrival does not matter; earlier sources in `sets` win; local truth about local tasks beats every
//! registry. Must not know how the sources were asked.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    addr::canonical,
    config::Enrol,
    id::{ClusterName, ServiceName, SpiffeId, TaskId, TrustDomain},
    model::{
        Endpoint, EndpointId, Health, OnAgentDeath, Protocol, Reach, Service, ServicePort, Snapshot, TlsMode, Workload,
    },
    services::{EndpointEntry, PortEntry, ServiceSet},
    task::Task,
    vip::VipTable,
};

mod index;
mod local;

use local::Member;
pub use local::{ENABLED_LABEL, SERVICE_LABEL, enrolled};

/// Everything a snapshot is made from.
pub struct Sources<'a> {
    /// In order of precedence.
    pub sets: &'a [ServiceSet],
    /// Tasks of this host.
    pub tasks: &'a [Task],
    pub enrol: &'a Enrol,
    pub cluster: &'a ClusterName,
    pub trust_domain: &'a TrustDomain,
    /// This host's address and tunnel port as other hosts see it.
    pub host: IpAddr,
    pub tunnel: SocketAddr,
    pub zone: Option<&'a str>,
}

/// Ports on which a protocol is spoken that must not be taken for HTTP, or in which the server speaks first: SMTP,
/// MySQL, Galera, PostgreSQL, Redis, Elasticsearch transport, memcached, MongoDB, AMQP, Cassandra, NATS.
const OPAQUE: [u16; 12] = [25, 587, 3306, 4222, 4444, 5432, 5672, 6379, 9042, 9300, 11211, 27017];

/// The services of a snapshot made from these sources: each needs a virtual address before [`merge`].
pub fn names(sources: &Sources<'_>) -> BTreeSet<ServiceName> {
    let members = local::members(sources);
    definitions(sources, &members).into_keys().collect()
}

/// Makes the next snapshot. Numbers, and services that did not change, are taken over from `previous`.
///
/// Returns `previous` unchanged (same generation) when nothing differs. A service without a virtual address in `vips`
/// is left out: its range has no room.
pub fn merge(previous: &Snapshot, sources: &Sources<'_>, vips: &VipTable) -> Snapshot {
    let members = local::members(sources);
    let mut last = previous.last;
    let workloads = workloads(previous, &members, &mut last.workload);
    let definitions = definitions(sources, &members);
    let locals = local_endpoints(sources, &members, &definitions);
    let mut services = BTreeMap::new();
    for (name, definition) in &definitions {
        let Some(vip) = vips.0.get(name) else { continue };
        let before = previous.services.get(name);
        let mut ports = ports(sources, name, definition, &locals);
        for port in &mut ports {
            let known = before.and_then(|service| Some(service.ports[service.port_index(port.port)?].id));
            port.id = known.unwrap_or_else(|| next(&mut last.service, |n| previous.by_service_number.contains_key(&n)));
        }
        let service = Service {
            name: name.clone(),
            vip: *vip,
            ports,
            tls: definition.tls.unwrap_or(sources.enrol.tls),
            on_agent_death: definition.on_agent_death.unwrap_or(sources.enrol.on_agent_death),
        };
        let shared = before.filter(|before| ***before == service).cloned();
        services.insert(name.clone(), shared.unwrap_or_else(|| Arc::new(service)));
    }
    let policy = sources.sets.iter().find_map(|set| set.policy.as_ref());
    let policy = match policy {
        Some(policy) if *policy == *previous.policy => previous.policy.clone(),
        Some(policy) => Arc::new(policy.clone()),
        None if *previous.policy == Default::default() => previous.policy.clone(),
        None => Arc::default(),
    };
    if services == previous.services && workloads == previous.workloads && policy == previous.policy {
        return previous.clone();
    }
    let mut snapshot = Snapshot {
        generation: previous.generation + 1,
        by_number: workloads.values().map(|workload| (workload.number, workload.clone())).collect(),
        services,
        workloads,
        policy,
        last,
        ..Snapshot::default()
    };
    index::fill(&mut snapshot, previous);
    snapshot
}

/// The next number that nobody has. Numbers go up, so that one which was given back stays unused for long.
fn next(last: &mut u32, taken: impl Fn(u32) -> bool) -> u32 {
    loop {
        *last = last.wrapping_add(1);
        if *last != 0 && !taken(*last) {
            return *last;
        }
    }
}

fn workloads(previous: &Snapshot, members: &[Member<'_>], last: &mut u32) -> BTreeMap<TaskId, Arc<Workload>> {
    let mut workloads = BTreeMap::new();
    for member in members {
        let before = previous.workloads.get(&member.task.id);
        let workload = Workload {
            number: before.map_or_else(|| next(last, |n| previous.by_number.contains_key(&n)), |before| before.number),
            task: member.task.id.clone(),
            service: member.service.clone(),
            identity: member.identity.clone(),
            mode: member.task.mode,
        };
        let shared = before.filter(|before| ***before == workload).cloned();
        workloads.insert(member.task.id.clone(), shared.unwrap_or_else(|| Arc::new(workload)));
    }
    workloads
}

/// What all sources together say about one service.
#[derive(Default)]
struct Definition<'a> {
    ports: BTreeMap<u16, PortEntry>,
    endpoints: Vec<&'a EndpointEntry>,
    tls: Option<TlsMode>,
    on_agent_death: Option<OnAgentDeath>,
    /// Whether somebody really serves port 80, so that it is no alias.
    has_80: bool,
}

/// Every service that a source names, and every service of a local task that has a port.
fn definitions<'a>(sources: &Sources<'a>, members: &[Member<'_>]) -> BTreeMap<ServiceName, Definition<'a>> {
    let mut definitions: BTreeMap<ServiceName, Definition<'a>> = BTreeMap::new();
    for entry in sources.sets.iter().flat_map(|set| &set.services) {
        let definition = definitions.entry(entry.name.clone()).or_default();
        for port in &entry.ports {
            let merged = definition.ports.entry(port.port).or_insert(*port);
            merged.target = merged.target.or(port.target);
            merged.protocol = merged.protocol.or(port.protocol);
        }
        definition.endpoints.extend(&entry.endpoints);
        definition.tls = definition.tls.or(entry.tls);
        definition.on_agent_death = definition.on_agent_death.or(entry.on_agent_death);
        definition.has_80 |= entry.endpoints.iter().any(|e| e.port.unwrap_or(e.addr.port()) == 80);
    }
    for member in members {
        let ports = local::container_ports(member.task);
        if !ports.is_empty() {
            definitions.entry(member.service.clone()).or_default().has_80 |= ports.contains(&80);
        }
    }
    definitions
}

/// A service port that a local task serves.
struct Served {
    port: u16,
    /// The container port.
    target: u16,
    endpoint: Arc<Endpoint>,
}

/// Endpoints of local tasks.
#[derive(Default)]
struct Locals<'a> {
    by_service: HashMap<&'a ServiceName, Vec<Served>>,
    /// By each of their addresses.
    by_address: HashMap<SocketAddr, Arc<Endpoint>>,
}

fn local_endpoints<'a>(
    sources: &Sources<'_>,
    members: &'a [Member<'_>],
    definitions: &BTreeMap<ServiceName, Definition<'_>>,
) -> Locals<'a> {
    let mut locals = Locals::default();
    // A host port may pass from a stopping task to a running one: who is told to stop comes last.
    let mut ordered: Vec<_> = members.iter().collect();
    ordered.sort_by_key(|member| member.task.phase);
    for member in ordered {
        let Some(definition) = definitions.get(&member.service) else { continue };
        for (port, target) in local::served(member.task, &definition.ports, definition.has_80) {
            let Some(endpoint) = local::endpoint(member, target, sources) else { continue };
            if let Reach::Local { deliver, .. } = endpoint.reach {
                locals.by_address.entry(deliver).or_insert_with(|| endpoint.clone());
            }
            locals.by_address.entry(endpoint.addr).or_insert_with(|| endpoint.clone());
            locals.by_service.entry(&member.service).or_default().push(Served { port, target, endpoint });
        }
    }
    locals
}

/// A port while its endpoints are collected.
#[derive(Default)]
struct Draft {
    endpoints: BTreeMap<EndpointId, Arc<Endpoint>>,
    opaque: bool,
}

/// The ports of a service with their endpoints, ordered; without numbers yet.
fn ports(
    sources: &Sources<'_>,
    name: &ServiceName,
    definition: &Definition<'_>,
    locals: &Locals<'_>,
) -> Vec<ServicePort> {
    let mut drafts: BTreeMap<u16, Draft> = BTreeMap::new();
    for entry in definition.ports.values() {
        drafts.entry(entry.port).or_default().opaque |= OPAQUE.contains(&entry.target.unwrap_or(entry.port));
    }
    for Served { port, target, endpoint } in locals.by_service.get(name).into_iter().flatten() {
        let draft = drafts.entry(*port).or_default();
        draft.opaque |= OPAQUE.contains(target);
        draft.endpoints.entry(endpoint.id.clone()).or_insert_with(|| endpoint.clone());
    }
    let mut seen = HashSet::new();
    for entry in &definition.endpoints {
        let Some(port) = port_of(entry, definition) else { continue };
        let Some(endpoint) = registered(sources, name, entry, locals) else { continue };
        if !seen.insert((port, endpoint.id.clone())) {
            continue;
        }
        let draft = drafts.entry(port).or_default();
        draft.opaque |= OPAQUE.contains(&port);
        draft.endpoints.insert(endpoint.id.clone(), endpoint);
    }
    let port = |(port, draft): (u16, Draft)| {
        let explicit = definition.ports.get(&port).and_then(|entry| entry.protocol);
        let guessed = if draft.opaque { Protocol::Tcp } else { Protocol::Auto };
        let endpoints = draft.endpoints.into_values().collect();
        ServicePort { id: 0, port, protocol: explicit.unwrap_or(guessed), endpoints }
    };
    drafts.into_iter().map(port).collect()
}

/// The service port that a registered endpoint serves: the named one, the only one, or the one of its own number.
fn port_of(entry: &EndpointEntry, definition: &Definition<'_>) -> Option<u16> {
    let own = entry.addr.port();
    match (entry.port, definition.ports.len()) {
        (Some(port), _) => Some(port),
        (None, 0) => Some(own),
        (None, 1) => definition.ports.keys().next().copied(),
        (None, _) => definition.ports.contains_key(&own).then_some(own),
    }
}

/// A registered endpoint. Where it is a task of this host, the task itself is believed, and only its weight is taken
/// from the registry. `None` when it claims to be behind this host's agent and is not: the registry is stale.
fn registered(
    sources: &Sources<'_>,
    name: &ServiceName,
    entry: &EndpointEntry,
    locals: &Locals<'_>,
) -> Option<Arc<Endpoint>> {
    let addr = canonical(entry.addr);
    if let Some(local) = locals.by_address.get(&addr) {
        if local.weight == entry.weight {
            return Some(local.clone());
        }
        return Some(Arc::new(Endpoint { weight: entry.weight, ..Endpoint::clone(local) }));
    }
    let agent = entry.agent.map(canonical);
    if agent == Some(canonical(sources.tunnel)) {
        return None;
    }
    let own = || SpiffeId::new(sources.trust_domain, sources.cluster, name).ok();
    Some(Arc::new(Endpoint {
        id: EndpointId::of(addr),
        addr,
        identity: agent.and_then(|_| entry.identity.clone().or_else(own)),
        reach: agent.map_or(Reach::Plaintext, |agent| Reach::Tunnel { agent }),
        health: Health::Healthy,
        weight: entry.weight,
        zone: entry.zone.as_deref().map(Arc::from),
        task: None,
    }))
}

#[cfg(test)]
mod tests;
