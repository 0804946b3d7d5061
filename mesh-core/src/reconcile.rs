//! Desired and observed state of the host to ordered actions; idempotent. At rest it returns nothing.
//!
//! A failed action is not remembered: the next observation shows it, and it is asked for again. Must not know how
//! an action is performed.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use crate::{
    id::TaskId,
    model::Snapshot,
    task::{NetworkMode, Task},
};

/// What the agent has armed so far, as it holds it in its own hands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Armed {
    /// Namespaces with listeners and a kernel entry, by the task that they were opened for.
    pub namespaces: BTreeMap<TaskId, ArmedNamespace>,
    /// cgroups of host-mode containers with a kernel entry.
    pub cgroups: BTreeMap<PathBuf, u32>,
    /// Whether the host's own namespace has listeners (needed while a host-mode task is enrolled).
    pub host: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArmedNamespace {
    pub netns: PathBuf,
    pub workload: u32,
    pub mode: NetworkMode,
}

/// One thing to do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Enter the namespace, make listeners, then tell the kernel.
    ArmNamespace {
        task: TaskId,
        netns: PathBuf,
        workload: u32,
        mode: NetworkMode,
    },
    /// Tell the kernel first, then close the listeners.
    DisarmNamespace {
        task: TaskId,
    },
    ArmHost,
    DisarmHost,
    ArmCgroup {
        cgroup: PathBuf,
        workload: u32,
    },
    DisarmCgroup {
        cgroup: PathBuf,
    },
}

/// What has to be done so that exactly the enrolled tasks are armed.
///
/// `gone` are namespaces and cgroups that turned out not to exist any more when arming was tried; they are left
/// alone while the task is still observed with them.
///
/// Disarming comes before arming: one namespace may pass from one task to another. A task is armed in every phase of
/// its life, from the moment its namespace or cgroup is known.
pub fn reconcile(tasks: &[Task], snapshot: &Snapshot, armed: &Armed, gone: &BTreeSet<PathBuf>) -> Vec<Action> {
    let wanted = wanted(tasks, snapshot, armed);
    let mut actions = Vec::new();
    for cgroup in armed.cgroups.keys() {
        if wanted.cgroups.get(cgroup) != armed.cgroups.get(cgroup) {
            actions.push(Action::DisarmCgroup { cgroup: cgroup.clone() });
        }
    }
    for (task, namespace) in &armed.namespaces {
        if wanted.namespaces.get(task) != Some(namespace) {
            actions.push(Action::DisarmNamespace { task: task.clone() });
        }
    }
    match (armed.host, wanted.host) {
        (true, false) => actions.push(Action::DisarmHost),
        (false, true) => actions.push(Action::ArmHost),
        (true, true) | (false, false) => {}
    }
    for (task, namespace) in wanted.namespaces {
        if armed.namespaces.get(&task) != Some(&namespace) && !gone.contains(&namespace.netns) {
            let ArmedNamespace { netns, workload, mode } = namespace;
            actions.push(Action::ArmNamespace { task, netns, workload, mode });
        }
    }
    for (cgroup, workload) in wanted.cgroups {
        if armed.cgroups.get(&cgroup) != Some(&workload) && !gone.contains(&cgroup) {
            actions.push(Action::ArmCgroup { cgroup, workload });
        }
    }
    actions
}

/// What is to be armed, as if everything could be.
fn wanted(tasks: &[Task], snapshot: &Snapshot, armed: &Armed) -> Armed {
    let mut wanted = Armed::default();
    let enrolled: BTreeMap<&TaskId, &Task> =
        tasks.iter().filter(|task| snapshot.workloads.contains_key(&task.id)).map(|task| (&task.id, task)).collect();
    // The kernel knows one workload per namespace. Where two tasks show the same one, whoever has it keeps it.
    let mut owners: BTreeMap<&PathBuf, &TaskId> = BTreeMap::new();
    for (id, task) in &enrolled {
        let (Some(netns), true) = (&task.netns, has_own_namespace(task.mode)) else { continue };
        let holds = armed.namespaces.get(*id).is_some_and(|namespace| namespace.netns == *netns);
        if holds || !owners.contains_key(netns) {
            owners.insert(netns, id);
        }
    }
    for (id, task) in enrolled {
        let Some(workload) = snapshot.workloads.get(id) else { continue };
        match (task.mode, &task.netns) {
            (NetworkMode::Bridge | NetworkMode::Awsvpc, Some(netns)) if owners.get(netns) == Some(&id) => {
                let namespace = ArmedNamespace { netns: netns.clone(), workload: workload.number, mode: task.mode };
                wanted.namespaces.insert(id.clone(), namespace);
            }
            (NetworkMode::Bridge | NetworkMode::Awsvpc | NetworkMode::None, _) => {}
            (NetworkMode::Host, _) => {
                wanted.host = true;
                for cgroup in task.containers.iter().filter_map(|container| container.cgroup.as_ref()) {
                    wanted.cgroups.entry(cgroup.clone()).or_insert(workload.number);
                }
            }
        }
    }
    wanted
}

fn has_own_namespace(mode: NetworkMode) -> bool {
    matches!(mode, NetworkMode::Bridge | NetworkMode::Awsvpc)
}

#[cfg(test)]
mod tests;
