//! Probes the ports of this host's tasks and says which are ready; has a task stopped that stays ill, where that is
//! wanted.
//!
//! The snapshot says which ports there are to probe: an endpoint of a local task is in it, as unhealthy, before it is
//! ready. Whatever is found goes back as a [`Gate`], from which the next snapshot is made. What a finding means is
//! `mesh_core::readiness`'s to say. Must not know who publishes an endpoint.

mod probe;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{
    id::{ServiceName, TaskId},
    model::{Health, Reach, Snapshot},
    readiness::{
        Gate, Incarnation, Readiness, Settings, Standing,
        replace::{self, Being, Member, Stop},
        servers, unready,
    },
    task::{Phase, Task},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::{proxy::places::Namespaces, state::Published};

/// A namespace that is not armed yet is looked for again after this.
const NOT_HERE: Duration = Duration::from_millis(5);
/// What starts for so long is told of.
const LONG: Duration = Duration::from_secs(60);
/// Whether a task has to be stopped is asked so often.
const STOP_LOOK: Duration = Duration::from_secs(1);
/// A task that was to be stopped and is still there may be stopped again.
const STOP_AGAIN: Duration = Duration::from_secs(150);

/// What the probing needs.
pub struct Sources {
    pub readiness: Readiness,
    pub published: Published,
    pub tasks: watch::Receiver<Arc<Vec<Task>>>,
    pub namespaces: Arc<Namespaces>,
    /// `Some` once the first snapshot with this host's tasks is published: they are in use already.
    pub armed: watch::Receiver<Option<BTreeSet<TaskId>>>,
}

/// A port of a local task that others may call once it is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPort {
    pub task: TaskId,
    /// The container's.
    pub port: u16,
    pub service: ServiceName,
    /// Since when it has been as it is.
    pub since: Instant,
    /// Why it is not ready; `None`: it is.
    pub unready: Option<String>,
}

/// Whom the probing tells.
pub struct Listeners {
    /// Which ports are ready.
    pub gate: watch::Sender<Gate>,
    /// The same for people, with reasons.
    pub ports: watch::Sender<Vec<LocalPort>>,
    /// Which containers to stop.
    pub stop: mpsc::Sender<Stop>,
}

/// Probes until the writer of snapshots is gone.
pub async fn run(sources: Sources, listeners: Listeners) {
    let Sources { readiness, mut published, mut tasks, namespaces, mut armed } = sources;
    let Listeners { gate, ports, stop } = listeners;
    if armed.wait_for(Option::is_some).await.is_err() {
        return;
    }
    drop(armed);
    let mut watcher = Watcher {
        readiness,
        namespaces,
        clock: Instant::now(),
        probes: BTreeMap::new(),
        ports: BTreeMap::new(),
        running: JoinSet::new(),
        faulty: BTreeSet::new(),
        stopped: BTreeMap::new(),
        first: true,
    };
    let mut stop_look = tokio::time::interval(STOP_LOOK);
    stop_look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let known = tasks.borrow_and_update().clone();
        watcher.look(&published.load(), &known);
        watcher.first = false;
        watcher.launch();
        tell(&gate, watcher.gate(&known));
        tell(&ports, watcher.told(&known));
        let due = watcher.due();
        let timer = async {
            match due {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let wants_stop = watcher.wants_stop();
        tokio::select! {
            changed = published.changed() => if changed.is_err() { return },
            changed = tasks.changed() => if changed.is_err() { return },
            Some(done) = watcher.running.join_next() => match done {
                Ok(done) => watcher.take(done),
                Err(error) => tracing::warn!(%error, "a probe was lost"),
            },
            () = timer => {}
            _ = stop_look.tick(), if wants_stop => {
                let orders = watcher.ill(&published.load(), &known);
                for order in orders {
                    if stop.send(order).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

fn tell<T: PartialEq>(listener: &watch::Sender<T>, now: T) {
    listener.send_if_modified(|last| {
        let changed = *last != now;
        if changed {
            *last = now;
        }
        changed
    });
}

/// A port that is probed: the task's own, or the one that speaks for the whole task.
type Key = (TaskId, u16);

struct Watcher {
    readiness: Readiness,
    namespaces: Arc<Namespaces>,
    clock: Instant,
    probes: BTreeMap<Key, Probe>,
    /// Every port of a local task that is an endpoint.
    ports: BTreeMap<Key, Port>,
    running: JoinSet<Done>,
    /// What is wrong with the labels of a task, and was told.
    faulty: BTreeSet<(TaskId, String)>,
    /// When a task was last asked to stop.
    stopped: BTreeMap<TaskId, Duration>,
    /// Nothing has been looked at yet: who is healthy now is in use.
    first: bool,
}

struct Probe {
    service: ServiceName,
    to: SocketAddr,
    incarnation: Incarnation,
    settings: Settings,
    standing: Standing,
    /// One is under way, of this number.
    probing: Option<u64>,
    number: u64,
    /// Not before this, where its namespace was not there.
    not_before: Duration,
    /// Why the last one failed.
    problem: Option<String>,
    told: bool,
}

struct Port {
    service: ServiceName,
    /// Whose probe speaks for it; `None`: it is not probed.
    probe: Option<Key>,
    stop_after: Option<Duration>,
    healthy: bool,
    was_healthy: bool,
    since: Duration,
}

struct Done {
    key: Key,
    number: u64,
    outcome: Result<(), String>,
}

impl Watcher {
    fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    /// Takes over which ports there are.
    fn look(&mut self, snapshot: &Snapshot, tasks: &[Task]) {
        let now = self.now();
        let tasks: BTreeMap<_, _> = tasks.iter().map(|task| (&task.id, task)).collect();
        let mut ports = BTreeMap::new();
        let mut probes = BTreeMap::new();
        let mut read: BTreeMap<Key, Settings> = BTreeMap::new();
        for (key, deliver, service, health) in served(snapshot) {
            let Some(task) = tasks.get(&key.0).filter(|task| task.phase == Phase::Running) else { continue };
            let settings = read
                .entry(key.clone())
                .or_insert_with(|| settings(&self.readiness, task, &service, key.1, &mut self.faulty));
            let probe = if settings.check == mesh_core::readiness::Check::None {
                None
            } else {
                let port = settings.port.unwrap_or(key.1);
                Some((task.id.clone(), port))
            };
            if let Some(probe) = &probe {
                let to = SocketAddr::new(deliver.ip(), probe.1);
                let incarnation = Incarnation::of(task, probe.1);
                let known = self
                    .probes
                    .remove(probe)
                    .filter(|known| known.incarnation == incarnation && known.settings == *settings && known.to == to);
                let begun = || Probe {
                    service: service.clone(),
                    to,
                    incarnation,
                    settings: settings.clone(),
                    standing: Standing::begin(self.first && health == Health::Healthy, now),
                    probing: None,
                    number: 0,
                    not_before: Duration::ZERO,
                    problem: None,
                    told: false,
                };
                probes.entry(probe.clone()).or_insert_with(|| known.unwrap_or_else(begun));
            }
            let healthy = health == Health::Healthy;
            let before = self.ports.get(&key);
            let same = before.filter(|before| before.healthy == healthy);
            let port = Port {
                service,
                probe,
                stop_after: settings.stop_after,
                healthy,
                was_healthy: healthy || before.is_some_and(|before| before.was_healthy),
                since: same.map_or(now, |before| before.since),
            };
            ports.insert(key, port);
        }
        self.probes = probes;
        self.ports = ports;
        self.faulty.retain(|(task, _)| tasks.contains_key(task));
        self.stopped.retain(|task, _| tasks.contains_key(task));
    }

    /// Begins the probes that are due.
    fn launch(&mut self) {
        let now = self.now();
        for (key, probe) in &mut self.probes {
            if probe.when().is_none_or(|due| due > now) {
                continue;
            }
            let Some((socket, gone)) = self.namespaces.socket_of(&key.0, probe.to) else {
                probe.not_before = now + NOT_HERE;
                continue;
            };
            probe.number += 1;
            probe.probing = Some(probe.number);
            let (key, number, to, settings) = (key.clone(), probe.number, probe.to, probe.settings.clone());
            self.running.spawn(async move {
                let outcome = probe::probe(socket, to, &settings, gone).await;
                Done { key, number, outcome }
            });
        }
    }

    /// When the next probe is due.
    fn due(&self) -> Option<Instant> {
        self.probes.values().filter_map(Probe::when).min().map(|due| self.clock + due)
    }

    /// Takes what a probe came to.
    fn take(&mut self, done: Done) {
        let now = self.now();
        let Some(probe) = self.probes.get_mut(&done.key).filter(|probe| probe.probing == Some(done.number)) else {
            return;
        };
        probe.probing = None;
        let before = probe.standing;
        probe.standing = before.probed(done.outcome.is_ok(), now, &probe.settings);
        probe.problem = done.outcome.err();
        let (task, port) = (done.key.0.as_str(), done.key.1);
        let after = probe.standing;
        let took_ms = u64::try_from(now.saturating_sub(before.since()).as_millis()).unwrap_or(u64::MAX);
        let problem = probe.problem.as_deref().unwrap_or_default();
        match (before.is_ready(), after.is_ready()) {
            (false, true) => {
                tracing::info!(task, service = %probe.service, port, took_ms, "a task is ready");
                probe.told = false;
            }
            (true, false) => {
                tracing::warn!(
                    task, service = %probe.service, port, problem,
                    "a task is not ready any more, so nobody is sent there: look at its log"
                );
                probe.told = true;
            }
            (false, false) if !probe.told && now.saturating_sub(after.since()) >= LONG => {
                tracing::warn!(
                    task, service = %probe.service, port, problem,
                    "a task has not become ready, so nobody is sent there: does it listen on this port, on all \
                     addresses? `ecs-mesh.ready` says how it is asked"
                );
                probe.told = true;
            }
            (false, false) | (true, true) => {}
        }
    }

    /// What is ready now.
    fn gate(&self, tasks: &[Task]) -> Gate {
        let tasks: BTreeMap<_, _> = tasks.iter().map(|task| (&task.id, task)).collect();
        let ready = |port: &Port| match &port.probe {
            None => true,
            Some(probe) => self.probes.get(probe).is_some_and(|probe| probe.standing.is_ready()),
        };
        let passed = self.ports.iter().filter(|(_, port)| ready(port));
        let passed = passed.filter_map(|(key, _)| Some((key.clone(), Incarnation::of(tasks.get(&key.0)?, key.1))));
        Gate::Probed(Arc::new(passed.collect()))
    }

    /// How every port is doing, and why.
    fn told(&self, tasks: &[Task]) -> Vec<LocalPort> {
        let tasks: BTreeMap<_, _> = tasks.iter().map(|task| (&task.id, task)).collect();
        let told = self.ports.iter().filter_map(|((task, number), port)| {
            let probe = port.probe.as_ref().and_then(|probe| self.probes.get(probe));
            let probe = probe.map(|probe| (probe.standing, probe.problem.as_deref()));
            Some(LocalPort {
                task: task.clone(),
                port: *number,
                service: port.service.clone(),
                since: self.clock + port.since,
                unready: unready(tasks.get(task)?, probe),
            })
        });
        told.collect()
    }

    /// Whether a task may have to be stopped some time.
    fn wants_stop(&self) -> bool {
        self.ports.values().any(|port| port.stop_after.is_some() && !port.healthy)
    }

    /// Which containers are to be stopped now, at most one of each service.
    fn ill(&mut self, snapshot: &Snapshot, tasks: &[Task]) -> Vec<Stop> {
        let now = self.now();
        let mut by_service: BTreeMap<&ServiceName, BTreeMap<&TaskId, Member>> = BTreeMap::new();
        for ((task, _), port) in &self.ports {
            let unhealthy = now.saturating_sub(port.since);
            let asked = self.stopped.get(task).is_some_and(|asked| now.saturating_sub(*asked) < STOP_AGAIN);
            let is = match (port.healthy, port.was_healthy) {
                _ if asked => Being::Stopping,
                (true, _) => Being::Ready,
                (false, true) => Being::Ill(unhealthy),
                (false, false) => Being::Starting(unhealthy),
            };
            let member = Member { is, stop_after: port.stop_after };
            let members = by_service.entry(&port.service).or_default();
            // A task that serves on one of its ports is well.
            let known = members.entry(task).or_insert(member);
            if member.is == Being::Ready {
                *known = member;
            }
        }
        let stopping: BTreeSet<_> = tasks.iter().filter(|it| it.phase == Phase::Stopping).map(|it| &it.id).collect();
        let mut orders = Vec::new();
        for (service, members) in by_service {
            let Some(known) = snapshot.services.get(service) else { continue };
            let endpoints = || known.ports.iter().flat_map(|port| &port.endpoints);
            let healthy = endpoints().filter(|endpoint| endpoint.health == Health::Healthy).count();
            let ending = endpoints().filter_map(|endpoint| endpoint.task()).any(|task| stopping.contains(task));
            let (ids, mut list): (Vec<_>, Vec<_>) = members.into_iter().unzip();
            if ending {
                list.push(Member { is: Being::Stopping, stop_after: None });
            }
            let Some(id) = replace::to_stop(&list, healthy).and_then(|at| ids.get(at)) else { continue };
            let Some(task) = tasks.iter().find(|task| task.id == **id) else { continue };
            let port = self.ports.keys().find(|(task, _)| task == *id).map_or(0, |(_, port)| *port);
            let Some(container) = servers(task, port).next() else { continue };
            tracing::warn!(
                task = id.as_str(), service = %service, container = container.id,
                "a task has been unhealthy for too long and is stopped, so that ECS replaces it"
            );
            orders.push(Stop { task: task.id.clone(), container: container.id.clone() });
        }
        self.stopped.extend(orders.iter().map(|order| (order.task.clone(), now)));
        orders
    }
}

impl Probe {
    /// When it is to be probed; `None`: not again, or it is being probed.
    fn when(&self) -> Option<Duration> {
        if self.probing.is_some() {
            return None;
        }
        self.standing.due().map(|due| due.max(self.not_before))
    }
}

/// The container ports of local tasks that are endpoints: each once, by the service that the task belongs to.
fn served(snapshot: &Snapshot) -> impl Iterator<Item = (Key, SocketAddr, ServiceName, Health)> {
    let services: BTreeSet<_> = snapshot.workloads.values().map(|workload| &workload.service).collect();
    let services = services.into_iter().filter_map(|name| snapshot.services.get(name));
    services.flat_map(move |service| {
        let endpoints = service.ports.iter().flat_map(|port| &port.endpoints);
        endpoints.filter_map(move |endpoint| {
            let Reach::Local { task, deliver, .. } = &endpoint.reach else { return None };
            let own = snapshot.workloads.get(task).is_some_and(|workload| workload.service == service.name);
            own.then(|| ((task.clone(), deliver.port()), *deliver, service.name.clone(), endpoint.health))
        })
    })
}

fn settings(
    readiness: &Readiness,
    task: &Task,
    service: &ServiceName,
    port: u16,
    faulty: &mut BTreeSet<(TaskId, String)>,
) -> Settings {
    let (settings, problem) = readiness.of(task, service, port);
    if let Some(problem) = problem
        && faulty.insert((task.id.clone(), problem.clone()))
    {
        tracing::warn!(
            task = task.id.as_str(),
            problem,
            "not all labels of a task about its readiness are used: correct its task definition"
        );
    }
    settings
}

#[cfg(test)]
mod tests;
