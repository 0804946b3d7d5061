//! When a task of this host may be called: what its probes have come to, and which of its ports count as ready.
//!
//! A task is used once its container health is well and the probe of the port has passed; without a health check and
//! without a word from anybody the probe is a TCP connection. [`settings`] says which probe it is, [`replace`] which
//! task is stopped, [`grpc`] is the one protocol that is spoken here. Must not know how a probe is made.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    id::TaskId,
    task::{Container, ContainerHealth, Task},
};

pub mod grpc;
pub mod replace;
pub mod settings;

pub use settings::{Check, Readiness, Settings};

/// The shortest and the longest pause between two probes of a task that starts.
const BRISK: Duration = Duration::from_millis(5);
const LEISURE: Duration = Duration::from_secs(1);
/// A probe while a task starts comes after one part in so many of the time that it has been starting: being found ready
/// late costs a task little of the time that it took, and a slow one is not asked hundreds of times.
const PART: u32 = 20;

/// Which ports of this host's tasks have passed their probes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Gate {
    /// Nobody probes (yet): tasks count as the container runtime shows them.
    #[default]
    Open,
    /// These, each for as long as the same processes serve it.
    Probed(Arc<BTreeMap<(TaskId, u16), Incarnation>>),
}

impl Gate {
    /// Whether the container port of the task is ready as far as probes are concerned.
    pub fn admits(&self, task: &Task, port: u16) -> bool {
        match self {
            Self::Open => true,
            Self::Probed(passed) => {
                passed.get(&(task.id.clone(), port)).is_some_and(|probed| *probed == Incarnation::of(task, port))
            }
        }
    }
}

/// Which processes serve a port: a container that was started again is another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Incarnation(Vec<u32>);

impl Incarnation {
    /// Those of the containers that serve the port, by what they expose or publish; of all where none is known to.
    pub fn of(task: &Task, port: u16) -> Self {
        Self(servers(task, port).filter_map(|container| container.pid).collect())
    }
}

/// The containers of the task that expose or publish the port; all where none does.
pub fn servers(task: &Task, port: u16) -> impl Iterator<Item = &Container> {
    let serves = move |container: &Container| {
        container.exposed.contains(&port) || container.published.iter().any(|it| it.container_port == port)
    };
    let known = task.containers.iter().any(serves);
    task.containers.iter().filter(move |container| !known || serves(container))
}

/// What the probes of one port have come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    state: State,
    /// Probes in a row that spoke against the state.
    streak: u32,
    since: Duration,
    due: Option<Duration>,
}

/// Where a port stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was in use before anybody here had probed it: the first probe decides.
    Presumed,
    /// It has not been ready yet, as far as anybody here has seen.
    Starting,
    Ready,
    /// It was ready.
    Failing,
}

impl Standing {
    /// Nothing was probed yet. `presumed`: it is in use already, and stays so until a probe fails.
    pub fn begin(presumed: bool, now: Duration) -> Self {
        let state = if presumed { State::Presumed } else { State::Starting };
        Self { state, streak: 0, since: now, due: Some(now) }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// Since when it has been in its state.
    pub fn since(&self) -> Duration {
        self.since
    }

    /// When to probe next; `None`: not again.
    pub fn due(&self) -> Option<Duration> {
        self.due
    }

    pub fn is_ready(&self) -> bool {
        match self.state {
            State::Presumed | State::Ready => true,
            State::Starting | State::Failing => false,
        }
    }

    /// After a probe that ended now.
    #[must_use]
    pub fn probed(self, passed: bool, now: Duration, settings: &Settings) -> Self {
        let Self { state, streak, since, due: _ } = self;
        let against = passed != self.is_ready();
        let streak = if against { streak.saturating_add(1) } else { 0 };
        let (next, needed) = match (state, passed) {
            (State::Presumed, true) | (State::Ready, _) if passed => (State::Ready, 0),
            // Perhaps it has only begun.
            (State::Presumed, _) => (State::Starting, 1),
            (State::Ready, _) => (State::Failing, settings.failures),
            (State::Starting | State::Failing, true) => (State::Ready, settings.successes),
            (State::Starting | State::Failing, false) => (state, 0),
        };
        let (state, streak, since) = match next {
            next if next == state || streak < needed => (state, streak, since),
            next => (next, 0, now),
        };
        let pause = match state {
            State::Ready if !settings.check.goes_on() => None,
            State::Starting => Some(pace(now.saturating_sub(since)).min(settings.interval)),
            State::Presumed | State::Ready | State::Failing => Some(settings.interval),
        };
        Self { state, streak, since, due: pause.map(|pause| now.saturating_add(pause)) }
    }
}

/// Why nobody is sent to a port of a running task; `None`: it is ready. `probe` is what its probes have come to, and what
/// was wrong with the last one; without it, it is not probed.
pub fn unready(task: &Task, probe: Option<(Standing, Option<&str>)>) -> Option<String> {
    let ill = |container: &Container| match container.health? {
        ContainerHealth::Healthy => None,
        ContainerHealth::Starting => {
            Some(format!("the health check of the container {} has not passed yet", container.name))
        }
        ContainerHealth::Unhealthy => Some(format!("docker calls the container {} unhealthy", container.name)),
    };
    task.containers.iter().find_map(ill).or_else(|| {
        let (standing, problem) = probe.filter(|(standing, _)| !standing.is_ready())?;
        let state = if standing.state() == State::Failing { "it was ready" } else { "it has not been ready yet" };
        Some(match problem {
            Some(problem) => format!("{state}: {problem}"),
            None => "the first probe has not ended yet".to_owned(),
        })
    })
}

/// The pause between two probes of a task that has been starting for so long.
fn pace(starting: Duration) -> Duration {
    (starting / PART).clamp(BRISK, LEISURE)
}

#[cfg(test)]
mod tests;
