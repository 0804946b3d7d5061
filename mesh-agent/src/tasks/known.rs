//! What has been seen of the host's containers so far, and what each news changes about it.
//!
//! Knows docker's events and where to look for namespaces; must not know how news arrives.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use mesh_core::task::{ContainerHealth, NetworkMode, Task};

use super::{
    assemble::assemble,
    container::{Network, Seen, State},
    sandbox::{self, Places},
};

/// All containers that exist, by full id.
#[derive(Debug)]
pub struct Known {
    seen: BTreeMap<String, Seen>,
    /// Ending signals to containers that were not known then: when.
    told: BTreeMap<String, Told>,
    own: Option<String>,
    pub places: Places,
}

#[derive(Debug)]
struct Told {
    at: i128,
    signal: Option<String>,
}

/// What an event asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The container is to be inspected (again).
    Inspect,
    Nothing,
}

impl Known {
    pub fn new(places: Places, own: Option<String>) -> Self {
        Self { seen: BTreeMap::new(), told: BTreeMap::new(), own, places }
    }

    /// The tasks of now.
    pub fn tasks(&self) -> Vec<Task> {
        assemble(&self.seen, self.own.as_deref())
    }

    /// Applies one of docker's container events of time `at`: what the event itself says at once, the rest by
    /// inspecting. What is older than what inspect said is no news.
    pub fn event(
        &mut self,
        id: &str,
        action: &str,
        at: Option<i128>,
        attribute: impl Fn(&str) -> Option<String>,
    ) -> Next {
        let at = at.unwrap_or(i128::MAX);
        let container = self.seen.get_mut(id);
        let is_news = container.as_ref().is_none_or(|container| at > container.as_of);
        match action {
            // The one thing that inspect does not tell.
            "kill" => {
                let signal = attribute("signal");
                match container {
                    Some(container) => container.signalled(at, signal.as_deref()),
                    None => {
                        self.told.insert(id.to_owned(), Told { at, signal });
                    }
                }
                Next::Nothing
            }
            "destroy" => {
                self.gone(id);
                Next::Nothing
            }
            _ if !is_news => Next::Nothing,
            "die" => {
                if let Some(container) = container {
                    container.ended(attribute("exitCode").is_some_and(|code| code != "0"));
                }
                Next::Inspect
            }
            "start" => {
                if let Some(container) = container {
                    container.stopping = false;
                }
                Next::Inspect
            }
            "create" | "stop" | "restart" | "pause" | "unpause" | "update" | "rename" => Next::Inspect,
            _ => match (container, health(action)) {
                (Some(container), Some(health)) => {
                    container.health = health;
                    Next::Inspect
                }
                _ => Next::Nothing,
            },
        }
    }

    /// Takes an inspect answer.
    pub fn inspected(&mut self, mut now: Seen) {
        if let Some(file) = &now.netns
            && let Some(dir) = file.parent()
            && dir.is_dir()
        {
            dir.clone_into(&mut self.places.netns_dir);
        }
        let before = self.seen.remove(&now.id);
        let is_new = before.is_none();
        if let Some(before) = before
            && !before.is_dead()
            && !now.is_dead()
            && (before.pid == now.pid || before.pid.is_none() || now.pid.is_none())
        {
            now.keep(before);
        }
        if let Some(pid) = now.pid
            && let Some(cgroup) = self.places.cgroup_of(pid, &now.id)
        {
            if now.cgroup_parent.is_empty() {
                self.places.learnt_parent = cgroup.parent().map(Path::to_path_buf);
            }
            now.cgroup = Some(cgroup);
        }
        if is_new && now.network == Network::Host && now.state == State::Running && now.cgroup.is_none() {
            tracing::warn!(
                container = now.id,
                "a container in host network mode has no cgroup2 of its own, so it cannot be told from other processes \
                 and is left alone: boot with the unified hierarchy (systemd.unified_cgroup_hierarchy=1)"
            );
        }
        if let Some(told) = self.told.remove(&now.id) {
            now.signalled(told.at, told.signal.as_deref());
        }
        self.seen.insert(now.id.clone(), now);
    }

    /// Whether the container has been seen.
    pub fn has(&self, id: &str) -> bool {
        self.seen.contains_key(id)
    }

    /// The container does not exist (any more).
    pub fn gone(&mut self, id: &str) {
        self.seen.remove(id);
        self.told.remove(id);
    }

    /// Takes the list, asked for at `asked`, of all containers that exist. One seen after that may be younger.
    pub fn listed(&mut self, ids: &[String], asked: i128) {
        let ids: BTreeSet<&str> = ids.iter().map(String::as_str).collect();
        self.seen.retain(|id, container| container.as_of > asked || ids.contains(id.as_str()));
        self.told.retain(|id, told| told.at > asked || ids.contains(id.as_str()));
    }

    /// Those that a list need not look at again: nothing about them can change unnoticed.
    pub fn is_settled(&self, id: &str) -> bool {
        self.seen.get(id).is_some_and(Seen::is_dead)
    }

    /// Finds the cgroups of containers that are about to start. `true`: some were found.
    pub fn locate_cgroups(&mut self) -> bool {
        let mut found = false;
        for container in self.seen.values_mut().filter(|container| container.state == State::Created) {
            if container.cgroup.is_none() {
                container.cgroup = self.places.cgroup(&container.cgroup_parent, &container.id);
                found |= container.cgroup.is_some();
            }
        }
        found
    }

    /// Finds out whose namespace docker's new `file` is. `false`: nobody's yet.
    pub fn locate_namespace(&mut self, file: &Path) -> bool {
        let Some((id, pid)) = sandbox::occupant(file) else { return false };
        let Some(container) = self.seen.get_mut(&id) else { return false };
        if container.has_own_namespace() && container.netns.as_deref().is_none_or(sandbox::is_passing) {
            tracing::debug!(container = id, file = %file.display(), pid, "namespace found by its file");
            container.revive();
            container.netns = Some(file.into());
        }
        true
    }

    /// Takes a cgroup that just appeared, if it is a container's. This tells too that a stopped container is started
    /// again, which docker says only afterwards.
    pub fn cgroup_appeared(&mut self, path: &Path) {
        if let Some(container) = path.to_str().and_then(sandbox::container_of).and_then(|id| self.seen.get_mut(id)) {
            container.revive();
            container.cgroup = Some(path.into());
        }
    }

    /// Finds namespaces by the processes in the containers' cgroups. Whether some were found, and whether some of those
    /// that are being started are still missing, or known by a process only.
    pub fn locate_by_process(&mut self) -> (bool, bool) {
        let (mut found, mut missing) = (false, false);
        for container in self.seen.values_mut() {
            let starting = container.state == State::Created && container.has_own_namespace();
            let Some(cgroup) = container.cgroup.as_deref().filter(|_| starting) else { continue };
            let held = container.netns.as_deref();
            if held.is_some_and(|held| !sandbox::is_passing(held)) {
                continue;
            }
            let lasts = held.is_some_and(Path::exists);
            match self.places.netns(cgroup) {
                Some(netns) if !lasts || !sandbox::is_passing(&netns) => {
                    tracing::debug!(container = container.id, file = %netns.display(), "namespace found by a process");
                    // A process's path lasts as long as the process, and runc's come and go before the last becomes the
                    // app: it is looked at again until docker's own file is there.
                    missing |= sandbox::is_passing(&netns);
                    container.netns = Some(netns);
                    found = true;
                }
                // Without its cgroup it is not being started any more.
                _ => missing |= cgroup.is_dir(),
            }
        }
        (found, missing)
    }

    /// Looks into the namespaces of awsvpc tasks that have no address yet: the interface is moved in later. `true`:
    /// some still have none.
    pub fn locate_addresses(&mut self) -> bool {
        let without: Vec<PathBuf> = self
            .tasks()
            .into_iter()
            .filter(|task| task.mode == NetworkMode::Awsvpc && task.address.is_none())
            .filter_map(|task| task.netns)
            .collect();
        let mut missing = false;
        for netns in without {
            match sandbox::address(&netns) {
                Ok(Some(address)) => {
                    for owner in self.seen.values_mut().filter(|owner| owner.netns.as_ref() == Some(&netns)) {
                        owner.inner_address = Some(address);
                    }
                }
                Ok(None) => missing = true,
                Err(error) => {
                    missing = true;
                    tracing::debug!(error = &error as &dyn std::error::Error, "address of a task not read");
                }
            }
        }
        missing
    }

    /// Directories in which the cgroup of a container that is about to start will appear. In host mode it is the
    /// cgroup that tells a restart.
    pub fn cgroup_parents(&self) -> Vec<PathBuf> {
        let mut parents: Vec<PathBuf> = self
            .seen
            .values()
            .filter(|container| container.cgroup.is_none())
            .filter(|container| match container.state {
                State::Created => true,
                State::Dead { .. } => container.network == Network::Host,
                State::Running | State::Paused => false,
            })
            .flat_map(|container| self.places.parents(&container.cgroup_parent))
            .collect();
        parents.sort();
        parents.dedup();
        parents
    }
}

impl Seen {
    /// What inspect does not know, or knows under another name, stays as it was.
    fn keep(&mut self, before: Self) {
        // The same namespace may have several paths. Docker's lasts; a process's may be gone already.
        let passing = before.netns.as_deref().is_some_and(sandbox::is_passing);
        self.netns = if passing { self.netns.take().or(before.netns) } else { before.netns.or(self.netns.take()) };
        self.pid = self.pid.or(before.pid);
        self.cgroup = before.cgroup;
        self.inner_address = before.inner_address;
        self.stopping |= before.stopping;
    }

    fn signalled(&mut self, at: i128, signal: Option<&str>) {
        if !self.is_dead() && at > self.started && signal.is_none_or(|signal| self.is_ended_by(signal)) {
            self.stopping = true;
        }
    }

    fn ended(&mut self, failed: bool) {
        self.state = State::Dead { failed };
        self.stopping = false;
        self.pid = None;
        self.netns = None;
        self.cgroup = None;
        self.inner_address = None;
    }

    /// What is dead has started again.
    fn revive(&mut self) {
        if self.is_dead() {
            self.state = State::Created;
            self.stopping = false;
        }
    }

    fn has_own_namespace(&self) -> bool {
        matches!(self.network, Network::Bridge | Network::None)
    }
}

/// `health_status: healthy` and its like. The outer `None`: not about health.
fn health(action: &str) -> Option<Option<ContainerHealth>> {
    match action.strip_prefix("health_status")?.trim_start_matches(':').trim() {
        "healthy" => Some(Some(ContainerHealth::Healthy)),
        "unhealthy" => Some(Some(ContainerHealth::Unhealthy)),
        "starting" => Some(Some(ContainerHealth::Starting)),
        "none" => Some(None),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
