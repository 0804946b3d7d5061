//! From a cluster to what a source says about services: each ECS service, the service of the mesh that its tasks belong
//! to where that is another, and each name that Service Connect gives.
//!
//! A task is in the mesh when its container instance says that there is an agent, and the task itself is enrolled. Where
//! its containers have no namespace together (bridge and host mode), each of them is to its host a task of its own, with
//! labels and an identity of its own, and so it is here. Must not know how the cluster was learnt.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::model::{Binding, Checked, Cluster, Connect, Container, Definition, Instance, State, Task, attribute};
use crate::{
    addr::canonical,
    config::{Enrol, ecs::Ecs},
    id::{ClusterName, ServiceName, SpiffeId, TrustDomain},
    instance::{Interned, USUAL_PORT},
    merge::{SERVICE_LABEL, says_enrolled},
    model::Endpoint,
    owners::Owners,
    resolve::of_datacenter,
    services::{Attributes, EndpointEntry, PortEntry, ServiceEntry, ServiceSet},
    task::NetworkMode,
};

/// What this host knows of the mesh, which is the same on all of its hosts.
#[derive(Clone, Debug, PartialEq)]
pub struct Mesh {
    pub trust_domain: TrustDomain,
    pub enrol: Enrol,
    /// Under which names of services are known: `dns.suffixes`, and what belongs to them.
    pub suffixes: Vec<String>,
}

/// A service while it is collected.
#[derive(Default)]
struct Draft {
    ports: BTreeMap<u16, PortEntry>,
    /// By port and address, so that one that several ways lead to is one.
    endpoints: BTreeMap<(Option<u16>, SocketAddr), EndpointEntry>,
    /// Whose tasks the endpoints are; empty while there are none.
    owners: BTreeSet<Vec<ServiceName>>,
    /// The name that this one is made of, in another cluster than the first.
    made_of: Option<ServiceName>,
}

/// What the clusters say about services, in the order of the configuration; the second is what was left out, and why.
///
/// A service is there also when no task of it can be used: it exists, and nobody serves it at the moment.
pub fn entries(clusters: &[(ClusterName, Cluster)], config: &Ecs, mesh: &Mesh) -> (ServiceSet, Vec<String>) {
    let mut drafts: BTreeMap<ServiceName, Draft> = BTreeMap::new();
    let mut problems = BTreeSet::new();
    let mut interned = Interned::default();
    for (place, (name, cluster)) in clusters.iter().enumerate() {
        let view = View { cluster, name, elsewhere: place > 0, config, mesh };
        view.collect(&mut drafts, &mut interned, &mut problems);
    }
    let entry = |(name, draft): (ServiceName, Draft)| ServiceEntry {
        owners: draft.owners(),
        name,
        ports: draft.ports.into_values().collect(),
        endpoints: draft.endpoints.into_values().collect(),
        tls: None,
        on_agent_death: None,
        families: Vec::new(),
        alone: false,
    };
    (ServiceSet::of(drafts.into_iter().map(entry)), problems.into_iter().collect())
}

impl Draft {
    fn owners(&self) -> Option<Arc<Owners>> {
        let made_of = self.made_of.iter().filter(|_| self.owners.is_empty()).map(|name| vec![name.clone()]);
        Owners::of(self.owners.iter().cloned().chain(made_of))
    }
}

struct View<'a> {
    cluster: &'a Cluster,
    name: &'a ClusterName,
    /// Not the first one: its services do not bear the bare name.
    elsewhere: bool,
    config: &'a Ecs,
    mesh: &'a Mesh,
}

impl View<'_> {
    fn collect(
        &self,
        drafts: &mut BTreeMap<ServiceName, Draft>,
        interned: &mut Interned,
        problems: &mut BTreeSet<String>,
    ) {
        for service in self.cluster.services.keys().filter(|service| self.config.wants(service)) {
            match self.named(service) {
                Some(name) => {
                    let made_of = ServiceName::sanitised(service).filter(|_| self.elsewhere);
                    drafts.entry(name).or_default().made_of = made_of;
                }
                None => drop(problems.insert(format!("{}: no DNS label can be made of it", service.escape_debug()))),
            }
        }
        for task in &self.cluster.tasks {
            let Some(service) = task.service.as_ref().filter(|service| self.config.wants(service)) else { continue };
            let Some(definition) = self.cluster.definitions.get(&task.definition) else { continue };
            if !serves(task, definition) {
                continue;
            }
            let endpoints = match self.endpoints(task, service, definition, interned) {
                Ok(endpoints) => endpoints,
                Err(problem) => {
                    problems.insert(format!("{service}: {problem}"));
                    continue;
                }
            };
            let by_ecs = ServiceName::sanitised(service);
            let mut named: BTreeMap<&ServiceName, Vec<&At>> = BTreeMap::new();
            for at in &endpoints {
                let names: BTreeSet<&ServiceName> = by_ecs.iter().chain(&at.service).collect();
                names.into_iter().for_each(|name| named.entry(name).or_default().push(at));
            }
            for (bare, endpoints) in named {
                let Some(name) = self.elsewhere_named(bare.clone()) else { continue };
                let draft = drafts.entry(name).or_default();
                for at in &endpoints {
                    draft.owners.extend(self.owners(bare, by_ecs.as_ref(), at.service.as_ref()));
                }
                for endpoint in as_served(&endpoints) {
                    draft.endpoints.insert((endpoint.port, endpoint.endpoint.addr()), endpoint);
                }
            }
            for connect in self.connects(task, service) {
                self.connect(connect, definition, service, &endpoints, drafts, problems);
            }
        }
    }

    fn named(&self, service: &str) -> Option<ServiceName> {
        self.elsewhere_named(ServiceName::sanitised(service)?)
    }

    fn elsewhere_named(&self, name: ServiceName) -> Option<ServiceName> {
        if self.elsewhere { of_datacenter(&name, &cluster_label(self.name)) } else { Some(name) }
    }

    /// Whose a task is that bears the bare name `name`: its ECS service's, and that of its service in the mesh, which its
    /// identity bears. That one's name leads to nobody else.
    fn owners(
        &self,
        name: &ServiceName,
        by_ecs: Option<&ServiceName>,
        by_mesh: Option<&ServiceName>,
    ) -> Vec<Vec<ServiceName>> {
        let both = [by_ecs, by_mesh].into_iter().flatten();
        let services = both.filter(|_| by_mesh != Some(name)).chain(by_mesh.filter(|own| *own == name));
        let names = |service: &ServiceName| {
            let other = (service != name).then_some(service);
            let here = other.and_then(|other| self.elsewhere_named(other.clone())).filter(|_| self.elsewhere);
            let bare = self.elsewhere.then(|| name.clone());
            here.into_iter().chain(bare).chain(other.cloned()).collect()
        };
        services.map(names).collect()
    }

    fn connects(&self, task: &Task, service: &str) -> &[Connect] {
        let deployments = self.cluster.services.get(service).map(|service| &service.deployments);
        let own = task.deployment.as_ref().and_then(|id| deployments?.get(id));
        own.map_or(&[], |deployment| &deployment.connects)
    }

    /// Each port that a task is reached at.
    fn endpoints(
        &self,
        task: &Task,
        service: &str,
        definition: &Definition,
        interned: &mut Interned,
    ) -> Result<Vec<At>, String> {
        let instance = match &task.instance {
            Some(arn) => Some(self.cluster.instances.get(arn).ok_or_else(|| {
                format!(
                    "ECS does not tell of the container instance {}, so nobody knows whether there is an agent: is it \
                     deregistered?",
                    arn.escape_debug()
                )
            })?),
            None => None,
        };
        let host = instance.map(address).transpose()?.flatten();
        let at_host = || {
            host.ok_or_else(|| {
                format!(
                    "the container instance {} does not say its address, so nobody can reach the host ports of its \
                     tasks: give it the attribute {}",
                    instance.and_then(|it| it.ec2_id.as_deref()).or(task.instance.as_deref()).unwrap_or("-"),
                    attribute::ADDRESS
                )
            })
        };
        let attributes = interned.of(self.attributes(task, service, definition, instance));
        let zone = task.zone.as_deref().filter(|zone| !zone.is_empty()).map(|zone| interned.zone(zone));
        let mut all = Vec::new();
        for part in parts(definition, task) {
            let reached: Vec<(u16, SocketAddr)> = match definition.mode {
                _ if part.ports.is_empty() => Vec::new(),
                NetworkMode::None => Vec::new(),
                NetworkMode::Awsvpc => {
                    let ip = task.address.ok_or("a task has no ENI yet")?;
                    part.ports.iter().map(|(port, _)| (*port, SocketAddr::new(ip, *port))).collect()
                }
                NetworkMode::Bridge | NetworkMode::Host => {
                    let ip = at_host()?;
                    part.ports.iter().map(|(port, host)| (*port, SocketAddr::new(ip, *host))).collect()
                }
            };
            let own = belongs(&part.labels, &definition.family);
            let (agent, identity) = match self.tunnel(task, definition, &part.labels, own.as_ref(), instance, host)? {
                Some((agent, identity)) => (Some(agent), Some(identity)),
                None => (None, None),
            };
            all.extend(reached.into_iter().map(|(port, addr)| At {
                service: own.clone(),
                port,
                endpoint: EndpointEntry {
                    port: None,
                    alias: false,
                    assumed: false,
                    endpoint: Arc::new(Endpoint {
                        zone: zone.clone(),
                        attributes: attributes.clone(),
                        ..Endpoint::listed(addr, agent, identity.clone())
                    }),
                },
            }));
        }
        Ok(all)
    }

    /// Where the tunnel to a part of a task ends and who is there; `None`: it is not in the mesh.
    fn tunnel(
        &self,
        task: &Task,
        definition: &Definition,
        labels: &BTreeMap<String, String>,
        service: Option<&ServiceName>,
        instance: Option<&Instance>,
        host: Option<IpAddr>,
    ) -> Result<Option<(SocketAddr, SpiffeId)>, String> {
        let Some(port) = instance.and_then(|it| it.attributes.get(attribute::TUNNEL_PORT)) else { return Ok(None) };
        let Enrol { default, exclude, .. } = &self.mesh.enrol;
        if exclude.contains(&definition.family) || !says_enrolled(labels).unwrap_or(*default) {
            return Ok(None);
        }
        let port = port.trim().parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| {
            format!("a container instance says that its tunnel port is `{}`, which is none", port.escape_debug())
        })?;
        let ip = match definition.mode {
            NetworkMode::Awsvpc => task.address,
            NetworkMode::Bridge | NetworkMode::Host | NetworkMode::None => host,
        };
        let identity = service.and_then(|service| SpiffeId::new(&self.mesh.trust_domain, self.name, service).ok());
        Ok(ip.map(|ip| canonical(SocketAddr::new(ip, port))).zip(identity))
    }

    fn attributes(
        &self,
        task: &Task,
        service: &str,
        definition: &Definition,
        instance: Option<&Instance>,
    ) -> Attributes {
        let deployment = task.deployment.as_ref();
        let known = self.cluster.services.get(service).zip(deployment);
        let known = known.and_then(|(service, id)| service.deployments.get(id));
        let said = [
            ("ecs-cluster", Some(self.name.as_str().to_owned())),
            ("ecs-service", Some(service.to_owned())),
            ("ecs-family", Some(definition.family.clone())),
            ("ecs-revision", Some(definition.revision.to_string())),
            ("ecs-deployment", deployment.cloned()),
            ("ecs-deployment-status", known.map(|known| known.status.clone())),
            ("ecs-task-set", known.and_then(|known| known.external_id.clone())),
            ("ecs-launch-type", Some(task.launch_type.clone())),
            ("ecs-instance", instance.and_then(|instance| instance.ec2_id.clone())),
        ];
        let said = said.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        let said = said.filter(|(_, value)| !value.is_empty());
        let tags = task.tags.iter().map(|(key, value)| (key.clone(), value.clone()));
        // What ECS says is not to be had otherwise by a tag of the same name.
        Attributes { tags: BTreeSet::new(), meta: tags.chain(said).collect() }
    }

    /// The names that Service Connect gives a port, at the ports that it gives them.
    fn connect(
        &self,
        connect: &Connect,
        definition: &Definition,
        service: &str,
        endpoints: &[At],
        drafts: &mut BTreeMap<ServiceName, Draft>,
        problems: &mut BTreeSet<String>,
    ) {
        let named = definition.ports().find(|port| port.name.as_ref() == Some(&connect.port_name));
        let Some(target) = named else {
            let name = connect.port_name.escape_debug();
            problems.insert(format!("{}: Service Connect names the port {name}, which it has not", definition.family));
            return;
        };
        for (alias, port) in &connect.aliases {
            let Some(bare) = self.alias(alias) else {
                problems.insert(format!(
                    "{}: no name of the mesh can be made of the Service Connect alias {}: add what follows its first \
                     dot to dns.suffixes",
                    definition.family,
                    alias.escape_debug()
                ));
                continue;
            };
            let Some(name) = self.elsewhere_named(bare.clone()) else { continue };
            let draft = drafts.entry(name).or_default();
            let entry = PortEntry { port: *port, target: Some(target.container), protocol: target.protocol };
            draft.ports.entry(*port).or_insert(entry);
            let by_ecs = ServiceName::sanitised(service);
            for at in endpoints.iter().filter(|at| at.port == target.container) {
                draft.owners.extend(self.owners(&bare, by_ecs.as_ref(), at.service.as_ref()));
                let endpoint = EndpointEntry { port: Some(*port), alias: false, ..at.endpoint.clone() };
                draft.endpoints.insert((endpoint.port, endpoint.endpoint.addr()), endpoint);
            }
        }
    }

    /// The service of an alias: a bare label, or one below a suffix that the mesh answers for.
    fn alias(&self, alias: &str) -> Option<ServiceName> {
        let alias = alias.trim_end_matches('.').to_ascii_lowercase();
        match alias.split_once('.') {
            None => alias.parse().ok(),
            Some((label, rest)) if self.mesh.suffixes.iter().any(|suffix| suffix == rest) => label.parse().ok(),
            Some(_) => None,
        }
    }
}

/// What stands for a cluster in the names of its services, where it is not the first one.
pub fn cluster_label(cluster: &ClusterName) -> String {
    cluster.as_str().to_ascii_lowercase()
}

/// Whether a task may be chosen. One with health checks must have passed them.
fn serves(task: &Task, definition: &Definition) -> bool {
    match task.state {
        State::Not | State::Running(Checked::Unhealthy) => false,
        State::Running(Checked::Healthy) => true,
        State::Running(Checked::Unknown) => !definition.is_checked,
    }
}

/// What of a task has a namespace of its own: to its host, that is a task.
struct Part<'a> {
    labels: Cow<'a, BTreeMap<String, String>>,
    /// (container port, port at the address).
    ports: BTreeSet<(u16, u16)>,
}

/// The task as a whole in awsvpc mode, else each of its containers.
fn parts<'a>(definition: &'a Definition, task: &Task) -> Vec<Part<'a>> {
    let own = |container: &Container| container.ports.iter().map(|port| (port.container, port.container)).collect();
    match definition.mode {
        NetworkMode::None => Vec::new(),
        NetworkMode::Awsvpc => {
            let mut labels = BTreeMap::new();
            for (key, value) in definition.containers.iter().flat_map(|container| &container.labels) {
                // The first container wins.
                labels.entry(key.clone()).or_insert_with(|| value.clone());
            }
            let ports = definition.ports().map(|port| (port.container, port.container)).collect();
            vec![Part { labels: Cow::Owned(labels), ports }]
        }
        NetworkMode::Host => {
            let part =
                |container: &'a Container| Part { labels: Cow::Borrowed(&container.labels), ports: own(container) };
            definition.containers.iter().map(part).collect()
        }
        NetworkMode::Bridge => {
            let mut published: BTreeMap<&str, BTreeSet<(u16, u16)>> = BTreeMap::new();
            for Binding { container, port, host_port } in &task.bindings {
                published.entry(container).or_default().insert((*port, *host_port));
            }
            let part = |(name, ports): (&str, BTreeSet<_>)| {
                let container = definition.containers.iter().find(|container| container.name == name);
                // What ECS has added itself is in no definition, and has no labels.
                let labels = container.map_or_else(Cow::default, |container| Cow::Borrowed(&container.labels));
                Part { labels, ports }
            };
            published.into_iter().map(part).collect()
        }
    }
}

/// An endpoint, without the service's port that it serves.
struct At {
    /// The service of the mesh that it belongs to.
    service: Option<ServiceName>,
    /// The container port.
    port: u16,
    endpoint: EndpointEntry,
}

/// Each container port is a port of the service, and the only one is port 80 as well.
fn as_served(endpoints: &[&At]) -> Vec<EndpointEntry> {
    let as_port = |at: &&At, alias| {
        let port = Some(if alias { USUAL_PORT } else { at.port });
        EndpointEntry { port, alias, ..at.endpoint.clone() }
    };
    let mut served: Vec<_> = endpoints.iter().map(|it| as_port(it, false)).collect();
    let containers: BTreeSet<u16> = endpoints.iter().map(|at| at.port).collect();
    if containers.len() == 1 && !containers.contains(&USUAL_PORT) {
        served.extend(endpoints.iter().map(|it| as_port(it, true)));
    }
    served
}

/// The service of the mesh that a task, or a container with a namespace of its own, belongs to, as the agent of its host
/// sees it.
fn belongs(labels: &BTreeMap<String, String>, family: &str) -> Option<ServiceName> {
    let labelled = labels.get(SERVICE_LABEL).and_then(|label| ServiceName::sanitised(label.trim()));
    labelled.or_else(|| ServiceName::sanitised(family))
}

/// The address that a container instance says it has.
fn address(instance: &Instance) -> Result<Option<IpAddr>, String> {
    let Some(text) = instance.attributes.get(attribute::ADDRESS) else { return Ok(None) };
    let ip: Option<IpAddr> = text.trim().parse().ok();
    match ip.filter(|ip| !ip.is_unspecified() && !ip.is_multicast() && !ip.is_loopback()) {
        Some(ip) => Ok(Some(ip.to_canonical())),
        None => Err(format!("a container instance says that it is at `{}`, where nothing is", text.escape_debug())),
    }
}

#[cfg(test)]
mod tests;
