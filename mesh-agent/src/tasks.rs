//! The tasks of this host, as the container runtime shows them: one list, replaced whenever something changed.
//!
//! [`docker`] talks to the daemon, [`notice`] to inotify, [`known`] is what has been seen so far, [`container`] reads one answer,
//! [`sandbox`] finds namespaces and cgroups before docker tells, [`assemble`] makes tasks of containers, [`stop`] ends one, and
//! [`ecs_agent`] asks the ECS agent for the cluster. Must not know what the mesh does with a task.

pub mod assemble;
pub mod container;
pub mod docker;
pub mod ecs_agent;
pub mod known;
pub mod notice;
pub mod sandbox;
pub mod stop;

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use mesh_core::task::Task;
use tokio::{sync::watch, task::JoinSet};

/// What is to be observed, and from where.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The daemon's unix socket.
    pub socket: PathBuf,
    /// Mount point of the cgroup2 hierarchy, as the agent sees it.
    pub cgroup_root: Option<PathBuf>,
    /// Where docker keeps the files of network namespaces. Corrected by what docker says.
    pub netns_dir: PathBuf,
    /// The address of this host: where ports published on all addresses are reached.
    pub host: IpAddr,
    /// Full id of the container that the agent runs in; `None`: found out, where it runs in one at all.
    pub own_container: Option<String>,
}

/// Docker's default for [`Settings::netns_dir`].
pub const NETNS_DIR: &str = "/var/run/docker/netns";

/// The tasks, kept up to date until this is dropped.
pub struct Observer {
    /// Ordered by id. Empty until the daemon has been asked for the first time; kept while it is away.
    pub tasks: watch::Receiver<Arc<Vec<Task>>>,
    /// Whether the daemon can be reached.
    pub connected: watch::Receiver<bool>,
    _running: JoinSet<()>,
}

/// Starts to observe. Does not wait for the daemon.
pub fn observe(settings: Settings) -> Observer {
    let (tasks_sender, tasks) = watch::channel(Arc::new(Vec::new()));
    let (connected_sender, connected) = watch::channel(false);
    let mut running = JoinSet::new();
    running.spawn(docker::run(settings, tasks_sender, connected_sender));
    Observer { tasks, connected, _running: running }
}
