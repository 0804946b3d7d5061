//! Containers to tasks: which belong together, how they are connected, where in their life they are.
//!
//! Pure: the same containers give the same tasks, in the same order. Must not know how containers were seen.

use std::collections::BTreeMap;

use mesh_core::{
    id::TaskId,
    task::{Container, NetworkMode, Phase, Task},
};

use super::container::{CLUSTER, CONTAINER_NAME, FAMILY, Network, PAUSE, Seen, State, TASK_ARN};

/// Digits of a container id that name a task of its own.
const ID_DIGITS: usize = 32;
/// Digits of a container id that tell the namespaces of one task apart.
const SHORT_DIGITS: usize = 12;
/// Namespace owners that are followed before giving up: docker allows a chain, but no loop.
const CHAIN: usize = 8;

/// All tasks, ordered by id. Containers of one ECS task are one task; where they do not share a namespace (several
/// containers in bridge mode), each further namespace is a task of its own, named `<task>-<container>`, because a
/// task has one namespace. The container with id `own`, the agent's, is left out.
pub fn assemble(seen: &BTreeMap<String, Seen>, own: Option<&str>) -> Vec<Task> {
    let mut groups: BTreeMap<(String, &str), Vec<&Seen>> = BTreeMap::new();
    for container in seen.values().filter(|container| own != Some(container.id.as_str())) {
        let owner = owner(seen, container);
        groups.entry((task_id(owner, container), &owner.id)).or_default().push(container);
    }
    // The namespace that bears the task's own name: one that publishes ports before one that does not, then the oldest.
    let mut first: BTreeMap<&str, ((bool, i128), &str)> = BTreeMap::new();
    for ((task, owner), members) in &groups {
        let rank = (
            !members.iter().any(|container| container.publishes),
            members.iter().map(|container| container.created).min().unwrap_or_default(),
        );
        let best = first.entry(task).or_insert((rank, owner));
        if (rank, *owner) < *best {
            *best = (rank, owner);
        }
    }
    let mut tasks: Vec<Task> = groups
        .iter()
        .filter_map(|((task, owner), members)| {
            let id = if first.get(task.as_str()).is_some_and(|(_, first)| first == owner) {
                task.parse().ok()?
            } else {
                format!("{task}-{}", short(owner, SHORT_DIGITS)).parse().ok()?
            };
            assemble_one(id, seen.get(*owner)?, members.clone())
        })
        .collect();
    tasks.sort_by(|a, b| a.id.cmp(&b.id));
    tasks
}

/// One namespace and the containers in it; `None` when nothing in it is alive.
fn assemble_one(id: TaskId, owner: &Seen, mut members: Vec<&Seen>) -> Option<Task> {
    members.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
    let shared = members.iter().any(|container| container.id != owner.id);
    let pause = is_pause(owner) || shared && owner.network == Network::None;
    let apps: Vec<&Seen> = members.iter().copied().filter(|container| !(pause && container.id == owner.id)).collect();
    let phase = phase(&apps, pause.then_some(owner))?;
    let mode = mode(owner, pause, shared);
    let live: Vec<&Seen> = apps.iter().copied().filter(|container| !container.is_dead()).collect();
    let mut labels = BTreeMap::new();
    for container in live.iter().chain(&apps).copied().chain([owner]) {
        for (key, value) in &container.labels {
            labels.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    let mut containers: Vec<Container> = live.iter().map(|container| convert(container)).collect();
    if let (true, Some(container)) = (pause, containers.first_mut()) {
        // A pause container publishes on behalf of the task.
        container.published.extend(&owner.published);
        container.exposed.extend(&owner.exposed);
        container.exposed.sort_unstable();
        container.exposed.dedup();
    }
    Some(Task {
        cluster: labels.get(CLUSTER).and_then(|name| short_name(name).parse().ok()),
        family: labels.get(FAMILY).cloned().unwrap_or_else(|| live.first().unwrap_or(&owner).name.clone()),
        mode,
        phase,
        address: match mode {
            NetworkMode::Bridge => owner.address,
            NetworkMode::Awsvpc => owner.inner_address.or(owner.address),
            NetworkMode::Host | NetworkMode::None => None,
        },
        netns: match mode {
            NetworkMode::Bridge | NetworkMode::Awsvpc => owner.netns.clone(),
            NetworkMode::Host | NetworkMode::None => None,
        },
        containers,
        labels,
        id,
    })
}

/// Whose namespace the container is in.
fn owner<'a>(seen: &'a BTreeMap<String, Seen>, container: &'a Seen) -> &'a Seen {
    let mut owner = container;
    for _ in 0..CHAIN {
        let Network::Of(other) = &owner.network else { break };
        let next = seen.get(other).or_else(|| {
            seen.values()
                .find(|candidate| candidate.name == *other || other.len() >= 12 && candidate.id.starts_with(other))
        });
        match next {
            Some(next) => owner = next,
            None => break,
        }
    }
    owner
}

fn task_id(owner: &Seen, container: &Seen) -> String {
    let arn = container.labels.get(TASK_ARN).or_else(|| owner.labels.get(TASK_ARN));
    match arn.map(|arn| short_name(arn)) {
        Some(task) if task.parse::<TaskId>().is_ok() => task.to_owned(),
        _ => short(&owner.id, ID_DIGITS).to_owned(),
    }
}

fn is_pause(container: &Seen) -> bool {
    container.title().starts_with(PAUSE)
}

fn mode(owner: &Seen, pause: bool, shared: bool) -> NetworkMode {
    let ecs = owner.labels.contains_key(TASK_ARN);
    // In bridge mode, Service Connect gives every container a pause container, and says so in its name.
    let for_one = owner.labels.get(CONTAINER_NAME).is_some_and(|name| name.starts_with(PAUSE) && name != PAUSE);
    match owner.network {
        Network::Host => NetworkMode::Host,
        Network::None if pause => NetworkMode::Awsvpc,
        Network::None => NetworkMode::None,
        Network::Bridge if !for_one && (owner.title() == PAUSE || ecs && shared) => NetworkMode::Awsvpc,
        Network::Bridge => NetworkMode::Bridge,
        // Its owner is gone or not seen yet; so is the namespace.
        Network::Of(_) => NetworkMode::Awsvpc,
    }
}

/// Where the containers together are in their life; `None`: it is over.
fn phase(apps: &[&Seen], pause: Option<&Seen>) -> Option<Phase> {
    let live: Vec<_> = apps.iter().filter(|container| !container.is_dead()).collect();
    if live.is_empty() {
        // A pause container outlives the others by a moment, and precedes them.
        let pause = pause.filter(|pause| !pause.is_dead())?;
        let over = !apps.is_empty() || pause.stopping;
        return Some(if over { Phase::Stopping } else { Phase::Created });
    }
    // Docker does not know which container is essential: one that was a server and failed is taken for it.
    let failed = apps.iter().any(|container| {
        container.state == State::Dead { failed: true } && (container.publishes || !container.exposed.is_empty())
    });
    let told = live.iter().any(|container| container.stopping || container.state == State::Paused)
        || pause.is_some_and(|pause| pause.stopping || pause.is_dead());
    Some(if failed || told {
        Phase::Stopping
    } else if live.iter().any(|container| container.state == State::Running) {
        Phase::Running
    } else {
        Phase::Created
    })
}

fn convert(container: &Seen) -> Container {
    Container {
        id: container.id.clone(),
        name: container.title().to_owned(),
        exposed: container.exposed.clone(),
        published: container.published.clone(),
        cgroup: container.cgroup.clone(),
        pid: container.pid,
        health: container.health,
    }
}

/// The last segment of an ARN, or of a name.
fn short_name(arn: &str) -> &str {
    arn.rsplit('/').next().unwrap_or(arn)
}

fn short(id: &str, digits: usize) -> &str {
    id.get(..digits).unwrap_or(id)
}

#[cfg(test)]
mod tests;
