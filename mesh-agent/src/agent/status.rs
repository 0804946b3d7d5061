//! What `mesh-agent status` shows, gathered from those who know it.
//!
//! Only reads; must not know how the document is served.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use mesh_core::{
    config::Config,
    id::{ServiceName, TaskId},
    task::Task,
};
use tokio::sync::watch;

use super::host::HostFacts;
use crate::{
    api,
    discovery::{Figures, Registered, SourceStatus},
    identity::Identities,
    readiness::LocalPort,
    state::Published,
    sys::maps::{Counters, Heart},
};

/// Read-only handles to everything that has a status.
pub(super) struct StatusSource {
    pub config: Arc<Config>,
    pub host: HostFacts,
    pub started: Instant,
    pub published: Published,
    pub identities: Identities,
    pub sources: watch::Receiver<Vec<SourceStatus>>,
    /// With whom tasks of this host are registered, and how that goes.
    pub registered: Vec<(&'static str, watch::Receiver<Registered>)>,
    pub tasks: watch::Receiver<Arc<Vec<Task>>>,
    /// How the ports of these are doing.
    pub ports: watch::Receiver<Vec<LocalPort>>,
    pub connected: watch::Receiver<bool>,
    pub armed: watch::Receiver<Option<BTreeSet<TaskId>>>,
    pub counters: Counters,
    pub heart: Heart,
}

impl StatusSource {
    /// Whether the agent does its job, or what is still missing.
    ///
    /// # Errors
    /// What it waits for, in sentences.
    pub(super) fn ready(&self) -> Result<(), Vec<String>> {
        let mut missing = Vec::new();
        if !*self.connected.borrow() {
            missing.push(format!("docker does not answer on {}", self.config.docker.socket.display()));
        }
        if self.armed.borrow().is_none() {
            missing.push("the tasks of this host are not armed yet".into());
        }
        if missing.is_empty() { Ok(()) } else { Err(missing) }
    }

    /// What the hooks have counted, as the metrics want it.
    pub(super) fn counters(&self) -> Vec<u64> {
        self.counters.read().map(Vec::from).unwrap_or_default()
    }

    /// The whole document.
    pub(super) fn status(&self) -> api::Status {
        let waiting_for = self.ready().err().unwrap_or_default();
        let snapshot = self.published.load();
        let limit = self.config.kernel.heartbeat_limit;
        let age = self.heart.age();
        api::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            abi: mesh_common::ABI_VERSION,
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            host: Some(self.host.address).filter(|address: &IpAddr| !address.is_unspecified()),
            cluster: self.host.cluster.as_str().into(),
            trust_domain: self.config.identity.trust_domain.as_str().into(),
            generation: snapshot.generation,
            ready: waiting_for.is_empty(),
            waiting_for,
            agent: api::AgentHealth {
                alive: age.is_some_and(|age| age <= limit),
                heartbeat_age_ms: age.map(milliseconds),
                heartbeat_limit_ms: milliseconds(limit),
            },
            tasks: self.tasks(),
            kernel: self.counters.read().map(|counters| api::Kernel::of(&counters)).unwrap_or_default(),
            certificates: self.certificates(),
            sources: self.sources.borrow().iter().map(source).chain(self.registrations()).collect(),
        }
    }

    fn tasks(&self) -> Vec<api::Task> {
        let snapshot = self.published.load();
        let observed = self.tasks.borrow().clone();
        let armed = self.armed.borrow().clone().unwrap_or_default();
        let ports = self.ports.borrow().clone();
        let of = |task: &TaskId| ports.iter().filter(|port| port.task == *task).map(local_port).collect();
        let enrolled = observed.iter().filter_map(|task| Some((task, snapshot.workloads.get(&task.id)?)));
        let shown = enrolled.map(|(task, workload)| api::Task {
            id: task.id.as_str().into(),
            family: task.family.clone(),
            service: workload.service.as_str().into(),
            mode: api::mode(task.mode).into(),
            identity: workload.identity.as_str().into(),
            armed: armed.contains(&task.id),
            ports: of(&task.id),
        });
        shown.collect()
    }

    fn registrations(&self) -> impl Iterator<Item = api::Source> {
        self.registered.iter().map(|(registry, registered)| {
            let registered = registered.borrow().clone();
            api::Source {
                name: format!("{registry} registration"),
                state: Some(format!("{} instances of this host", registered.count)),
                last_load: registered.at.and_then(api::timestamp),
                last_error: registered.error,
            }
        })
    }

    /// What sources that are asked over the network count, for the metrics.
    pub(super) fn source_figures(&self) -> Vec<(String, Arc<Figures>)> {
        let sources = self.sources.borrow();
        sources.iter().filter_map(|it| Some((it.backend.to_string(), it.figures.clone()?))).collect()
    }

    /// Of each service of this host: how many ports are ready, and how many are not.
    pub(super) fn local_ports(&self) -> BTreeMap<ServiceName, (usize, usize)> {
        let mut counts: BTreeMap<ServiceName, (usize, usize)> = BTreeMap::new();
        for port in self.ports.borrow().iter() {
            let (ready, unready) = counts.entry(port.service.clone()).or_default();
            *if port.unready.is_none() { ready } else { unready } += 1;
        }
        counts
    }

    /// With each registry: how many instances are registered, and whether all of them are.
    pub(super) fn registered(&self) -> Vec<(&'static str, usize, bool)> {
        let one = |(registry, registered): &(&'static str, watch::Receiver<Registered>)| {
            let registered = registered.borrow();
            (*registry, registered.count, registered.error.is_none())
        };
        self.registered.iter().map(one).collect()
    }

    fn certificates(&self) -> Vec<api::Certificate> {
        let leafs = self.identities.status();
        let shown = leafs.into_iter().map(|leaf| api::Certificate {
            identity: leaf.id.as_str().into(),
            not_after: leaf.not_after.and_then(api::timestamp),
            last_error: leaf.last_error,
        });
        shown.collect()
    }
}

fn local_port(port: &LocalPort) -> api::LocalPort {
    api::LocalPort {
        port: port.port,
        ready: port.unready.is_none(),
        seconds: port.since.elapsed().as_secs(),
        reason: port.unready.clone(),
    }
}

fn source(status: &SourceStatus) -> api::Source {
    let state = status.figures.as_ref().map(|figures| {
        let age = figures
            .last_answer()
            .map_or("no answer yet".into(), |at| format!("answer {} s ago", at.elapsed().as_secs()));
        let (services, watches) = (figures.services.load(Relaxed), figures.watches.load(Relaxed));
        format!("{services} services, {watches} watches, {age}, {} errors", figures.errors.load(Relaxed))
    });
    api::Source {
        name: status.backend.to_string(),
        state,
        last_load: status.loaded_at.and_then(api::timestamp),
        last_error: status.error.clone(),
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
