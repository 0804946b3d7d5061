//! What a registry has to be told about this host's tasks, whichever registry it is.
//!
//! The snapshot is the truth: an endpoint of a local task is registered as it stands there, with the health that it has
//! there. Whatever decides about readiness decides it in [`crate::merge`], and is followed here. Must not know any
//! registry's API.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use crate::{
    addr::canonical,
    instance::meta,
    model::{Endpoint, Health, Reach, Service, Snapshot},
    task::{NetworkMode, Task},
};

/// An instance as it has to be registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// `ecs-mesh:<address>:<port>:<task>`: the same after a restart, another for a task that got the port of one before.
    pub id: String,
    /// The registry's name of the service.
    pub name: String,
    pub addr: SocketAddr,
    pub tags: BTreeSet<String>,
    pub meta: BTreeMap<String, String>,
    /// Whether the endpoint is ready.
    pub ready: bool,
}

/// What a registry takes, and what is added to every instance.
#[derive(Clone, Copy, Debug)]
pub struct Form<'a> {
    pub tags: &'a [String],
    /// Most key-value pairs that tasks may add to [`OWN_META`].
    pub meta: usize,
    /// Whether such a pair may be there.
    pub takes: fn(&str, &str) -> bool,
}

/// Key-value pairs of ours that an instance has at most.
pub const OWN_META: usize = 8;

/// Who keeps registrations on behalf of this host, whatever agent process does it.
pub fn owner(host: std::net::IpAddr) -> String {
    format!("ecs-mesh@{host}")
}

/// Labels by which a task, or the container in it, says how it wants to be registered.
pub mod label {
    /// `false`: not at all.
    pub const REGISTER: &str = "ecs-mesh.register";
    /// Tags, with commas between.
    pub const TAGS: &str = "ecs-mesh.tags";
    /// `ecs-mesh.meta.<key>`.
    pub const META: &str = "ecs-mesh.meta.";
}

/// The convention of registrator, as label or as environment variable: `SERVICE_NAME`, `SERVICE_TAGS`,
/// `SERVICE_IGNORE`, and the same for one container port: `SERVICE_<port>_NAME`. What else begins so is meta.
const CONVENTION: &str = "SERVICE_";

/// Everything of this host that has to be registered, by id. `tunnel` is where tunnels to this host end.
///
/// A task that is told to stop is not among it from that moment on.
pub fn desired(
    snapshot: &Snapshot,
    tasks: &[Task],
    tunnel: SocketAddr,
    form: &Form<'_>,
) -> BTreeMap<String, Registration> {
    let tasks: BTreeMap<_, _> = tasks.iter().map(|task| (&task.id, task)).collect();
    // (task, address as registered) to where it is served.
    let mut served: BTreeMap<_, Served<'_>> = BTreeMap::new();
    for service in snapshot.services.values() {
        for (port, endpoint) in service.ports.iter().flat_map(|port| port.endpoints.iter().map(|e| (port.port, e))) {
            let Reach::Local { task, deliver, .. } = &endpoint.reach else { continue };
            let Some(workload) = snapshot.workloads.get(task).filter(|workload| workload.service == service.name)
            else {
                continue;
            };
            if let Some(task) = tasks.get(&workload.task) {
                let new = || Served { service, task, endpoint, target: deliver.port(), ports: BTreeSet::new() };
                served.entry((&workload.task, endpoint.addr())).or_insert_with(new).ports.insert(port);
            }
        }
    }
    // A name for the ports of a task, where it serves several.
    let mut targets: BTreeMap<_, BTreeSet<u16>> = BTreeMap::new();
    for served in served.values() {
        targets.entry(&served.task.id).or_default().insert(served.target);
    }
    let several = |task: &Task| targets.get(&task.id).is_some_and(|targets| targets.len() > 1);
    let wanted = served.values().filter_map(|served| served.registration(several(served.task), tunnel, form));
    wanted.map(|registration| (registration.id.clone(), registration)).collect()
}

/// What registrator's convention says about a container port, else about the whole task: the label, and its value.
pub(crate) fn said<'a>(task: &'a Task, port: u16, key: &str) -> Option<(&'a str, &'a str)> {
    let labels = [format!("{CONVENTION}{port}_{key}"), format!("{CONVENTION}{key}")];
    let said = labels.iter().find_map(|label| task.labels.get_key_value(label));
    said.map(|(label, text)| (label.as_str(), text.trim())).filter(|(_, text)| !text.is_empty())
}

/// The labels of that convention about a port that begin with `part`, without what all of them begin with.
pub(crate) fn about<'a>(task: &'a Task, port: u16, part: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    task.labels.keys().filter_map(move |label| {
        let rest = label.strip_prefix(CONVENTION)?;
        let own = rest.strip_prefix(port.to_string().as_str()).and_then(|rest| rest.strip_prefix('_'));
        Some((label.as_str(), own.unwrap_or(rest).strip_prefix(part)?))
    })
}

struct Served<'a> {
    service: &'a Service,
    task: &'a Task,
    endpoint: &'a Endpoint,
    /// Where the application listens.
    target: u16,
    ports: BTreeSet<u16>,
}

impl Served<'_> {
    fn registration(&self, several: bool, tunnel: SocketAddr, form: &Form<'_>) -> Option<Registration> {
        let Self { service, task, endpoint, target, ports } = self;
        let identity = endpoint.identity.as_ref()?;
        if endpoint.health == Health::Draining || self.is_refused() || !self.is_reachable() {
            return None;
        }
        let name = self.said("NAME").map_or_else(
            || if several { format!("{}-{target}", service.name) } else { service.name.to_string() },
            str::to_owned,
        );
        let agent = match task.mode {
            NetworkMode::Awsvpc => SocketAddr::new(endpoint.addr().ip(), tunnel.port()),
            NetworkMode::Bridge | NetworkMode::Host | NetworkMode::None => canonical(tunnel),
        };
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        let mut meta = self.meta(form);
        for (key, value) in [
            (meta::AGENT, agent.to_string()),
            (meta::IDENTITY, identity.to_string()),
            (meta::OWNER, owner(tunnel.ip())),
            (meta::PORTS, ports.join(",")),
            (meta::SERVICE, service.name.to_string()),
            (meta::TARGET, target.to_string()),
            (meta::TASK, task.id.to_string()),
            (meta::ZONE, endpoint.zone.as_deref().unwrap_or_default().to_owned()),
        ] {
            if !value.is_empty() {
                meta.insert(key.into(), value);
            }
        }
        let listed = |text: &str| {
            let tags = text.split(',').map(str::trim).filter(|tag| !tag.is_empty());
            tags.map(str::to_owned).collect::<Vec<_>>()
        };
        let own = task.labels.get(label::TAGS).map(String::as_str);
        let tags = own.into_iter().chain(self.said("TAGS")).flat_map(listed).chain(form.tags.iter().cloned());
        Some(Registration {
            id: format!("ecs-mesh:{}:{}", endpoint.addr(), task.id),
            name,
            addr: endpoint.addr(),
            tags: tags.collect(),
            meta,
            ready: endpoint.health == Health::Healthy,
        })
    }

    /// What the convention says for the port, else for the task.
    fn said(&self, key: &str) -> Option<&str> {
        said(self.task, self.target, key).map(|(_, text)| text)
    }

    fn is_refused(&self) -> bool {
        let label = self.task.labels.get(label::REGISTER).map(|label| label.trim().to_ascii_lowercase());
        label.is_some_and(|label| matches!(label.as_str(), "false" | "no" | "off" | "0"))
            || self.said("IGNORE").is_some()
    }

    /// An unpublished port of a bridge task has an address that means something on this host only.
    fn is_reachable(&self) -> bool {
        self.task.mode != NetworkMode::Bridge || self.task.address != Some(self.endpoint.addr().ip())
    }

    /// Meta from labels. Ours wins over the convention; what the registry would refuse is left out.
    fn meta(&self, form: &Form<'_>) -> BTreeMap<String, String> {
        let conventional = self.task.labels.iter().filter_map(|(label, value)| {
            let rest = label.strip_prefix(CONVENTION)?;
            let key = match rest.split_once('_') {
                Some((port, key)) if port.parse::<u16>().is_ok() => (port.parse() == Ok(self.target)).then_some(key)?,
                _ => rest,
            };
            let taken = matches!(key, "NAME" | "TAGS" | "IGNORE" | "ID") || key.starts_with("CHECK_");
            (!taken).then(|| (key.to_ascii_lowercase(), value))
        });
        let own = self.task.labels.iter();
        let own = own.filter_map(|(label, value)| Some((label.strip_prefix(label::META)?.to_owned(), value)));
        let allowed = |key: &str, value: &str| !key.starts_with(meta::PREFIX) && (form.takes)(key, value);
        let all: BTreeMap<String, String> =
            conventional.chain(own).map(|(key, value)| (key, value.clone())).filter(|(k, v)| allowed(k, v)).collect();
        all.into_iter().take(form.meta).collect()
    }
}

#[cfg(test)]
mod tests;
