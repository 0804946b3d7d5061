//! From several sources and the host's own tasks to one snapshot.
//!
//! Order of arrival does not matter; earlier sources in `sets` win; local truth about local tasks beats every
//! registry. Each merge begins with the result of the one before and looks only at the services whose sources changed;
//! what it comes to is the same as from the beginning. Must not know how the sources were asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::OrdMap;

use crate::{
    addr::canonical,
    config::{Enrol, VipRanges},
    id::{ClusterName, ServiceName, SpiffeId, TaskId, TrustDomain},
    model::{Endpoint, EndpointId, Numbers, OnAgentDeath, Protocol, Service, ServicePort, Snapshot, TlsMode, Workload},
    owners::Owners,
    readiness::Gate,
    services::{EndpointEntry, PortEntry, ServiceSet},
    task::Task,
    vip::VipTable,
};

mod index;
mod inherit;
mod known;
mod local;

use known::Known;
pub(crate) use local::says_enrolled;
pub use local::{ENABLED_LABEL, SERVICE_LABEL, enrolled};
use local::{Locals, Member, Served};

/// Everything a snapshot is made from. All but the first three stay the same while an agent runs.
pub struct Sources<'a> {
    /// In order of precedence.
    pub sets: &'a [ServiceSet],
    /// Tasks of this host.
    pub tasks: Arc<Vec<Task>>,
    /// Which of their ports have passed their probes.
    pub gate: &'a Gate,
    pub enrol: &'a Enrol,
    pub cluster: &'a ClusterName,
    pub trust_domain: &'a TrustDomain,
    /// This host's address and tunnel port as other hosts see it.
    pub host: IpAddr,
    pub tunnel: SocketAddr,
    pub zone: Option<&'a str>,
    pub vips: &'a VipRanges,
}

/// A snapshot, and what the next merge begins with.
#[derive(Clone, Debug, Default)]
pub struct Merged {
    pub snapshot: Arc<Snapshot>,
    /// Who has which virtual address, also of services that are gone.
    pub vips: Arc<VipTable>,
    /// Services that are left out, because the range of virtual addresses has no room.
    pub homeless: BTreeSet<ServiceName>,
    known: Option<Known>,
}

/// Ports on which a protocol is spoken that must not be taken for HTTP, or in which the server speaks first: SMTP,
/// MySQL, Galera, PostgreSQL, Redis, Elasticsearch transport, memcached, MongoDB, AMQP, Cassandra, NATS.
const OPAQUE: [u16; 12] = [25, 587, 3306, 4222, 4444, 5432, 5672, 6379, 9042, 9300, 11211, 27017];

impl Merged {
    /// What the first merge begins with.
    pub fn beginning(vips: VipTable, last: Numbers) -> Self {
        let snapshot = Snapshot { last, ..Snapshot::default() };
        Self { snapshot: Arc::new(snapshot), vips: Arc::new(vips), ..Self::default() }
    }
}

/// Makes the next snapshot. Numbers, virtual addresses, and services that did not change, are taken over from `before`.
///
/// It is the snapshot of `before` (same generation) when nothing differs. A service for which the range of virtual
/// addresses has no room is left out.
pub fn merge(before: &Merged, sources: &Sources<'_>) -> Merged {
    let previous = &*before.snapshot;
    let known = Known::after(before.known.as_ref(), sources);
    let mut suspects = known.suspects(before, sources.sets);
    // Somebody may have made room.
    suspects.extend(before.homeless.iter().cloned());
    let definitions: Vec<_> = suspects
        .into_iter()
        .map(|name| (Definition::of(&name, sources.sets, known.locals.ports(&name)), name))
        .collect();
    let vips = virtual_addresses(before, sources, &known, &definitions);

    let mut snapshot = previous.clone();
    let mut homeless = before.homeless.clone();
    let mut changes = Vec::new();
    for (definition, name) in &definitions {
        homeless.remove(name);
        let old = previous.services.get(name);
        let new = match (definition, vips.0.get(name)) {
            (None, _) => None,
            (Some(_), None) => {
                homeless.insert(name.clone());
                None
            }
            (Some(definition), Some(vip)) => {
                let mut ports = ports(sources, name, definition, &known.locals, old);
                for port in &mut ports {
                    let known = old.and_then(|service| Some(service.ports[service.port_index(port.port)?].id));
                    let taken = |n| previous.by_service_number.contains_key(&n);
                    port.id = known.unwrap_or_else(|| next(&mut snapshot.last.service, taken));
                }
                Some(Service {
                    name: name.clone(),
                    vip: *vip,
                    ports,
                    tls: definition.tls.unwrap_or(sources.enrol.tls),
                    on_agent_death: definition.on_agent_death.unwrap_or(sources.enrol.on_agent_death),
                    owners: definition.owners.clone(),
                })
            }
        };
        if old.map(|old| &**old) == new.as_ref() {
            continue;
        }
        let new = new.map(Arc::new);
        match &new {
            Some(new) => drop(snapshot.services.insert(name.clone(), new.clone())),
            None => drop(snapshot.services.remove(name)),
        }
        changes.push(Change { old: old.cloned(), new });
    }
    if before.known.as_ref().is_none_or(|before| !Arc::ptr_eq(&before.members, &known.members)) {
        let workloads = workloads(previous, &known, &mut snapshot.last.workload);
        if workloads != previous.workloads {
            snapshot.by_number = workloads.values().map(|workload| (workload.number, workload.clone())).collect();
            snapshot.workloads = workloads;
        }
    }
    let policy = sources.sets.iter().find_map(|set| set.policy.clone()).unwrap_or_default();
    if policy != previous.policy {
        snapshot.policy = policy;
    }
    let same = changes.is_empty()
        && snapshot.workloads.ptr_eq(&previous.workloads)
        && Arc::ptr_eq(&snapshot.policy, &previous.policy);
    if same {
        return Merged { snapshot: before.snapshot.clone(), vips, homeless, known: Some(known) };
    }
    snapshot.generation += 1;
    index::update(&mut snapshot, previous, &changes);
    Merged { snapshot: Arc::new(snapshot), vips, homeless, known: Some(known) }
}

/// A service that is there, gone, or another than before.
struct Change {
    old: Option<Arc<Service>>,
    new: Option<Arc<Service>>,
}

/// The table with an address for every service that is defined, as far as the range has room.
fn virtual_addresses(
    before: &Merged,
    sources: &Sources<'_>,
    known: &Known,
    definitions: &[(Option<Definition<'_>>, ServiceName)],
) -> Arc<VipTable> {
    let without = |(definition, name): &(Option<_>, _)| definition.is_some() && !before.vips.0.contains_key(name);
    if before.known.is_some() && !definitions.iter().any(without) {
        return before.vips.clone();
    }
    let mut vips = VipTable::clone(&before.vips);
    let names: BTreeSet<_> = known.names().collect();
    vips.assign(names.into_iter(), sources.vips.v4, sources.vips.v6);
    if vips == *before.vips { before.vips.clone() } else { Arc::new(vips) }
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

fn workloads(previous: &Snapshot, known: &Known, last: &mut u32) -> OrdMap<TaskId, Arc<Workload>> {
    let workload = |member: &Member| {
        let task = &known.tasks[member.at];
        let before = previous.workloads.get(&task.id);
        let workload = Workload {
            number: before.map_or_else(|| next(last, |n| previous.by_number.contains_key(&n)), |before| before.number),
            task: task.id.clone(),
            service: member.service.clone(),
            identity: member.identity.clone(),
            mode: task.mode,
        };
        let shared = before.filter(|before| ***before == workload).cloned();
        (task.id.clone(), shared.unwrap_or_else(|| Arc::new(workload)))
    };
    known.members.iter().map(workload).collect()
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
    /// A source has said that it alone counts.
    alone: bool,
    owners: Option<Arc<Owners>>,
}

impl<'a> Definition<'a> {
    /// `None`: no source names the service, and no local task of it has a port. `local` are the ports of those tasks.
    fn of(name: &ServiceName, sets: &'a [ServiceSet], local: Option<&BTreeSet<u16>>) -> Option<Self> {
        let mut definition = Self::said(name, sets, local)?;
        let local = local.is_some_and(|ports| !ports.is_empty());
        definition.owners = Owners::joined(inherit::counting(name.as_str(), sets), local);
        if let Some(owners) = definition.owners.clone() {
            definition.inherit(&owners, sets);
        }
        Some(definition)
    }

    /// The same without what follows from other services.
    fn said(name: &ServiceName, sets: &'a [ServiceSet], local: Option<&BTreeSet<u16>>) -> Option<Self> {
        let mut definition = Self { has_80: local.is_some_and(|ports| ports.contains(&80)), ..Self::default() };
        let mut defined = local.is_some_and(|ports| !ports.is_empty());
        for entry in sets.iter().filter_map(|set| set.services.get(name)) {
            defined = true;
            if definition.alone {
                break;
            }
            definition.alone = entry.alone;
            for port in &entry.ports {
                let merged = definition.ports.entry(port.port).or_insert(*port);
                merged.target = merged.target.or(port.target);
                merged.protocol = merged.protocol.or(port.protocol);
            }
            definition.endpoints.extend(&entry.endpoints);
            definition.tls = definition.tls.or(entry.tls);
            definition.on_agent_death = definition.on_agent_death.or(entry.on_agent_death);
            let is_80 = |e: &EndpointEntry| !e.alias && !e.assumed && e.port.unwrap_or(e.endpoint.addr().port()) == 80;
            definition.has_80 |= entry.endpoints.iter().any(is_80);
        }
        defined.then_some(definition)
    }
}

/// A port while its endpoints are collected.
#[derive(Default)]
struct Draft {
    endpoints: BTreeMap<EndpointId, Arc<Endpoint>>,
    opaque: bool,
}

/// The ports of a service with their endpoints, ordered; without numbers yet. Endpoints that are as they were are shared
/// with the service as it was, `old`.
fn ports(
    sources: &Sources<'_>,
    name: &ServiceName,
    definition: &Definition<'_>,
    locals: &Locals,
    old: Option<&Arc<Service>>,
) -> Vec<ServicePort> {
    let mut drafts: BTreeMap<u16, Draft> = BTreeMap::new();
    for entry in definition.ports.values() {
        drafts.entry(entry.port).or_default().opaque |= OPAQUE.contains(&entry.target.unwrap_or(entry.port));
    }
    for Served { port, target, endpoint } in locals.of(name) {
        let draft = drafts.entry(*port).or_default();
        draft.opaque |= OPAQUE.contains(target);
        draft.endpoints.entry(endpoint.id).or_insert_with(|| endpoint.clone());
    }
    let own = SpiffeId::new(sources.trust_domain, sources.cluster, name).ok();
    let known = known_better(name, definition, locals);
    let mut seen = BTreeSet::new();
    for entry in &definition.endpoints {
        if entry.assumed && known.contains(&entry.endpoint.addr().ip()) {
            continue;
        }
        let Some(port) = port_of(entry, definition) else { continue };
        let Some(endpoint) = registered(sources, own.as_ref(), entry, locals) else { continue };
        if !seen.insert((port, endpoint.id)) {
            continue;
        }
        let draft = drafts.entry(port).or_default();
        draft.opaque |= OPAQUE.contains(&port);
        draft.endpoints.insert(endpoint.id, endpoint);
    }
    let port = |(port, draft): (u16, Draft)| {
        let explicit = definition.ports.get(&port).and_then(|entry| entry.protocol);
        let guessed = if draft.opaque { Protocol::Tcp } else { Protocol::Auto };
        let before = old.and_then(|old| Some(&old.ports[old.port_index(port)?]));
        let shared = |endpoint: Arc<Endpoint>| match before.and_then(|port| port.endpoint(&endpoint.id)) {
            Some(before) if *before == endpoint => before.clone(),
            Some(_) | None => endpoint,
        };
        let endpoints = draft.endpoints.into_values().map(shared).collect();
        ServicePort { id: 0, port, protocol: explicit.unwrap_or(guessed), endpoints }
    };
    drafts.into_iter().map(port).collect()
}

/// Where somebody knows the ports of an endpoint of the service; nothing while no port is assumed.
fn known_better(name: &ServiceName, definition: &Definition<'_>, locals: &Locals) -> BTreeSet<IpAddr> {
    if !definition.endpoints.iter().any(|entry| entry.assumed) {
        return BTreeSet::new();
    }
    let registered = definition.endpoints.iter().filter(|entry| !entry.assumed).map(|entry| entry.endpoint.addr());
    let here = locals.of(name).flat_map(|served| served.endpoint.addresses());
    registered.chain(here).map(|addr| addr.ip()).collect()
}

/// The service port that a registered endpoint serves: the named one, the only one, or the one of its own number.
fn port_of(entry: &EndpointEntry, definition: &Definition<'_>) -> Option<u16> {
    let own = entry.endpoint.addr().port();
    if entry.alias {
        let defined = |port: u16| definition.ports.contains_key(&port).then_some(port);
        return match (entry.port, definition.ports.len()) {
            (_, 0) => (!definition.has_80).then_some(80),
            (None, 1) => definition.ports.keys().next().copied(),
            (Some(_), _) => defined(80),
            (None, _) => defined(80).or(defined(own)),
        };
    }
    match (entry.port, definition.ports.len()) {
        (Some(port), _) => Some(port),
        (None, 0) => Some(own),
        (None, 1) => definition.ports.keys().next().copied(),
        (None, _) => definition.ports.contains_key(&own).then_some(own),
    }
}

/// A registered endpoint. Where it is a task of this host, the task itself is believed, and only its weight and
/// attributes are taken from the registry. `None` when it claims to be behind this host's agent and is not: the registry is stale. `own` is
/// the identity of the service.
fn registered(
    sources: &Sources<'_>,
    own: Option<&SpiffeId>,
    entry: &EndpointEntry,
    locals: &Locals,
) -> Option<Arc<Endpoint>> {
    let listed = &entry.endpoint;
    if let Some(local) = locals.at(listed.addr()) {
        if local.weight == listed.weight && local.attributes == listed.attributes {
            return Some(local.clone());
        }
        let (weight, attributes) = (listed.weight, listed.attributes.clone());
        return Some(Arc::new(Endpoint { weight, attributes, ..Endpoint::clone(local) }));
    }
    match listed.agent() {
        Some(agent) if agent == canonical(sources.tunnel) => None,
        Some(_) if listed.identity.is_none() => {
            Some(Arc::new(Endpoint { identity: own.cloned(), ..Endpoint::clone(listed) }))
        }
        Some(_) | None => Some(listed.clone()),
    }
}

#[cfg(test)]
mod tests;
