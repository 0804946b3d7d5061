//! What the host's own tasks are to the mesh: who is enrolled, to which service it belongs, where it is reached.
//!
//! Must not know what any registry says about endpoints.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_common::addr::Addr;

use super::{Definition, Sources, known::differing};
use crate::{
    addr::canonical,
    config::Enrol,
    id::{ServiceName, SpiffeId},
    model::{Endpoint, EndpointId, Health, Reach},
    readiness::Gate,
    services::{Attributes, DEFAULT_WEIGHT, PortEntry, ServiceSet},
    task::{ContainerHealth, NetworkMode, Phase, Task},
};

/// Docker label with which a task says whether it is in the mesh: `true` or `false`.
pub const ENABLED_LABEL: &str = "ecs-mesh.enabled";
/// Docker label with which a task names its service.
pub const SERVICE_LABEL: &str = "ecs-mesh.service";

/// An enrolled task, its service and identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Index into the tasks.
    pub(super) at: usize,
    pub(super) service: ServiceName,
    pub(super) identity: SpiffeId,
}

/// A service port that a local task serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) port: u16,
    /// The container port.
    pub(super) target: u16,
    pub(super) endpoint: Arc<Endpoint>,
}

/// Endpoints of local tasks.
#[derive(Clone, Debug, Default)]
pub(super) struct Locals {
    /// Container ports of the tasks of a service.
    ports: BTreeMap<ServiceName, BTreeSet<u16>>,
    by_service: BTreeMap<ServiceName, Vec<Served>>,
    /// By each of their addresses.
    by_address: BTreeMap<Addr, Arc<Endpoint>>,
}

impl Locals {
    /// What the members serve, by the definitions of their services.
    pub(super) fn of_members(members: &[Member], sources: &Sources<'_>) -> Self {
        let mut locals = Self::default();
        for member in members {
            locals.ports.entry(member.service.clone()).or_default().extend(container_ports(&sources.tasks[member.at]));
        }
        // A host port may pass from a stopping task to a running one: who is told to stop comes last.
        let mut ordered: Vec<_> = members.iter().collect();
        ordered.sort_by_key(|member| sources.tasks[member.at].phase);
        let definitions: BTreeMap<_, _> = locals
            .ports
            .iter()
            .filter_map(|(name, ports)| Some((name.clone(), Definition::of(name, sources.sets, Some(ports))?)))
            .collect();
        for member in ordered {
            let Some(definition) = definitions.get(&member.service) else { continue };
            let task = &sources.tasks[member.at];
            for (port, target) in served(task, &definition.ports, definition.has_80) {
                let Some(endpoint) = endpoint(member, target, sources) else { continue };
                for addr in endpoint.addresses() {
                    locals.by_address.entry(addr.into()).or_insert_with(|| endpoint.clone());
                }
                let service = locals.by_service.entry(member.service.clone()).or_default();
                service.push(Served { port, target, endpoint });
            }
        }
        locals
    }

    /// Services of local tasks that have a port.
    pub(super) fn names(&self) -> impl Iterator<Item = &ServiceName> {
        self.ports.iter().filter(|(_, ports)| !ports.is_empty()).map(|(name, _)| name)
    }

    /// Container ports of the tasks of a service.
    pub(super) fn ports(&self, name: &ServiceName) -> Option<&BTreeSet<u16>> {
        self.ports.get(name)
    }

    pub(super) fn of(&self, name: &ServiceName) -> impl Iterator<Item = &Served> {
        self.by_service.get(name).into_iter().flatten()
    }

    pub(super) fn at(&self, addr: SocketAddr) -> Option<&Arc<Endpoint>> {
        self.by_address.get(&addr.into())
    }

    /// Services whose own tasks differ.
    pub(super) fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = ServiceName> {
        let ports = differing(&self.ports, &other.ports);
        ports.chain(differing(&self.by_service, &other.by_service)).cloned()
    }

    /// Addresses that are another endpoint's, or none, in the other.
    pub(super) fn moved(&self, other: &Self) -> BTreeSet<Addr> {
        differing(&self.by_address, &other.by_address).copied().collect()
    }
}

/// Whether a task is in the mesh. An excluded family never is, whatever its label says: the exclusion belongs to the
/// host's operator.
pub fn enrolled(task: &Task, enrol: &Enrol) -> bool {
    let says = says_enrolled(&task.labels);
    task.mode != NetworkMode::None && !enrol.exclude.contains(&task.family) && says.unwrap_or(enrol.default)
}

/// What a task's labels say about whether it is in the mesh. One that is neither true nor false says nothing.
pub(crate) fn says_enrolled(labels: &BTreeMap<String, String>) -> Option<bool> {
    labels.get(ENABLED_LABEL).and_then(|label| match label.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    })
}

/// The enrolled tasks, by task id. A task for which no service name can be made of its family is not among them.
pub(super) fn members(sources: &Sources<'_>) -> Vec<Member> {
    let families = families(sources.sets);
    let tasks = &sources.tasks;
    let mut members: Vec<_> = (0..tasks.len())
        .filter(|at| enrolled(&tasks[*at], sources.enrol))
        .filter_map(|at| {
            let service = service_of(&tasks[at], &families)?;
            let identity = SpiffeId::new(sources.trust_domain, sources.cluster, &service).ok()?;
            Some(Member { at, service, identity })
        })
        .collect();
    members.sort_by(|a, b| tasks[a.at].id.cmp(&tasks[b.at].id));
    members.dedup_by(|b, a| tasks[a.at].id == tasks[b.at].id);
    members
}

fn families(sets: &[ServiceSet]) -> HashMap<&str, &ServiceName> {
    let mut owners = HashMap::new();
    for entry in sets.iter().flat_map(|set| set.services.values()) {
        for family in &entry.families {
            owners.entry(family.as_str()).or_insert(&entry.name);
        }
    }
    owners
}

fn service_of(task: &Task, families: &HashMap<&str, &ServiceName>) -> Option<ServiceName> {
    let labelled = task.labels.get(SERVICE_LABEL).and_then(|label| ServiceName::sanitised(label.trim()));
    labelled
        .or_else(|| families.get(task.family.as_str()).map(|name| (*name).clone()))
        .or_else(|| ServiceName::sanitised(&task.family))
}

/// TCP ports of the task's containers.
fn container_ports(task: &Task) -> BTreeSet<u16> {
    let ports = task.containers.iter().flat_map(|container| {
        container.exposed.iter().copied().chain(container.published.iter().map(|published| published.container_port))
    });
    ports.filter(|port| *port != 0).collect()
}

/// (service port, container port) pairs that the task serves.
///
/// Where the service's ports are defined, they decide. Otherwise each container port is a port of the service, and
/// the only one is port 80 as well, unless `has_80`.
fn served(task: &Task, defined: &BTreeMap<u16, PortEntry>, has_80: bool) -> Vec<(u16, u16)> {
    let known = container_ports(task);
    let only = match (known.first(), known.len()) {
        (Some(only), 1) => Some(*only),
        _ => None,
    };
    if defined.is_empty() {
        let alias = only.filter(|_| !has_80).map(|target| (80, target));
        return known.iter().map(|port| (*port, *port)).chain(alias).collect();
    }
    let target = |entry: &PortEntry| match entry.target {
        Some(target) => Some(target),
        None if known.is_empty() || known.contains(&entry.port) => Some(entry.port),
        None => only,
    };
    defined.values().filter_map(|entry| Some((entry.port, target(entry)?))).collect()
}

/// The task's endpoint at a container port. `None` while the task runs no instruction yet or has no address.
fn endpoint(member: &Member, target: u16, sources: &Sources<'_>) -> Option<Arc<Endpoint>> {
    let task = &sources.tasks[member.at];
    let health = health(task, target, sources.gate)?;
    let (deliver, addr, direct) = match task.mode {
        NetworkMode::Bridge => {
            let deliver = SocketAddr::new(task.address?, target);
            (deliver, published(task, target, sources.host).unwrap_or(deliver), true)
        }
        NetworkMode::Awsvpc => {
            let deliver = SocketAddr::new(task.address?, target);
            (deliver, deliver, false)
        }
        NetworkMode::Host => {
            let deliver = SocketAddr::new(sources.host, target);
            (deliver, deliver, true)
        }
        NetworkMode::None => return None,
    };
    let (deliver, addr) = (canonical(deliver), canonical(addr));
    Some(Arc::new(Endpoint {
        id: EndpointId::of(addr),
        reach: Reach::Local { task: task.id.clone(), deliver, direct },
        identity: Some(member.identity.clone()),
        health,
        weight: DEFAULT_WEIGHT,
        zone: sources.zone.map(Arc::from),
        attributes: Attributes::none(),
    }))
}

/// Whether the container port may be called. Docker's word comes first: a task that it calls ill is not asked.
fn health(task: &Task, target: u16, gate: &Gate) -> Option<Health> {
    let well = |health: ContainerHealth| match health {
        ContainerHealth::Healthy => true,
        ContainerHealth::Starting | ContainerHealth::Unhealthy => false,
    };
    match task.phase {
        Phase::Created => None,
        Phase::Running if task.containers.iter().filter_map(|c| c.health).all(well) && gate.admits(task, target) => {
            Some(Health::Healthy)
        }
        Phase::Running => Some(Health::Unhealthy),
        Phase::Stopping => Some(Health::Draining),
    }
}

/// Where other hosts reach a published container port. One published on loopback only is reached by nobody else.
fn published(task: &Task, target: u16, host: IpAddr) -> Option<SocketAddr> {
    let all = task.containers.iter().flat_map(|container| &container.published);
    all.filter(|published| published.container_port == target && published.host.port() != 0)
        .map(|published| canonical(published.host))
        .filter(|addr| !addr.ip().is_loopback())
        // Docker publishes for both families, not always on the same port: the host's own family first.
        .min_by_key(|addr| (addr.is_ipv4() != host.is_ipv4(), *addr))
        .map(|addr| if addr.ip().is_unspecified() { SocketAddr::new(host, addr.port()) } else { addr })
}
