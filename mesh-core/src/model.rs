//! The snapshot: one immutable value with everything the mesh knows at one moment.
//!
//! Built by [`crate::merge`], published by the agent, read by every decision. Must not know how it is shared.
//!
//! Its maps are persistent: a clone costs nothing, and the next snapshot holds the same parts but for what changed.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::OrdMap;
use mesh_common::addr::{Addr, Ip};

use crate::{
    addr::{Vip, canonical},
    id::{ServiceName, SpiffeId, TaskId},
    owners::Owners,
    policy::{Policy, Verdict},
    services::{Attributes, DEFAULT_WEIGHT},
    task::NetworkMode,
};

/// Everything known. Replaced as a whole, never changed; what did not change is shared between generations.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Grows by one with each published change.
    pub generation: u64,
    pub services: OrdMap<ServiceName, Arc<Service>>,
    /// Local workloads, by task.
    pub workloads: OrdMap<TaskId, Arc<Workload>>,
    pub policy: Arc<Policy>,
    /// Virtual and endpoint addresses to what they stand for.
    pub by_address: OrdMap<Addr, Arc<Destination>>,
    /// Addresses that several claim, with all who do; `by_address` has the one who got it.
    pub contested: OrdMap<Addr, Arc<BTreeSet<Target>>>,
    /// Virtual addresses, without a port.
    pub by_vip: OrdMap<Ip, ServiceName>,
    /// Local workloads by the number that the kernel knows them by.
    pub by_number: OrdMap<u32, Arc<Workload>>,
    /// What a kernel service number stands for: a service port, or an endpoint that is a destination itself.
    pub by_service_number: OrdMap<u32, Arc<Destination>>,
    /// The numbers given last, so that a number is not given again while the kernel may still hold it.
    pub last: Numbers,
}

/// Counters of numbers shared with the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    pub workload: u32,
    pub service: u32,
}

/// What connections are made to, and its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The number by which the kernel knows it; stable while the agent runs. A service port's is [`ServicePort::id`].
    pub number: u32,
    pub target: Target,
}

/// What a destination address stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// A virtual address and a port of that service.
    Service { service: ServiceName, port: u16 },
    /// One endpoint, addressed by an application that resolves by itself.
    Endpoint { service: ServiceName, port: u16, endpoint: EndpointId },
}

/// A name that clients call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: ServiceName,
    pub vip: Vip,
    /// Ordered by port.
    pub ports: Vec<ServicePort>,
    pub tls: TlsMode,
    pub on_agent_death: OnAgentDeath,
    /// The services that its endpoints are of; `None`: of this one.
    pub owners: Option<Arc<Owners>>,
}

/// One port of a service, and who serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The number by which the kernel knows this service port; stable while the agent runs.
    pub id: u32,
    pub port: u16,
    pub protocol: Protocol,
    /// Ordered by id.
    pub endpoints: Vec<Arc<Endpoint>>,
}

/// What is spoken on a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// To be detected per connection.
    Auto,
    /// HTTP: each request is balanced by itself. Clients choose the version.
    Http,
    /// The same; operators mean HTTP/2 without TLS (h2c).
    Http2,
    /// The same; operators mean gRPC over HTTP/2 without TLS.
    Grpc,
    /// A byte stream.
    Tcp,
}

/// Names an endpoint across generations: its address as registered, so that the same endpoint known from two sources
/// is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub Addr);

/// One reachable workload port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub id: EndpointId,
    pub reach: Reach,
    /// The identity its agent must prove. `None` where the endpoint is not in the mesh.
    pub identity: Option<SpiffeId>,
    pub health: Health,
    /// Relative share of the traffic; 0 means: only when nothing else is left.
    pub weight: u32,
    pub zone: Option<Arc<str>>,
    /// Tags and meta of the registry that knows it.
    pub attributes: Arc<Attributes>,
}

/// How an endpoint is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// A task of this host.
    Local {
        task: TaskId,
        /// Where the application listens, seen from its own namespace.
        deliver: SocketAddr,
        /// Whether bridge and host-mode tasks of this host can connect to `deliver` without the agent.
        direct: bool,
    },
    /// Through the agent at this address, port 15008 by default.
    Tunnel { agent: SocketAddr },
    /// Not in the mesh.
    Plaintext,
}

/// Whether an endpoint may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Healthy,
    Unhealthy,
    /// Its task is stopping: existing connections finish, new ones go elsewhere.
    Draining,
}

/// Whether plaintext to an endpoint outside the mesh is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Never a plaintext byte between hosts.
    Strict,
    /// mTLS where the endpoint is in the mesh, plaintext where it is not.
    Permissive,
}

/// What the kernel does with new connections while the agent is dead or hung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnAgentDeath {
    /// Balance over the endpoints that the kernel knows, in plaintext.
    Open,
    /// Refuse at once.
    Closed,
}

impl Snapshot {
    /// What a destination stands for. A v4-mapped IPv6 address is its IPv4 address.
    pub fn target(&self, addr: SocketAddr) -> Option<&Target> {
        self.by_address.get(&Addr::from(addr)).map(|destination| &destination.target)
    }

    /// The endpoint that is registered at this address.
    pub fn endpoint(&self, id: &EndpointId) -> Option<&Arc<Endpoint>> {
        let Target::Endpoint { service, port, endpoint } = &self.by_address.get(&id.0)?.target else { return None };
        let service = self.services.get(service)?;
        service.ports[service.port_index(*port)?].endpoint(endpoint)
    }

    /// The service that has this virtual address.
    pub fn service_at(&self, ip: IpAddr) -> Option<&Arc<Service>> {
        self.services.get(self.by_vip.get(&Ip::from(ip))?)
    }

    /// The service that a local endpoint's task belongs to, where that is not `listed`, under which it was found. The
    /// task is still what it is: who may not call the one must not reach it by the other's name.
    pub fn other_owner(&self, endpoint: &Endpoint, listed: &ServiceName) -> Option<&ServiceName> {
        let Reach::Local { task, .. } = &endpoint.reach else { return None };
        let owner = &self.workloads.get(task)?.service;
        (owner != listed).then_some(owner)
    }
}

impl Service {
    /// Index of a port in [`Service::ports`].
    pub fn port_index(&self, port: u16) -> Option<usize> {
        self.ports.binary_search_by_key(&port, |p| p.port).ok()
    }

    /// Whether `source` may call it.
    pub fn verdict<'a>(&'a self, policy: &'a Policy, source: &SpiffeId) -> Verdict<'a> {
        policy.judge(source, &self.name, self.owners.as_deref())
    }

    /// Whether every conceivable source may call it.
    pub fn admits_everybody(&self, policy: &Policy) -> bool {
        policy.opens(&self.name, self.owners.as_deref())
    }
}

impl ServicePort {
    /// The endpoint with this id.
    pub fn endpoint(&self, id: &EndpointId) -> Option<&Arc<Endpoint>> {
        self.endpoints.binary_search_by(|e| e.id.cmp(id)).ok().map(|n| &self.endpoints[n])
    }
}

impl EndpointId {
    /// The id of the endpoint that is registered at this address.
    pub fn of(addr: SocketAddr) -> Self {
        Self(addr.into())
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from(self.0).fmt(f)
    }
}

impl Target {
    /// The service that it belongs to.
    pub fn service(&self) -> &ServiceName {
        let (Self::Service { service, .. } | Self::Endpoint { service, .. }) = self;
        service
    }

    /// The service port that it is, or is an endpoint of.
    pub fn port(&self) -> u16 {
        let (Self::Service { port, .. } | Self::Endpoint { port, .. }) = self;
        *port
    }
}

impl Endpoint {
    /// One that a registry lists: reached through its agent, or in plaintext where it has none; then it has no identity.
    pub fn listed(addr: SocketAddr, agent: Option<SocketAddr>, identity: Option<SpiffeId>) -> Self {
        Self {
            id: EndpointId::of(canonical(addr)),
            reach: agent.map_or(Reach::Plaintext, |agent| Reach::Tunnel { agent: canonical(agent) }),
            identity: identity.filter(|_| agent.is_some()),
            health: Health::Healthy,
            weight: DEFAULT_WEIGHT,
            zone: None,
            attributes: Attributes::none(),
        }
    }

    /// The address that any task can use without the mesh: host address and published port, or the ENI's.
    pub fn addr(&self) -> SocketAddr {
        self.id.0.into()
    }

    /// The agent in front of it, where it is not this one.
    pub fn agent(&self) -> Option<SocketAddr> {
        match self.reach {
            Reach::Tunnel { agent } => Some(agent),
            Reach::Local { .. } | Reach::Plaintext => None,
        }
    }

    /// The task of this host that it is.
    pub fn task(&self) -> Option<&TaskId> {
        match &self.reach {
            Reach::Local { task, .. } => Some(task),
            Reach::Tunnel { .. } | Reach::Plaintext => None,
        }
    }

    /// The addresses at which it is a destination itself.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        let deliver = match &self.reach {
            Reach::Local { deliver, .. } => Some(*deliver).filter(|deliver| *deliver != self.addr()),
            Reach::Tunnel { .. } | Reach::Plaintext => None,
        };
        [self.addr()].into_iter().chain(deliver)
    }
}

/// A local task as the mesh sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The number by which the kernel knows it; never 0.
    pub number: u32,
    pub task: TaskId,
    pub service: ServiceName,
    pub identity: SpiffeId,
    pub mode: NetworkMode,
}
