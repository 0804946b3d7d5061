//! Tasks as the ECS agent makes them: labels, cgroup parents, names, network modes.
//!
//! Source of the shapes: amazon-ecs-agent, `agent/engine/docker_task_engine.go` (labels, names, pause containers) and
//! `agent/api/task/task_linux.go` (cgroup parents). It must not know the mesh; its labels come from the caller.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    engine::{ContainerSpec, Network},
    host::Host,
    process::{Output, output, run},
    vpc::Vpc,
};

/// ECS cluster of all tasks of the lab.
const CLUSTER: &str = "demo";
const PAUSE: &str = "~internal~ecs~pause";
/// ECS waits thirty seconds by default; the lab's programs need less.
const GRACE: Duration = Duration::from_secs(2);

/// Network mode of a task definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A namespace behind docker0; ports published on dynamic host ports.
    Bridge,
    /// A namespace with an interface and an address of its own on the network.
    Awsvpc,
    /// The host's own namespace.
    Host,
}

/// What a task definition says.
#[derive(Clone, Debug)]
pub struct TaskSpec {
    pub family: String,
    pub mode: Mode,
    pub image: String,
    /// The container's command.
    pub command: Vec<String>,
    /// Container ports; published in bridge mode.
    pub ports: Vec<u16>,
    /// Docker labels besides those of ECS.
    pub labels: Vec<(String, String)>,
    /// What `docker stop` sends first; `None`: SIGTERM.
    pub stop_signal: Option<String>,
}

impl TaskSpec {
    /// A task of one container without ports, in bridge mode.
    #[must_use]
    pub fn new(family: &str, image: &str, command: &[&str]) -> Self {
        Self {
            family: family.to_owned(),
            mode: Mode::Bridge,
            image: image.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            ports: Vec::new(),
            labels: Vec::new(),
            stop_signal: None,
        }
    }

    #[must_use]
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.ports.push(port);
        self
    }

    /// As an image's `STOPSIGNAL`.
    #[must_use]
    pub fn stop_signal(mut self, name: &str) -> Self {
        self.stop_signal = Some(name.to_owned());
        self
    }

    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }
}

/// A container port and where it is reached from other hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    pub container: u16,
    pub at: SocketAddrV4,
}

/// A running task.
#[derive(Clone, Debug)]
pub struct Task {
    /// Last segment of the ARN, 32 hex digits.
    pub id: String,
    pub family: String,
    pub mode: Mode,
    /// Docker's id of the app container.
    pub container: String,
    /// Docker's id of the pause container; awsvpc only.
    pub pause: Option<String>,
    /// The host's address, or the task's own in awsvpc mode.
    pub address: Ipv4Addr,
    pub ports: Vec<Published>,
    /// When Docker was asked to start the app container, and when it said that it had.
    pub asked: Instant,
    pub started: Instant,
}

impl Task {
    /// Where a container port is reached from other hosts.
    #[must_use]
    pub fn published(&self, container: u16) -> Option<SocketAddrV4> {
        self.ports.iter().find(|each| each.container == container).map(|each| each.at)
    }
}

impl Host {
    /// Starts a task as the ECS agent would.
    ///
    /// # Errors
    /// Docker refuses it, or the container ends at once.
    pub fn run_task(&self, spec: &TaskSpec) -> Result<Task> {
        let id = new_id()?;
        let (pause, address) = match spec.mode {
            Mode::Bridge | Mode::Host => (None, self.address()),
            Mode::Awsvpc => self.pause(spec, &id).map(|(pause, address)| (Some(pause), address))?,
        };
        let network = match (spec.mode, &pause) {
            (Mode::Awsvpc, Some(pause)) => Network::Of(pause.clone()),
            (Mode::Host, _) => Network::Host,
            (Mode::Bridge | Mode::Awsvpc, _) => Network::Bridge,
        };
        let mut container = container(spec, &id, &spec.family, network, &spec.command);
        container.ports.clone_from(&spec.ports);
        container.labels.extend_from_slice(&spec.labels);
        container.stop_signal.clone_from(&spec.stop_signal);
        let asked = Instant::now();
        let container = self.start_container(&container)?;
        let started = Instant::now();
        let ports = match spec.mode {
            Mode::Bridge => self.published(&container, &spec.ports)?,
            Mode::Awsvpc | Mode::Host => spec.ports.iter().map(|&port| (port, port)).collect(),
        };
        let ports =
            ports.into_iter().map(|(container, port)| Published { container, at: SocketAddrV4::new(address, port) });
        Ok(Task {
            id,
            family: spec.family.clone(),
            mode: spec.mode,
            container,
            pause,
            address,
            ports: ports.collect(),
            asked,
            started,
        })
    }

    /// Stops a task as the ECS agent would, and removes its containers and its cgroup.
    ///
    /// # Errors
    /// Docker refuses it.
    pub fn stop_task(&self, task: &Task) -> Result<()> {
        self.stop_container(&task.container, GRACE)?;
        if let Some(pause) = &task.pause {
            self.stop_container(pause, GRACE)?;
        }
        let slice = self.cgroup().join("ecstasks.slice").join(slice(&task.id));
        fs::remove_dir(&slice).with_context(|| format!("cannot remove the cgroup {}", slice.display()))
    }

    /// A command inside the task's container, as `docker exec` starts it.
    ///
    /// # Errors
    /// There is no such container.
    pub fn command_in(&self, task: &Task, argv: &[&str]) -> Result<Command> {
        self.container_command(&task.container, argv)
    }

    /// Runs a command inside the task's container to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn exec_in(&self, task: &Task, argv: &[&str]) -> Result<Output> {
        output(&mut self.command_in(task, argv)?)
    }

    /// Runs a command inside the task's container that must succeed, and returns its standard output.
    ///
    /// # Errors
    /// It ends with another code than 0.
    pub fn run_in(&self, task: &Task, argv: &[&str]) -> Result<String> {
        run(&mut self.command_in(task, argv)?)
    }

    /// Starts the pause container of an awsvpc task and gives its namespace an interface on the network.
    fn pause(&self, spec: &TaskSpec, id: &str) -> Result<(String, Ipv4Addr)> {
        let command = ["sleep".to_owned(), "2147483647".to_owned()];
        let pause = self.start_container(&container(spec, id, PAUSE, Network::None, &command))?;
        // As the host's own processes see it.
        let pid = self.container_pid(&pause)?;
        let address = self.vpc().next_eni();
        let (length, gateway) = Vpc::subnet();
        let eni = format!("eni{}", address.octets()[3]);
        self.vpc().plug(&format!("port-{eni}"), self.pid(), &eni)?;
        self.run(&["ip", "link", "set", &eni, "netns", &pid, "name", "eth0"])?;
        for line in [
            "link set lo up".to_owned(),
            format!("addr add {address}/{length} dev eth0"),
            "link set eth0 up".to_owned(),
            format!("route add default via {gateway}"),
        ] {
            let mut argv = vec!["nsenter", "-t", &pid, "-n", "ip"];
            argv.extend(line.split(' '));
            self.run(&argv)?;
        }
        Ok((pause, address))
    }
}

/// A container of a task, with the labels that ECS gives it.
fn container(spec: &TaskSpec, id: &str, name: &str, network: Network, command: &[String]) -> ContainerSpec {
    let label = |key: &str, value: &str| (format!("com.amazonaws.ecs.{key}"), value.to_owned());
    ContainerSpec {
        name: format!("ecs-{}-1-{}-{}", spec.family, name.replace('~', ""), &id[..20]),
        labels: vec![
            label("task-arn", &format!("arn:aws:ecs:eu-west-1:123456789012:task/{CLUSTER}/{id}")),
            label("container-name", name),
            label("task-definition-family", &spec.family),
            label("task-definition-version", "1"),
            label("cluster", CLUSTER),
        ],
        network,
        cgroup_parent: format!("/ecstasks.slice/{}", slice(id)),
        ports: Vec::new(),
        image: spec.image.clone(),
        command: command.to_vec(),
        stop_signal: None,
    }
}

fn slice(id: &str) -> String {
    format!("ecstasks-{id}.slice")
}

/// 32 hex digits, as in a task ARN.
pub(crate) fn new_id() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot read a random id")?;
    Ok(uuid.trim().replace('-', ""))
}
