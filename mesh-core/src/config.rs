//! The agent's configuration, checked: what the rest of the program uses.
//!
//! `config/example.toml` is the file with all its keys and defaults, `config/check.rs` turns a file into this and
//! reports all faults at once. Nothing reads the environment or the file afterwards.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::{
    document,
    id::{ClusterName, TrustDomain},
    model::{OnAgentDeath, TlsMode},
    readiness::Readiness,
};

pub mod aws;
pub(crate) mod check;
pub mod cloud_map;
pub mod discovery;
pub mod ecs;

/// One thing wrong with a document, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}; {remedy}")]
pub struct Fault {
    /// Path of the key, such as `dns.ttl`.
    pub path: String,
    pub problem: String,
    pub remedy: String,
}

/// The checked configuration of one agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub host: Host,
    pub enrol: Enrol,
    pub readiness: Readiness,
    pub docker: Docker,
    pub kernel: Kernel,
    pub proxy: Proxy,
    pub dns: Dns,
    pub vip: VipRanges,
    pub identity: Identity,
    /// The static file of services; watched.
    pub services_file: Option<PathBuf>,
    pub discovery: discovery::Discovery,
    pub admin: Admin,
    pub log: Log,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// Identity and label; `None` asks the ECS agent's introspection endpoint, then falls back to `default`.
    pub cluster: Option<ClusterName>,
    /// The address that other hosts reach this one by; `None`: source address of the default route.
    pub address: Option<std::net::IpAddr>,
    pub zone: Option<String>,
    /// Where VIPs and the lock live; default `/var/lib/ecs-mesh`.
    pub state_dir: PathBuf,
    /// The ECS agent's introspection endpoint; default `127.0.0.1:51678`.
    pub ecs_agent: SocketAddr,
}

/// Which tasks are in the mesh.
#[derive(Clone, Debug, PartialEq)]
pub struct Enrol {
    /// Whether a task without label `ecs-mesh.enabled` is enrolled.
    pub default: bool,
    /// Task families never enrolled.
    pub exclude: Vec<String>,
    /// Defaults of a service that says nothing itself.
    pub tls: TlsMode,
    pub on_agent_death: OnAgentDeath,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Docker {
    /// Default `/var/run/docker.sock`.
    pub socket: PathBuf,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Mount point of the cgroup2 hierarchy; `None`: found in /proc/self/mountinfo.
    pub cgroup_root: Option<PathBuf>,
    /// Directory on a bpffs for pinned programs and maps; default `/sys/fs/bpf/ecs-mesh`.
    pub pin_dir: PathBuf,
    /// Heartbeats older than this mean that the agent hangs; default 3 s.
    pub heartbeat_limit: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Proxy {
    /// Port of the listeners in the tasks' namespaces; default 15001.
    pub outbound_port: u16,
    /// Where tunnels are accepted; default `0.0.0.0:15008` (and the same port in awsvpc namespaces).
    pub tunnel_listen: SocketAddr,
    pub connect_timeout: Duration,
    /// How long existing connections may finish on stop; default 5 s.
    pub drain: Duration,
    /// Threads that carry connections. `None`: one for each CPU that the agent may use.
    pub threads: Option<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Dns {
    /// Port of the DNS listeners in the tasks' namespaces; default 15053.
    pub port: u16,
    /// TTL of mesh answers; default 5 s.
    pub ttl: Duration,
    /// Suffixes under which services are known besides the bare name, e.g. `mesh`, `service.consul`.
    pub suffixes: Vec<String>,
    /// Suffixes of other datacenters, and which: `world.service.dc2.consul`. Follows from `[discovery.consul]`.
    pub datacenters: Vec<(String, String)>,
    /// Whose reverse names are the mesh's. Follows from `[vip]`.
    pub vip: VipRanges,
    /// Search domains of the tasks. `None`: those of the host, which docker gives to tasks too.
    pub search: Option<Vec<String>>,
    /// Whether AAAA questions for mesh names are answered with the IPv6 VIP; default false.
    pub ipv6: bool,
    /// How long an upstream resolver may take; default 5 s.
    pub upstream_timeout: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct VipRanges {
    /// Default `240.240.0.0/16`.
    pub v4: Ipv4Net,
    /// Default `fd65:6373:6d65:7368::/96`; has at least as many host bits as `v4`.
    pub v6: Ipv6Net,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Identity {
    pub trust_domain: TrustDomain,
    /// The sealed CA bundle made by `mesh-agent ca init`.
    pub ca_bundle: PathBuf,
    /// File with the join token that opens it.
    pub join_token_file: PathBuf,
    /// Lifetime of workload certificates; default and maximum 24 h.
    pub leaf_ttl: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    /// Unix socket of the CLI; default `/run/ecs-mesh/admin.sock`.
    pub socket: PathBuf,
    /// Prometheus metrics and health; a loopback address; default `127.0.0.1:15020`.
    pub metrics: SocketAddr,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`; default `info`.
    pub level: String,
    pub format: LogFormat,
    /// Whether one line per connection or request is written to standard output; default true.
    pub access: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Text,
}

/// A configuration file with every key, its default and what it is for. It parses as it is.
pub const EXAMPLE: &str = include_str!("config/example.toml");

/// The text that `mesh-agent config default` prints: [`EXAMPLE`].
pub fn example() -> String {
    EXAMPLE.to_owned()
}

/// Parses and checks a configuration file.
///
/// # Errors
/// All faults together, each with its path and a remedy. A text that is not TOML has one, with line and column.
pub fn parse(text: &str) -> Result<Config, Vec<Fault>> {
    document::read(text, check::config)
}

#[cfg(test)]
mod tests;
