//! Makes the host match the snapshot: kernel maps first, then namespaces and cgroups, one action after the other.
//!
//! The loop is: observe, ask `mesh_core::reconcile`, perform, remember what is held. A failed action is not
//! remembered, so it is asked for again with the next observation or after [`RETRY`]. What is armed is a value here, and
//! dropping it closes the listeners. Must not decide anything about services.

mod dataplane;
mod space;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_common::maps::{Knobs, Namespace, namespace};
use mesh_core::{
    id::TaskId,
    model::{Numbers, Snapshot},
    reconcile::{self, Action, Armed, ArmedNamespace},
    task::{NetworkMode, Task},
};

use crate::{
    proxy::places::Home,
    sys::{
        bpf::BpfError,
        cgroup::{self, CgroupError},
        maps::{Maps, WriteError},
        netns::{Netns, NetnsError},
    },
};

use dataplane::Dataplane;
use space::Space;
pub use space::{Servers, SpaceError, serve_tunnels};

/// A namespace that is being made, or an address that comes up a moment later, is tried again this soon.
const RETRY: Duration = Duration::from_millis(20);
/// What has failed so often is said aloud, and tried again at leisure.
const PATIENCE: u32 = 50;
/// For example a port of ours that the application has taken, or a full map.
const LEISURE: Duration = Duration::from_secs(1);
/// Between two complaints about what still fails, in attempts at leisure.
const COMPLAIN_EACH: u32 = 60;

/// An action failed.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Space(#[from] SpaceError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cannot enrol a host-mode container by its cgroup")]
    Cgroup(#[from] CgroupError),
    #[error("{path} is the host's own network namespace by now: the task has gone")]
    HostsOwn { path: PathBuf },
}

/// The maps that another agent left, or this process's namespace, cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Maps(#[from] BpfError),
    #[error(transparent)]
    Flows(#[from] WriteError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// Names the host's namespace: the agent's own.
const OWN: &str = "/proc/self/ns/net";

/// Owns the kernel maps and everything that is armed.
pub struct Reconciler {
    maps: Maps,
    dataplane: Dataplane,
    servers: Servers,
    spaces: BTreeMap<TaskId, Held>,
    host: Option<Space>,
    /// Path to the kernel's number and the workload's.
    cgroups: BTreeMap<PathBuf, (u64, u32)>,
    gone: BTreeSet<PathBuf>,
    /// Tasks in host mode, which are connected to from the host's own namespace.
    host_tasks: BTreeSet<TaskId>,
    leftovers: Leftovers,
    /// Turns in a row in which something failed.
    failures: u32,
    numbers: Numbers,
    own_cookie: u64,
}

/// Namespace cookies and cgroup ids that the agent before us had enrolled. They fail open until we have armed them, and
/// are removed when we know which of them we want.
#[derive(Default)]
struct Leftovers {
    namespaces: BTreeSet<u64>,
    cgroups: BTreeSet<u64>,
}

struct Held {
    armed: ArmedNamespace,
    space: Space,
}

impl Reconciler {
    /// Takes over the maps, with what another agent left in them; the first [`Reconciler::turn`] makes that ours.
    ///
    /// # Errors
    /// The maps cannot be read or written.
    pub fn new(mut maps: Maps, servers: Servers) -> Result<Self, StartError> {
        let found = maps.image().map_err(BpfError::Adopt)?;
        let enrolled = maps.enrolled().map_err(BpfError::Adopt)?;
        let numbers = dataplane::given(&found, &enrolled);
        let dataplane = Dataplane::adopt(found);
        let leftovers = Leftovers {
            namespaces: enrolled.namespaces.into_keys().collect(),
            cgroups: enrolled.cgroups.into_keys().collect(),
        };
        // Their listeners died with the agent before us.
        maps.forget_flows(None)?;
        let own_cookie = Netns::open(Path::new(OWN))?.cookie();
        Ok(Self {
            maps,
            dataplane,
            servers,
            spaces: BTreeMap::new(),
            host: None,
            cgroups: BTreeMap::new(),
            gone: BTreeSet::new(),
            host_tasks: BTreeSet::new(),
            leftovers,
            failures: 0,
            numbers,
            own_cookie,
        })
    }

    /// The highest numbers that the agent before us gave away. Ours go on from there, because the kernel may still hold
    /// something under its.
    pub fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// Other tasks are there: what fails may be news, so it is tried again soon.
    pub fn hurry(&mut self) {
        self.failures = 0;
    }

    /// Does what has to be done. When something failed that is worth another try: after how long.
    pub fn turn(&mut self, tasks: &[Task], snapshot: &Arc<Snapshot>) -> Option<Duration> {
        let complain = self.failures >= PATIENCE && (self.failures - PATIENCE).is_multiple_of(COMPLAIN_EACH);
        let mut again = self.dataplane.apply(&mut self.maps, snapshot, self.failures == 0 || complain);
        let observed: BTreeSet<_> = tasks.iter().flat_map(paths).collect();
        // One that is back under its old path is another one.
        self.gone.retain(|path| observed.contains(path.as_path()) && !path.exists());
        self.forget_replaced_cgroups();
        self.follow_renamed(tasks);
        self.home_host_tasks(snapshot);
        for action in reconcile::reconcile(tasks, snapshot, &self.armed(), &self.gone) {
            let Err(error) = self.perform(&action) else { continue };
            if self.give_up(&action, &error) {
                tracing::debug!(?action, error = &error as &dyn std::error::Error, "what was to be armed is not there");
                continue;
            }
            again = true;
            let error = &error as &dyn std::error::Error;
            if complain {
                tracing::warn!(?action, error, "a task is not in the mesh: what that needs keeps failing");
            } else {
                tracing::debug!(?action, error, "action failed, trying again");
            }
        }
        if !again {
            self.forget_leftovers();
            self.failures = 0;
            return None;
        }
        self.failures += 1;
        Some(if self.failures < PATIENCE { RETRY } else { LEISURE })
    }

    /// A namespace is first known by a process's path, later by docker's: the same one stays armed, without a moment in
    /// which it is not.
    fn follow_renamed(&mut self, tasks: &[Task]) {
        for task in tasks {
            let (Some(netns), Some(held)) = (&task.netns, self.spaces.get_mut(&task.id)) else { continue };
            if held.armed.netns != *netns && Netns::open(netns).is_ok_and(|now| now.cookie() == held.space.cookie()) {
                tracing::debug!(task = task.id.as_str(), netns = %netns.display(), "namespace goes by another path");
                held.armed.netns.clone_from(netns);
            }
        }
    }

    /// A container that is started again has a new cgroup, under the same path. It may be there before anybody has
    /// heard that the old one had gone.
    fn forget_replaced_cgroups(&mut self) {
        let maps = &mut self.maps;
        self.cgroups.retain(|path, (id, _)| {
            let replaced = cgroup::id(path).is_ok_and(|now| now != *id);
            if replaced && let Err(error) = maps.remove_cgroup(*id) {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot remove a cgroup that is gone");
            }
            !replaced
        });
    }

    fn home_host_tasks(&mut self, snapshot: &Snapshot) {
        let in_host_mode = snapshot.workloads.values().filter(|workload| workload.mode == NetworkMode::Host);
        let now: BTreeSet<_> = in_host_mode.map(|workload| workload.task.clone()).collect();
        for task in now.difference(&self.host_tasks) {
            self.servers.remember(task, Home::Host);
        }
        for task in self.host_tasks.difference(&now) {
            self.servers.forget(task);
        }
        self.host_tasks = now;
    }

    /// Everything that is wanted is armed: what is left of another agent's is not.
    fn forget_leftovers(&mut self) {
        self.dataplane.forget_old(&mut self.maps);
        let Leftovers { namespaces, cgroups } = std::mem::take(&mut self.leftovers);
        let ours: BTreeSet<_> =
            self.spaces.values().map(|held| &held.space).chain(&self.host).map(Space::cookie).collect();
        for cookie in namespaces.difference(&ours) {
            if let Err(error) = self.maps.remove_namespace(*cookie) {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot remove a namespace that is gone");
            }
        }
        let ours: BTreeSet<_> = self.cgroups.values().map(|(id, _)| *id).collect();
        for id in cgroups.difference(&ours) {
            if let Err(error) = self.maps.remove_cgroup(*id) {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot remove a cgroup that is gone");
            }
        }
    }

    /// How many entries each kernel map holds of ours.
    pub fn entries(&self) -> [(&'static str, usize); 5] {
        let [services, endpoints, grants] = self.dataplane.sizes();
        let namespaces = self.spaces.len() + usize::from(self.host.is_some());
        [
            ("services", services),
            ("endpoints", endpoints),
            ("grants", grants),
            ("namespaces", namespaces),
            ("cgroups", self.cgroups.len()),
        ]
    }

    /// The tasks that are armed, for `status`.
    pub fn armed_tasks(&self) -> BTreeSet<TaskId> {
        let in_host = if self.host.is_some() { self.host_tasks.clone() } else { BTreeSet::new() };
        self.spaces.keys().cloned().chain(in_host).collect()
    }

    /// Tells the hooks what they must know; from here on they intercept.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_knobs(&mut self, knobs: &Knobs) -> Result<(), WriteError> {
        self.maps.set_knobs(knobs)
    }

    fn armed(&self) -> Armed {
        Armed {
            namespaces: self.spaces.iter().map(|(task, held)| (task.clone(), held.armed.clone())).collect(),
            cgroups: self.cgroups.iter().map(|(path, (_, workload))| (path.clone(), *workload)).collect(),
            host: self.host.is_some(),
        }
    }

    fn perform(&mut self, action: &Action) -> Result<(), ReconcileError> {
        match action {
            Action::ArmNamespace { task, netns, workload, mode } => self.arm(task, netns, *workload, *mode),
            Action::DisarmNamespace { task } => {
                let Some(held) = self.spaces.get(task) else { return Ok(()) };
                let cookie = held.space.cookie();
                self.maps.remove_namespace(cookie)?;
                self.servers.forget(task);
                self.spaces.remove(task);
                self.maps.forget_flows(Some(cookie))?;
                tracing::info!(task = task.as_str(), "task disarmed");
                Ok(())
            }
            Action::ArmHost => {
                let netns = Arc::new(Netns::open(Path::new(OWN))?);
                let flags = namespace::BY_CGROUP | namespace::DIRECT;
                self.host = Some(self.enrol(netns, Namespace { workload: 0, flags }, None)?);
                tracing::info!("host namespace armed");
                Ok(())
            }
            Action::DisarmHost => {
                let Some(space) = &self.host else { return Ok(()) };
                let cookie = space.cookie();
                self.maps.remove_namespace(cookie)?;
                self.host = None;
                self.maps.forget_flows(Some(cookie))?;
                tracing::info!("host namespace disarmed");
                Ok(())
            }
            Action::ArmCgroup { cgroup, workload } => {
                let id = cgroup::id(cgroup)?;
                self.maps.put_cgroup(id, *workload)?;
                self.cgroups.insert(cgroup.clone(), (id, *workload));
                Ok(())
            }
            Action::DisarmCgroup { cgroup } => {
                let Some((id, _)) = self.cgroups.get(cgroup) else { return Ok(()) };
                self.maps.remove_cgroup(*id)?;
                self.cgroups.remove(cgroup);
                Ok(())
            }
        }
    }

    fn arm(&mut self, task: &TaskId, path: &Path, workload: u32, mode: NetworkMode) -> Result<(), ReconcileError> {
        let netns = Arc::new(Netns::open(path)?);
        if netns.cookie() == self.own_cookie {
            // The path goes by a process, and its number has been given to one of the host: all of the host's processes
            // would become this task.
            return Err(ReconcileError::HostsOwn { path: path.into() });
        }
        let awsvpc = mode == NetworkMode::Awsvpc;
        let flags = if awsvpc { 0 } else { namespace::DIRECT };
        let space = self.enrol(netns.clone(), Namespace { workload, flags }, awsvpc.then_some(workload))?;
        self.servers.remember(task, Home::Netns(netns));
        let armed = ArmedNamespace { netns: path.into(), workload, mode };
        self.spaces.insert(task.clone(), Held { armed, space });
        tracing::info!(task = task.as_str(), workload, "task armed");
        Ok(())
    }

    /// Makes the listeners in the namespace, then tells the kernel who lives there. Where an agent before us has told it
    /// already, its number is replaced first: a connection must never be accepted under it. Without listeners the hooks
    /// take the agent for away.
    fn enrol(&mut self, netns: Arc<Netns>, entry: Namespace, tunnel: Option<u32>) -> Result<Space, ReconcileError> {
        let cookie = netns.cookie();
        if self.leftovers.namespaces.contains(&cookie) {
            self.maps.put_namespace(cookie, entry)?;
        }
        let space = Space::open(netns, tunnel, &self.servers)?;
        let v6 = if space.has_v6() { namespace::V6 } else { 0 };
        self.maps.put_namespace(cookie, Namespace { flags: entry.flags | v6, ..entry })?;
        Ok(space)
    }

    /// A namespace or cgroup that is not there (any more) is left alone until it is observed elsewhere.
    fn give_up(&mut self, action: &Action, error: &ReconcileError) -> bool {
        let missing = match error {
            ReconcileError::Netns(NetnsError::Open { source, .. })
            | ReconcileError::Cgroup(CgroupError::Read { source, .. }) => source.kind() == std::io::ErrorKind::NotFound,
            ReconcileError::Netns(_)
            | ReconcileError::Cgroup(_)
            | ReconcileError::Space(_)
            | ReconcileError::Write(_) => false,
            ReconcileError::HostsOwn { .. } => true,
        };
        if !missing {
            return false;
        }
        match action {
            Action::ArmNamespace { netns: path, .. } | Action::ArmCgroup { cgroup: path, .. } => {
                self.gone.insert(path.clone());
                true
            }
            Action::DisarmNamespace { .. } | Action::ArmHost | Action::DisarmHost | Action::DisarmCgroup { .. } => {
                false
            }
        }
    }
}

fn paths(task: &Task) -> impl Iterator<Item = &Path> {
    let cgroups = task.containers.iter().filter_map(|container| container.cgroup.as_deref());
    task.netns.as_deref().into_iter().chain(cgroups)
}
