//! One container: what docker's inspect says of it, cut down to what the mesh needs.
//!
//! Pure. The only file that knows the shape of docker's answers. Must not know of tasks or of the file system.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use bollard::models::{
    ContainerInspectResponse, ContainerState, ContainerStateStatusEnum, ContainerSummary, ContainerSummaryStateEnum,
    HealthStatusEnum, NetworkSettings, PortMap,
};
use mesh_core::task::{ContainerHealth, Published};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// ECS's labels (amazon-ecs-agent, agent/engine/docker_task_engine.go).
pub const TASK_ARN: &str = "com.amazonaws.ecs.task-arn";
pub const CONTAINER_NAME: &str = "com.amazonaws.ecs.container-name";
pub const FAMILY: &str = "com.amazonaws.ecs.task-definition-family";
pub const CLUSTER: &str = "com.amazonaws.ecs.cluster";
/// The container that only holds an awsvpc task's namespace. With `-<container>` behind it, it holds the namespace of
/// one container in bridge mode (Service Connect).
pub const PAUSE: &str = "~internal~ecs~pause";

/// A container as last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The full id.
    pub id: String,
    /// Docker's name, without the leading slash.
    pub name: String,
    /// Nanoseconds since 1970, as all times here.
    pub created: i128,
    /// When it was last started.
    pub started: i128,
    /// When docker was asked for this.
    pub as_of: i128,
    pub labels: BTreeMap<String, String>,
    pub network: Network,
    /// `HostConfig.CgroupParent`; empty: docker's default.
    pub cgroup_parent: String,
    /// Whether it publishes ports, which is known before the ports are.
    pub publishes: bool,
    pub exposed: Vec<u16>,
    pub published: Vec<Published>,
    /// On docker's own networks.
    pub address: Option<IpAddr>,
    pub state: State,
    /// Told to stop, by a signal that ends it.
    pub stopping: bool,
    pub health: Option<ContainerHealth>,
    /// Number of the signal that asks it to end.
    pub stop_signal: i32,
    pub pid: Option<u32>,
    /// Docker's `SandboxKey`, or found earlier.
    pub netns: Option<PathBuf>,
    /// Found in the file system.
    pub cgroup: Option<PathBuf>,
    /// Found inside the namespace, where docker gave it no address.
    pub inner_address: Option<IpAddr>,
}

/// `HostConfig.NetworkMode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    Host,
    None,
    /// The default bridge or any network made by the user.
    Bridge,
    /// In the namespace of another container, by its id or name.
    Of(String),
}

/// Where in its life a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not yet, or not again, running.
    Created,
    Running,
    /// Frozen: it answers nobody.
    Paused,
    Dead {
        /// It ended with a code other than 0.
        failed: bool,
    },
}

impl Seen {
    /// Reads an inspect answer. `None` without an id. Ports published on all addresses are given as `host`'s.
    pub fn read(inspect: ContainerInspectResponse, host: IpAddr, as_of: i128) -> Option<Self> {
        let id = inspect.id?;
        let state = inspect.state.unwrap_or_default();
        let config = inspect.config.unwrap_or_default();
        let host_config = inspect.host_config.unwrap_or_default();
        let network = inspect.network_settings.unwrap_or_default();
        let life = State::read(&state);
        // Docker remembers the sandbox of what has stopped.
        let sandbox = network.sandbox_key.clone().filter(|key| !key.is_empty() && !matches!(life, State::Dead { .. }));
        Some(Self {
            name: inspect.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            created: inspect.created.as_deref().map_or(0, nanoseconds),
            started: state.started_at.as_deref().map_or(0, nanoseconds),
            as_of,
            labels: labels(config.labels.unwrap_or_default(), &config.env.unwrap_or_default()),
            network: Network::read(host_config.network_mode.as_deref().unwrap_or_default()),
            cgroup_parent: host_config.cgroup_parent.unwrap_or_default(),
            publishes: host_config.port_bindings.is_some_and(|bindings| !bindings.is_empty()),
            exposed: exposed(&config.exposed_ports.unwrap_or_default()),
            published: published(network.ports.as_ref(), host),
            address: address(&network),
            stopping: state.status == Some(ContainerStateStatusEnum::STOPPING),
            health: health(&state),
            stop_signal: config.stop_signal.as_deref().and_then(signal).unwrap_or(nix::libc::SIGTERM),
            pid: state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0),
            netns: sandbox.map(PathBuf::from),
            cgroup: None,
            inner_address: None,
            state: life,
            id,
        })
    }

    /// Reads an entry of a list about a container that has not started: less than inspect says, but docker's lists wait
    /// for nobody. `None` for one that has.
    pub fn glance(summary: ContainerSummary, as_of: i128) -> Option<Self> {
        if summary.state != Some(ContainerSummaryStateEnum::CREATED) {
            return None;
        }
        let labels: BTreeMap<String, String> = summary.labels.unwrap_or_default().into_iter().collect();
        // Lists do not name the parent, but ECS names it after the task (amazon-ecs-agent, task_linux.go).
        let task = labels.get(TASK_ARN).and_then(|arn| arn.rsplit('/').next());
        Some(Self {
            id: summary.id?,
            name: summary.names?.first()?.trim_start_matches('/').to_owned(),
            // Lists tell the second only.
            created: as_of,
            started: 0,
            as_of,
            network: Network::read(summary.host_config?.network_mode.as_deref()?),
            cgroup_parent: task.map(|task| format!("ecstasks-{task}.slice")).unwrap_or_default(),
            labels,
            publishes: false,
            exposed: Vec::new(),
            published: Vec::new(),
            address: None,
            state: State::Created,
            stopping: false,
            health: None,
            stop_signal: nix::libc::SIGTERM,
            pid: None,
            netns: None,
            cgroup: None,
            inner_address: None,
        })
    }

    /// Its name in the task definition, else docker's.
    pub fn title(&self) -> &str {
        self.labels.get(CONTAINER_NAME).map_or(&self.name, |name| name)
    }

    /// Whether it neither runs nor will.
    pub fn is_dead(&self) -> bool {
        matches!(self.state, State::Dead { .. })
    }

    /// Whether a signal (number or name) asks this container to end, rather than, say, to read its files again.
    pub fn is_ended_by(&self, number: &str) -> bool {
        use nix::libc::{SIGABRT, SIGINT, SIGKILL, SIGQUIT, SIGTERM};
        signal(number).is_none_or(|number| {
            number == self.stop_signal || [SIGABRT, SIGINT, SIGKILL, SIGQUIT, SIGTERM].contains(&number)
        })
    }
}

impl Network {
    fn read(mode: &str) -> Self {
        match mode.split_once(':') {
            Some(("container", other)) => Self::Of(other.to_owned()),
            _ => match mode {
                "host" => Self::Host,
                "none" => Self::None,
                _ => Self::Bridge,
            },
        }
    }
}

impl State {
    fn read(state: &ContainerState) -> Self {
        let failed = state.exit_code.is_some_and(|code| code != 0);
        match state.status {
            Some(ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::STOPPING) => Self::Running,
            Some(ContainerStateStatusEnum::PAUSED) => Self::Paused,
            Some(
                ContainerStateStatusEnum::EXITED | ContainerStateStatusEnum::DEAD | ContainerStateStatusEnum::REMOVING,
            ) => Self::Dead { failed },
            // Docker could not start it, for a command that does not exist, say. Its namespace is gone unless we keep it.
            Some(ContainerStateStatusEnum::CREATED) if failed => Self::Dead { failed },
            Some(
                ContainerStateStatusEnum::CREATED
                | ContainerStateStatusEnum::RESTARTING
                | ContainerStateStatusEnum::EMPTY,
            )
            | None => Self::Created,
        }
    }
}

/// Labels, and the environment variables that are taken for such where no label has the name: registrator's convention
/// (`SERVICE_NAME`, `SERVICE_8080_TAGS`) allows both.
fn labels(labels: impl IntoIterator<Item = (String, String)>, env: &[String]) -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> = labels.into_iter().collect();
    let variables = env.iter().filter(|variable| variable.starts_with("SERVICE_"));
    for (name, value) in variables.filter_map(|variable| variable.split_once('=')) {
        all.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    all
}

/// Docker trims zeros from the fraction, so the text itself does not sort.
fn nanoseconds(created: &str) -> i128 {
    OffsetDateTime::parse(created, &Rfc3339).map_or(0, OffsetDateTime::unix_timestamp_nanos)
}

fn health(state: &ContainerState) -> Option<ContainerHealth> {
    match state.health.as_ref()?.status? {
        HealthStatusEnum::STARTING => Some(ContainerHealth::Starting),
        HealthStatusEnum::HEALTHY => Some(ContainerHealth::Healthy),
        HealthStatusEnum::UNHEALTHY => Some(ContainerHealth::Unhealthy),
        HealthStatusEnum::NONE | HealthStatusEnum::EMPTY => None,
    }
}

/// `8080/tcp` to 8080; other protocols are not ours.
fn tcp(port: &str) -> Option<u16> {
    match port.split_once('/') {
        Some((number, "tcp")) => number.parse().ok(),
        Some(_) => None,
        None => port.parse().ok(),
    }
}

fn exposed(ports: &[String]) -> Vec<u16> {
    let mut numbers: Vec<u16> = ports.iter().filter_map(|port| tcp(port)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

fn published(ports: Option<&PortMap>, host: IpAddr) -> Vec<Published> {
    let mut found = Vec::new();
    for (port, bindings) in ports.into_iter().flatten() {
        let Some(container_port) = tcp(port) else { continue };
        for binding in bindings.iter().flatten() {
            let Some(host_port) = binding.host_port.as_deref().and_then(|port| port.parse().ok()) else { continue };
            let ip = match binding.host_ip.as_deref().map(str::parse::<IpAddr>) {
                Some(Ok(ip)) if !ip.is_unspecified() => ip,
                _ => host,
            };
            found.push(Published { container_port, host: SocketAddr::new(ip, host_port) });
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// The address on the network whose name comes first, IPv4 before IPv6.
fn address(network: &NetworkSettings) -> Option<IpAddr> {
    let networks: BTreeMap<_, _> = network.networks.iter().flatten().collect();
    let parse = |text: &Option<String>| text.as_deref().and_then(|text| text.parse::<IpAddr>().ok());
    networks
        .values()
        .find_map(|endpoint| parse(&endpoint.ip_address))
        .or_else(|| networks.values().find_map(|endpoint| parse(&endpoint.global_ipv6_address)))
}

/// `15`, `SIGTERM` or `TERM` to 15.
fn signal(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    // Real-time signals, such as systemd's SIGRTMIN+3, count from 34 as docker sees them.
    if let Some(offset) = name.strip_prefix("SIGRTMIN") {
        return offset.trim_start_matches('+').parse::<i32>().ok().or(offset.is_empty().then_some(0)).map(|n| 34 + n);
    }
    name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}
