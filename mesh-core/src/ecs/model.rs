//! A cluster as the ECS API shows it: services, tasks, container instances, task definitions.
//!
//! Must not know what is made of it.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use crate::{model::Protocol, task::NetworkMode};

/// Attributes of a container instance by which its operator says that there is an agent on it.
pub mod attribute {
    /// The address that other hosts reach it by.
    pub const ADDRESS: &str = "ecs-mesh.address";
    /// The port of its tunnels.
    pub const TUNNEL_PORT: &str = "ecs-mesh.tunnel-port";
}

/// Everything known of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// By name.
    pub services: BTreeMap<String, Service>,
    /// Those that are to run, ordered by ARN.
    pub tasks: Vec<Task>,
    /// Container instances, by ARN.
    pub instances: BTreeMap<String, Instance>,
    /// Task definitions, by ARN. A revision never changes.
    pub definitions: BTreeMap<String, Arc<Definition>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Deployments and task sets, by id: `ecs-svc/…`.
    pub deployments: BTreeMap<String, Deployment>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deployment {
    /// `PRIMARY`, `ACTIVE` or `DRAINING`.
    pub status: String,
    /// Of a task set: the id that whoever deploys has given it.
    pub external_id: Option<String>,
    /// Service Connect: ports that have names.
    pub connects: Vec<Connect>,
}

/// A port that Service Connect gives a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// The name of the port in the task definition.
    pub port_name: String,
    /// Name and port that clients use.
    pub aliases: Vec<(String, u16)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub arn: String,
    /// `None`: no service has started it.
    pub service: Option<String>,
    /// ARN of its definition.
    pub definition: String,
    /// Id of its deployment or task set.
    pub deployment: Option<String>,
    /// ARN of its container instance; `None`: there is none, as on Fargate.
    pub instance: Option<String>,
    pub zone: Option<String>,
    pub launch_type: String,
    pub state: State,
    /// Of its ENI.
    pub address: Option<IpAddr>,
    /// TCP only.
    pub bindings: Vec<Binding>,
    pub tags: BTreeMap<String, String>,
}

/// A port of a container that its host publishes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Binding {
    /// The container's name.
    pub container: String,
    pub port: u16,
    pub host_port: u16,
}

/// Whether a task serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does not run yet, or not any more, or is told to stop.
    Not,
    Running(Checked),
}

/// What the task's own health checks say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    Healthy,
    /// Nothing: there are none, or they have not come to a result.
    Unknown,
    Unhealthy,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    pub ec2_id: Option<String>,
    pub attributes: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    pub family: String,
    pub revision: u32,
    pub mode: NetworkMode,
    pub containers: Vec<Container>,
    /// Whether a container has a health check.
    pub is_checked: bool,
}

impl Definition {
    /// Of all containers.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.containers.iter().flat_map(|container| &container.ports)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    pub name: String,
    /// TCP only.
    pub ports: Vec<Port>,
    /// Docker labels.
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub container: u16,
    /// For Service Connect.
    pub name: Option<String>,
    pub protocol: Option<Protocol>,
}
