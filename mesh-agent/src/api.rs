//! The JSON of the admin API: the only serialisable view of the domain. The server writes it, the CLI reads it.
//!
//! Names, units and spellings here are a promise to scripts: fields are added, never renamed. Must not know how the
//! documents travel, nor how the facts in them were gathered.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::SystemTime,
};

use mesh_common::{
    maps::counter,
    refusal::{Blame, Refusal},
};
use mesh_core::{
    balance::Load,
    model::{self, EndpointId, Snapshot},
    plan,
    task::NetworkMode,
};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// `GET /v1/status`: how the agent is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Release of the agent.
    pub version: String,
    /// Version of the agreement with the kernel programs.
    pub abi: u32,
    pub pid: u32,
    pub uptime_seconds: u64,
    /// The address that other hosts reach this one by.
    pub host: Option<IpAddr>,
    pub cluster: String,
    pub trust_domain: String,
    /// Generation of the published snapshot.
    pub generation: u64,
    pub ready: bool,
    /// What is still missing, when not ready.
    pub waiting_for: Vec<String>,
    pub agent: AgentHealth,
    pub tasks: Vec<Task>,
    pub kernel: Kernel,
    pub certificates: Vec<Certificate>,
    pub sources: Vec<Source>,
}

/// What the connect hooks think of the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentHealth {
    /// Whether the kernel sends traffic to the agent: the heartbeat is younger than its limit.
    pub alive: bool,
    pub heartbeat_age_ms: Option<u64>,
    pub heartbeat_limit_ms: u64,
}

/// An enrolled task of this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    pub id: String,
    pub family: String,
    pub service: String,
    /// `bridge`, `awsvpc`, `host` or `none`.
    pub mode: String,
    /// SPIFFE ID.
    pub identity: String,
    /// Whether its connections are intercepted.
    pub armed: bool,
    /// Its ports that others may call.
    #[serde(default)]
    pub ports: Vec<LocalPort>,
}

/// A port of a task of this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LocalPort {
    /// The container's.
    pub port: u16,
    /// Whether others are sent there.
    pub ready: bool,
    /// How long it has been so.
    pub seconds: u64,
    /// Why it is not ready.
    pub reason: Option<String>,
}

/// What the hooks have done since they were loaded. Connections, unless named otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Sent to the agent's proxy.
    pub redirected: u64,
    /// Sent to an endpoint of this host without the proxy.
    pub direct: u64,
    /// Balanced in plaintext because the agent was dead or hung.
    pub failed_open: u64,
    pub refused: u64,
    /// DNS questions sent to the agent.
    pub dns: u64,
    /// Refused because a map had no room.
    pub map_full: u64,
    /// Events that the ring buffer had no room for.
    pub event_lost: u64,
    /// Left alone.
    pub passed: u64,
}

/// The certificate of one identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    pub identity: String,
    /// RFC 3339, UTC. `None` while none was issued.
    pub not_after: Option<String>,
    pub last_error: Option<String>,
}

/// One source of services or tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    pub name: String,
    /// How it is, where more than a file is behind it.
    #[serde(default)]
    pub state: Option<String>,
    /// When it was last read in full. RFC 3339, UTC.
    pub last_load: Option<String>,
    /// Why the last reading failed; the last good one is still in use.
    pub last_error: Option<String>,
}

/// `GET /v1/services`: what the mesh can reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Services {
    pub generation: u64,
    /// Ordered by name.
    pub services: Vec<Service>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub vip4: Ipv4Addr,
    pub vip6: Ipv6Addr,
    /// `strict` or `permissive`.
    pub tls: String,
    /// `open` or `closed`.
    pub on_agent_death: String,
    /// Ordered by port.
    pub ports: Vec<Port>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    pub port: u16,
    /// `auto`, `http` or `tcp`.
    pub protocol: String,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// `local`, `tunnel` or `plaintext`.
    pub reach: String,
    /// The agent in front of it, where `reach` is `tunnel`.
    pub agent: Option<SocketAddr>,
    /// Where the application listens in its own namespace, where `reach` is `local`.
    pub deliver: Option<SocketAddr>,
    pub identity: Option<String>,
    /// `healthy`, `unhealthy` or `draining`.
    pub health: String,
    pub zone: Option<String>,
    pub weight: u32,
    pub task: Option<String>,
    pub load: EndpointLoad,
}

/// The load of an endpoint as this agent measured it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointLoad {
    /// Peak-EWMA of the response time, in microseconds; 0 while nothing was measured.
    pub rtt_us: u64,
    pub in_flight: u32,
    /// Failures in a row.
    pub failures: u32,
    /// Whether it is left out for now because of them.
    pub ejected: bool,
}

/// `GET /v1/explain`: what would happen to a connection now, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explain {
    pub question: Question,
    pub generation: u64,
    #[serde(flatten)]
    pub verdict: Verdict,
    /// One step of the reasoning each, in order.
    pub reasons: Vec<String>,
}

/// The question as it was understood.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// Task id.
    pub source: String,
    pub source_service: String,
    pub source_identity: String,
    /// The destination as asked.
    pub to: String,
    /// The address that the application would connect to; `None` where the mesh cannot know it.
    pub destination: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// The mesh carries the connection.
    Plan { service: String, port: u16, protocol: String, endpoint: SocketAddr, delivery: Delivery },
    /// The kernel connects the task to another one of this host by itself, with no proxy in the path.
    Direct {
        service: String,
        port: u16,
        /// It takes one of these at random.
        endpoints: Vec<SocketAddr>,
    },
    /// The mesh refuses the connection.
    Refusal {
        number: u32,
        label: String,
        /// Who has to act: `client`, `upstream`, `operator` or `mesh`.
        blame: String,
        cause: String,
        next_step: String,
    },
    /// The mesh leaves the connection alone.
    Pass,
    /// It does not come to a connection: the name belongs to the mesh and stands for nothing.
    NoSuchName,
}

/// How the bytes get there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Delivery {
    /// Through a socket in the task's namespace.
    Local { task: String, to: SocketAddr },
    /// mTLS to `agent`, which must prove `expect`.
    Tunnel { agent: SocketAddr, authority: SocketAddr, from: String, expect: String },
    /// Plain TCP.
    Plaintext { to: SocketAddr },
}

/// What `mesh-agent check --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Whether nothing fails.
    pub passed: bool,
    pub findings: Vec<Finding>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    pub name: String,
    /// `ok`, `warn` or `fail`.
    pub verdict: String,
    pub found: String,
    pub remedy: Option<String>,
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub error: String,
    pub remedy: String,
}

/// A time as these documents write it: RFC 3339 in UTC, to the second. `None` outside the years 0 to 9999.
pub fn timestamp(at: SystemTime) -> Option<String> {
    OffsetDateTime::from(at).replace_nanosecond(0).ok()?.format(&Rfc3339).ok()
}

impl Kernel {
    /// From the sums over all CPUs of the map `COUNTERS`.
    pub fn of(counters: &[u64; counter::COUNT as usize]) -> Self {
        let at = |index: u32| counters[index as usize];
        Self {
            redirected: at(counter::REDIRECTED),
            direct: at(counter::DIRECT),
            failed_open: at(counter::FAILED_OPEN),
            refused: at(counter::REFUSED),
            dns: at(counter::DNS),
            map_full: at(counter::MAP_FULL),
            event_lost: at(counter::EVENT_LOST),
            passed: at(counter::PASSED),
        }
    }
}

impl Services {
    /// All services of a snapshot. `now` is monotonic time since the agent started, as in [`Load`].
    pub fn of(snapshot: &Snapshot, load: &dyn Fn(&EndpointId) -> Load, now: std::time::Duration) -> Self {
        let endpoint = |endpoint: &model::Endpoint| Endpoint::of(endpoint, &load(&endpoint.id), now);
        let port = |port: &model::ServicePort| Port {
            port: port.port,
            protocol: protocol(port.protocol).into(),
            endpoints: port.endpoints.iter().map(|e| endpoint(e)).collect(),
        };
        let service = |service: &model::Service| Service {
            name: service.name.to_string(),
            vip4: service.vip.v4,
            vip6: service.vip.v6,
            tls: tls(service.tls).into(),
            on_agent_death: on_agent_death(service.on_agent_death).into(),
            ports: service.ports.iter().map(port).collect(),
        };
        Self { generation: snapshot.generation, services: snapshot.services.values().map(|s| service(s)).collect() }
    }
}

impl Endpoint {
    fn of(endpoint: &model::Endpoint, load: &Load, now: std::time::Duration) -> Self {
        let (reach, agent, deliver) = match &endpoint.reach {
            model::Reach::Local { deliver, .. } => ("local", None, Some(*deliver)),
            model::Reach::Tunnel { agent } => ("tunnel", Some(*agent), None),
            model::Reach::Plaintext => ("plaintext", None, None),
        };
        let health = match endpoint.health {
            model::Health::Healthy => "healthy",
            model::Health::Unhealthy => "unhealthy",
            model::Health::Draining => "draining",
        };
        Self {
            address: endpoint.addr(),
            reach: reach.into(),
            agent,
            deliver,
            identity: endpoint.identity.as_ref().map(ToString::to_string),
            health: health.into(),
            zone: endpoint.zone.as_deref().map(Into::into),
            weight: endpoint.weight,
            task: endpoint.task().map(ToString::to_string),
            load: EndpointLoad {
                rtt_us: u64::try_from(load.rtt.as_micros()).unwrap_or(u64::MAX),
                in_flight: load.in_flight,
                failures: load.failures,
                ejected: load.ejected_until > now,
            },
        }
    }
}

impl Verdict {
    /// A plan, as the proxy would carry it out.
    pub fn plan(plan: &plan::Plan) -> Self {
        Self::Plan {
            service: plan.service.name.to_string(),
            port: plan.port().port,
            protocol: protocol(plan.protocol()).into(),
            endpoint: plan.endpoint.addr(),
            delivery: match &plan.delivery {
                plan::Delivery::Local { task, to } => Delivery::Local { task: task.to_string(), to: *to },
                plan::Delivery::Tunnel { agent, authority, from, expect } => Delivery::Tunnel {
                    agent: *agent,
                    authority: *authority,
                    from: from.to_string(),
                    expect: expect.to_string(),
                },
                plan::Delivery::Plaintext { to } => Delivery::Plaintext { to: *to },
            },
        }
    }

    /// A refusal, with everything the list of refusals says about it.
    pub fn refusal(refusal: Refusal) -> Self {
        let blame = match refusal.blame() {
            Blame::Client => "client",
            Blame::Upstream => "upstream",
            Blame::Operator => "operator",
            Blame::Mesh => "mesh",
        };
        Self::Refusal {
            number: refusal as u32,
            label: refusal.label().into(),
            blame: blame.into(),
            cause: refusal.cause().into(),
            next_step: refusal.next_step().into(),
        }
    }
}

/// How a network mode is spelled.
pub fn mode(mode: NetworkMode) -> &'static str {
    match mode {
        NetworkMode::Bridge => "bridge",
        NetworkMode::Awsvpc => "awsvpc",
        NetworkMode::Host => "host",
        NetworkMode::None => "none",
    }
}

fn protocol(protocol: model::Protocol) -> &'static str {
    match protocol {
        model::Protocol::Auto => "auto",
        model::Protocol::Http => "http",
        model::Protocol::Http2 => "http2",
        model::Protocol::Grpc => "grpc",
        model::Protocol::Tcp => "tcp",
    }
}

fn tls(mode: model::TlsMode) -> &'static str {
    match mode {
        model::TlsMode::Strict => "strict",
        model::TlsMode::Permissive => "permissive",
    }
}

fn on_agent_death(choice: model::OnAgentDeath) -> &'static str {
    match choice {
        model::OnAgentDeath::Open => "open",
        model::OnAgentDeath::Closed => "closed",
    }
}

#[cfg(test)]
pub(crate) mod tests;
