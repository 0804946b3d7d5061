//! Where services and endpoints come from: runs the configured backends and hands their sets on, in precedence order.
//!
//! The seam for registries: a backend is a task that sends [`Report`]s on one channel. Sets are not merged here (that
//! is `mesh-core::merge`). Must not know what a set is used for.

pub mod aws;
pub mod cloud_map;
pub mod consul;
pub mod ecs;
pub mod static_file;

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Instant, SystemTime},
};

use mesh_core::{
    config::{Fault, cloud_map::CloudMap, discovery as config},
    id::ClusterName,
    services::ServiceSet,
    task::Task,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::state::{Published, uses::Uses};

/// A backend as configured. The order of backends is their precedence.
#[derive(Clone, Debug, PartialEq)]
pub enum Backend {
    /// The file of services, endpoints and policy.
    StaticFile { path: PathBuf },
    /// A Consul agent.
    Consul(Arc<config::Consul>),
    /// The ECS API.
    Ecs(Arc<ecs::Source>),
    /// AWS Cloud Map.
    CloudMap(Arc<CloudMap>),
}

/// Names a backend: its place in the order of precedence, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId(pub usize);

/// What a backend has to say: a new set, or why there is none.
#[derive(Debug)]
pub struct Report {
    pub source: SourceId,
    pub outcome: Result<ServiceSet, SourceError>,
    /// What is still wrong with a part of a set that is there.
    pub still: Option<String>,
}

/// A backend could not give a set. The last good one stays.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("cannot read {}: see that it exists and that the agent may read it", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is not valid, the last good version stays in use: {}", .path.display(), list(.faults))]
    Invalid { path: PathBuf, faults: Vec<Fault> },
    #[error("cannot watch {}: is fs.inotify.max_user_watches exhausted?", .path.display())]
    Watch { path: PathBuf, source: notify::Error },
    #[error("{what} cannot be had, what was learnt last stays in use")]
    Consul { what: String, source: consul::Trouble },
    #[error("Consul cannot be asked")]
    ConsulSetUp(#[source] consul::SetUpError),
    #[error("{what} cannot be had, what was learnt last stays in use")]
    Aws { what: String, source: aws::Trouble },
}

/// What a backend that asks over the network counts.
#[derive(Debug, Default)]
pub struct Figures {
    last_answer: Mutex<Option<Instant>>,
    pub answers: AtomicU64,
    pub errors: AtomicU64,
    /// Questions that wait for news.
    pub watches: AtomicUsize,
    pub services: AtomicUsize,
}

impl Figures {
    fn answered(&self) {
        *self.last_answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    fn failed(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// When the last answer came.
    pub fn last_answer(&self) -> Option<Instant> {
        *self.last_answer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How registering this host's tasks with a registry goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    /// When everything was last as it should be.
    pub at: Option<SystemTime>,
    /// Instances of this host.
    pub count: usize,
    /// Why not everything is registered; `None`: it is.
    pub error: Option<String>,
}

/// Keeps this host's tasks registered with one registry.
pub enum Registrar {
    Consul(consul::registrar::Registrar),
    CloudMap(cloud_map::registrar::Registrar),
}

impl Registrar {
    /// The registry's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Consul(_) => "consul",
            Self::CloudMap(_) => "cloud_map",
        }
    }

    /// How it goes, to be shown.
    pub fn status(&self) -> watch::Receiver<Registered> {
        match self {
            Self::Consul(registrar) => registrar.status(),
            Self::CloudMap(registrar) => registrar.status(),
        }
    }

    /// Follows the snapshot until `stop` is told, and takes everything back then. To be called when the tasks of this
    /// host are known: what is registered for nobody goes.
    pub async fn run(self, published: Published, tasks: watch::Receiver<Arc<Vec<Task>>>, stop: watch::Receiver<bool>) {
        match self {
            Self::Consul(registrar) => registrar.run(published, tasks, stop).await,
            Self::CloudMap(registrar) => registrar.run(published, tasks, stop).await,
        }
    }
}

/// How a backend is doing.
#[derive(Clone, Debug)]
pub struct SourceStatus {
    pub backend: Backend,
    /// When the set in use was loaded; `None`: never.
    pub loaded_at: Option<SystemTime>,
    /// Why the newest attempt gave no set; `None`: it did.
    pub error: Option<String>,
    /// `None`: nothing is asked over the network.
    pub figures: Option<Arc<Figures>>,
}

impl PartialEq for SourceStatus {
    fn eq(&self, other: &Self) -> bool {
        (&self.backend, self.loaded_at, &self.error) == (&other.backend, other.loaded_at, &other.error)
    }
}

/// The running backends. They stop when this is dropped.
pub struct Discovery {
    /// One set per backend, in precedence order; empty where a backend has had nothing to say yet.
    pub sets: watch::Receiver<Vec<ServiceSet>>,
    /// In precedence order.
    pub status: watch::Receiver<Vec<SourceStatus>>,
    _running: JoinSet<()>,
}

/// Runs `backends`. What a file holds now is there when this returns. `uses` says what is to be kept freshest.
pub fn run(backends: Vec<Backend>, uses: &Uses) -> Discovery {
    let (reports, mut incoming) = mpsc::channel::<Report>(16);
    let mut collected = Collected::new(&backends);
    let mut running = JoinSet::new();
    for (place, backend) in backends.into_iter().enumerate() {
        let source = SourceId(place);
        match backend {
            Backend::StaticFile { path } => {
                let mut file = static_file::StaticFile::new(path, source);
                if let Some(report) = file.load() {
                    collected.take(report, SystemTime::now());
                }
                running.spawn(file.watch(reports.clone()));
            }
            Backend::Consul(consul) => {
                let figures = collected.figures(source);
                running.spawn(consul::run(consul, source, reports.clone(), figures, uses.listen()));
            }
            Backend::Ecs(ecs) => {
                let figures = collected.figures(source);
                running.spawn(ecs::run(ecs, source, reports.clone(), figures));
            }
            Backend::CloudMap(cloud_map) => {
                let figures = collected.figures(source);
                running.spawn(cloud_map::run(cloud_map, source, reports.clone(), figures, uses.listen()));
            }
        }
    }
    drop(reports);
    let (sets_sender, sets) = watch::channel(collected.sets());
    let (status_sender, status) = watch::channel(collected.status.clone());
    running.spawn(async move {
        while let Some(report) = incoming.recv().await {
            let changed = collected.take(report, SystemTime::now());
            status_sender.send_replace(collected.status.clone());
            if changed {
                sets_sender.send_replace(collected.sets());
            }
        }
    });
    Discovery { sets, status, _running: running }
}

/// The last good set of every backend.
struct Collected {
    by_source: BTreeMap<SourceId, ServiceSet>,
    status: Vec<SourceStatus>,
}

impl Collected {
    fn new(backends: &[Backend]) -> Self {
        let status = backends
            .iter()
            .map(|backend| SourceStatus {
                backend: backend.clone(),
                loaded_at: None,
                error: None,
                figures: backend.is_asked().then(Arc::default),
            })
            .collect();
        let by_source = (0..backends.len()).map(|place| (SourceId(place), ServiceSet::default())).collect();
        Self { by_source, status }
    }

    fn figures(&self, source: SourceId) -> Arc<Figures> {
        self.status.get(source.0).and_then(|status| status.figures.clone()).unwrap_or_default()
    }

    /// Whether a set changed.
    fn take(&mut self, report: Report, now: SystemTime) -> bool {
        let Some(status) = self.status.get_mut(report.source.0) else { return false };
        match report.outcome {
            Ok(set) => {
                let first = status.loaded_at.replace(now).is_none() || status.error.is_some() && report.still.is_none();
                status.error = report.still;
                // A registry has something new all the time.
                if first || status.figures.is_none() {
                    tracing::info!(source = %status.backend, services = set.services.len(), "services loaded");
                } else {
                    tracing::debug!(source = %status.backend, services = set.services.len(), "services loaded");
                }
                let last = self.by_source.entry(report.source).or_default();
                let set = set.sharing(last);
                let changed = set != *last;
                *last = set;
                changed
            }
            Err(error) => {
                tracing::warn!(source = %status.backend, error = &error as &dyn std::error::Error, "services not loaded");
                if let SourceError::Invalid { faults, .. } = &error {
                    for fault in faults {
                        tracing::warn!(source = %status.backend, path = fault.path, problem = fault.problem,
                            remedy = fault.remedy, "fault in the services file");
                    }
                }
                status.error = Some(chain(&error));
                false
            }
        }
    }

    fn sets(&self) -> Vec<ServiceSet> {
        self.by_source.values().cloned().collect()
    }
}

impl Backend {
    /// Whether it is asked over the network.
    fn is_asked(&self) -> bool {
        match self {
            Self::StaticFile { .. } => false,
            Self::Consul(_) | Self::Ecs(_) | Self::CloudMap(_) => true,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StaticFile { path } => write!(f, "file {}", path.display()),
            Self::Consul(consul) => write!(f, "consul {}", consul.address),
            Self::Ecs(ecs) => {
                let clusters: Vec<&str> = ecs.clusters.iter().map(ClusterName::as_str).collect();
                write!(f, "ecs {}", clusters.join(" "))
            }
            Self::CloudMap(cloud_map) => write!(f, "cloud_map {}", cloud_map.namespaces.join(" ")),
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn list(faults: &[Fault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
