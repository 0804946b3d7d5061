//! Tasks of this host as the container runtime shows them.
//!
//! Must not know how they were observed (that is `mesh-agent::tasks`), nor what the mesh decides about them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use crate::id::{ClusterName, TaskId};

/// Everything observed about one task. Containers of one ECS task are one `Task`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub id: TaskId,
    /// Label `com.amazonaws.ecs.cluster`.
    pub cluster: Option<ClusterName>,
    /// Label `com.amazonaws.ecs.task-definition-family`, or the container's name when ECS did not start it.
    pub family: String,
    pub mode: NetworkMode,
    pub phase: Phase,
    /// In the order in which they were created.
    pub containers: Vec<Container>,
    /// The task's own address: the container's on the docker bridge, or the ENI's. `None` in host mode.
    pub address: Option<IpAddr>,
    /// The file whose opening gives the network namespace (docker's `SandboxKey`, or `/proc/<pid>/ns/net`).
    /// `None` in host mode and until the sandbox exists.
    pub netns: Option<PathBuf>,
    /// Docker labels of all containers together; for equal keys the first container wins.
    pub labels: BTreeMap<String, String>,
}

/// One container of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The full id, 64 hex digits.
    pub id: String,
    /// Label `com.amazonaws.ecs.container-name`, or docker's name.
    pub name: String,
    /// TCP ports that the image or task definition exposes.
    pub exposed: Vec<u16>,
    /// Published TCP ports.
    pub published: Vec<Published>,
    /// cgroup of the container, below the cgroup2 root, once known. Only host mode needs it.
    pub cgroup: Option<PathBuf>,
    /// pid in the agent's pid namespace while it runs.
    pub pid: Option<u32>,
    /// Docker's own health, where the image or task definition has a health check.
    pub health: Option<ContainerHealth>,
}

/// A container port and the host address it can be reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Published {
    pub container_port: u16,
    pub host: SocketAddr,
}

/// How the task is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkMode {
    Bridge,
    Awsvpc,
    Host,
    /// No network: nothing to do.
    None,
}

/// Where in its life the task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Created, first instruction not yet run: to be armed, not yet an endpoint.
    Created,
    Running,
    /// Told to stop, or its essential container died: no new connections to it.
    Stopping,
}

/// Docker's verdict on a container with a health check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerHealth {
    Starting,
    Healthy,
    Unhealthy,
}
