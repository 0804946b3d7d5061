//! Worlds of any size, and the decisions that are measured in them: by the clock, by bytes, by instructions.
//!
//! Deterministic and pure, and nothing but the core is linked, so that it is built quickly and counted exactly. Must not
//! know how anything is measured; [`counted`] is what programs that a profiler runs have in common.

pub mod counted;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    addr::OrigDst,
    balance::{self, Load},
    config::{Enrol, VipRanges},
    dataplane,
    id::{ClusterName, ServiceName, TrustDomain},
    merge::{self, Merged, Sources},
    model::{Endpoint, EndpointId, OnAgentDeath, TlsMode, Workload},
    plan::{self, Inbound, Outbound},
    readiness::Gate,
    resolve::{self, Naming, Question},
    services::{DEFAULT_WEIGHT, EndpointEntry, PortEntry, ServiceEntry, ServiceSet},
    task::{Container, NetworkMode, Phase, Published, Task},
};

/// How much there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub services: usize,
    /// Of each service, on other hosts.
    pub endpoints: usize,
    /// On this host.
    pub tasks: usize,
}

/// A host among many: services elsewhere, tasks here.
#[derive(Clone, Debug)]
pub struct World {
    pub set: ServiceSet,
    pub tasks: Arc<Vec<Task>>,
    enrol: Enrol,
    cluster: ClusterName,
    trust_domain: TrustDomain,
    vips: VipRanges,
}

const SERVICE_PORT: u16 = 80;
const CONTAINER_PORT: u16 = 8080;
const TUNNELS: u16 = 15008;
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 0, 1));
/// Virtual addresses of 5,000 services fit easily, and 60,000 barely.
const V4: &str = "240.240.0.0/16";
const V6: &str = "fd65:6373:6d65:7368::/96";

fn valid<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("a literal that is valid")
}

/// The name of the n-th service.
pub fn name(n: usize) -> ServiceName {
    valid(&format!("service-{n:05}"))
}

/// The address of the e-th endpoint, of at most 64, of the n-th service: 4,000 hosts, with some tasks each.
pub fn address(n: usize, e: usize) -> SocketAddr {
    let index = n * 64 + e;
    let host = u32::try_from(index % 4000).unwrap_or_default();
    let port = u16::try_from(20_000 + index / 4000).unwrap_or_default();
    SocketAddr::new(Ipv4Addr::from(0x0a02_0000 + host).into(), port)
}

/// The agent in front of an endpoint: that of its host.
pub fn agent(endpoint: SocketAddr) -> SocketAddr {
    SocketAddr::new(endpoint.ip(), TUNNELS)
}

fn entry(n: usize, endpoints: usize) -> ServiceEntry {
    let endpoint = |e| EndpointEntry {
        port: None,
        endpoint: Arc::new(Endpoint::listed(address(n, e), Some(agent(address(n, e))), None)),
        alias: false,
        assumed: false,
    };
    ServiceEntry {
        name: name(n),
        ports: vec![PortEntry { port: SERVICE_PORT, target: Some(CONTAINER_PORT), protocol: None }],
        endpoints: (0..endpoints).map(endpoint).collect(),
        tls: None,
        on_agent_death: None,
        families: Vec::new(),
        alone: false,
        owners: None,
    }
}

fn task(n: usize) -> Task {
    let address = Ipv4Addr::from(0xac11_0002 + u32::try_from(n).unwrap_or_default());
    let host = SocketAddr::new(HOST, u16::try_from(32_768 + n).unwrap_or_default());
    Task {
        id: valid(&format!("task-{n:04}")),
        cluster: None,
        family: format!("local-{n:04}"),
        mode: NetworkMode::Bridge,
        phase: Phase::Running,
        containers: vec![Container {
            id: format!("{n:064}"),
            name: "app".into(),
            exposed: Vec::new(),
            published: vec![Published { container_port: CONTAINER_PORT, host }],
            cgroup: None,
            pid: None,
            health: None,
        }],
        address: Some(address.into()),
        netns: Some(format!("/run/netns/{n}").into()),
        labels: Default::default(),
    }
}

impl World {
    pub fn new(size: Size) -> Self {
        Self {
            set: ServiceSet::of((0..size.services).map(|n| entry(n, size.endpoints))),
            tasks: Arc::new((0..size.tasks).map(task).collect()),
            enrol: Enrol {
                default: true,
                exclude: Vec::new(),
                tls: TlsMode::Strict,
                on_agent_death: OnAgentDeath::Open,
            },
            cluster: valid("demo"),
            trust_domain: valid("demo.mesh"),
            vips: VipRanges { v4: valid(V4), v6: valid(V6) },
        }
    }

    /// The same world, in which one endpoint of a service in the middle has another address.
    #[must_use]
    pub fn with_one_moved(&self) -> Self {
        let mut world = self.clone();
        let middle = name(world.set.services.len() / 2);
        if let Some(service) = world.set.services.get_mut(&middle) {
            let mut moved = ServiceEntry::clone(service);
            if let Some(endpoint) = moved.endpoints.first_mut() {
                let addr = SocketAddr::new(Ipv4Addr::new(10, 200, 0, 1).into(), 20_000);
                endpoint.endpoint = Arc::new(Endpoint::listed(addr, Some(agent(addr)), None));
            }
            *service = Arc::new(moved);
        }
        world
    }

    /// What follows from this world after `before`.
    pub fn merged(&self, before: &Merged) -> Merged {
        let sources = Sources {
            sets: std::slice::from_ref(&self.set),
            tasks: self.tasks.clone(),
            gate: &Gate::Open,
            enrol: &self.enrol,
            cluster: &self.cluster,
            trust_domain: &self.trust_domain,
            host: HOST,
            tunnel: SocketAddr::new(HOST, TUNNELS),
            zone: None,
            vips: &self.vips,
        };
        merge::merge(before, &sources)
    }
}

/// A decision, made again and again.
pub struct Case {
    pub name: &'static str,
    /// What it is, for a table.
    pub about: &'static str,
    /// In a world of this size.
    pub size: Size,
    pub make: fn(&World) -> Box<dyn FnMut()>,
}

const SMALL: Size = Size { services: 10, endpoints: 10, tasks: 1 };
const LARGE: Size = Size { services: 1000, endpoints: 10, tasks: 100 };

/// Everything that is measured. The large worlds are there to show that what happens for each connection does not grow.
pub const CASES: [Case; 13] = [
    Case { name: "plan", about: "one outbound plan", size: SMALL, make: planning },
    Case { name: "plan_large", about: "the same, 1,000 services and 100 tasks", size: LARGE, make: planning },
    Case { name: "plan_inbound", about: "one inbound plan", size: SMALL, make: planning_inbound },
    Case { name: "plan_inbound_large", about: "the same, large", size: LARGE, make: planning_inbound },
    Case { name: "resolve", about: "one name to its virtual address", size: SMALL, make: resolving },
    Case { name: "resolve_large", about: "the same, large", size: LARGE, make: resolving },
    Case { name: "pick", about: "one of 10 endpoints, two of them drawn and compared", size: SMALL, make: picking },
    Case {
        name: "merge_nothing",
        about: "a merge in which nothing changed, large",
        size: LARGE,
        make: merging_nothing,
    },
    Case { name: "merge_one", about: "a merge in which one endpoint moved", size: SMALL, make: merging_one },
    Case { name: "merge_one_large", about: "the same, large", size: LARGE, make: merging_one },
    Case { name: "merge_all", about: "the first merge, 100 endpoints", size: SMALL, make: merging_all },
    Case { name: "writes_one", about: "kernel writes for one endpoint that moved", size: SMALL, make: writing_one },
    Case { name: "writes_one_large", about: "the same, large", size: LARGE, make: writing_one },
];

/// The service that is called: one of the source's, for tasks bring services of their own.
fn called(world: &World, snapshot: &mesh_core::model::Snapshot) -> ServiceName {
    name((snapshot.services.len() / 3).min(world.set.services.len() - 1))
}

fn planning(world: &World) -> Box<dyn FnMut()> {
    let snapshot = world.merged(&Merged::default()).snapshot;
    let source = caller(&snapshot);
    let service = snapshot.services[&called(world, &snapshot)].clone();
    let dst = OrigDst(SocketAddr::new(service.vip.v4.into(), SERVICE_PORT));
    let load = |_: &EndpointId| Load::default();
    let mut draw = 0_u64;
    Box::new(move || {
        draw = draw.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let ask = Outbound { source: &source, dst, tried: &[], load: &load, now: Duration::from_secs(1), draw };
        std::hint::black_box(plan::outbound(&snapshot, &ask).expect("there are endpoints"));
    })
}

fn caller(snapshot: &mesh_core::model::Snapshot) -> Arc<Workload> {
    snapshot.workloads.values().next().expect("there is a task").clone()
}

fn planning_inbound(world: &World) -> Box<dyn FnMut()> {
    let snapshot = world.merged(&Merged::default()).snapshot;
    let workload = caller(&snapshot);
    let target = SocketAddr::new(HOST, 32_768);
    Box::new(move || {
        let ask = Inbound { peer: &workload.identity, presented: &workload.identity, target, elsewhere: true };
        std::hint::black_box(plan::inbound(&snapshot, &ask).expect("the task is here"));
    })
}

fn resolving(world: &World) -> Box<dyn FnMut()> {
    let snapshot = world.merged(&Merged::default()).snapshot;
    let suffixes = ["mesh".to_owned(), "service.consul".to_owned()];
    let asked = format!("{}.mesh.", called(world, &snapshot));
    let vip = world.vips.clone();
    Box::new(move || {
        let (ttl, ipv6) = (Duration::from_secs(5), false);
        let naming = Naming { suffixes: &suffixes, datacenters: &[], vip: &vip, ttl, ipv6 };
        std::hint::black_box(resolve::answer(&snapshot, &naming, &asked, Question::A));
    })
}

fn picking(_: &World) -> Box<dyn FnMut()> {
    let mut draw = 0_u64;
    Box::new(move || {
        draw = draw.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let picked = balance::pick(10, |_| Some(DEFAULT_WEIGHT), |_| Load::default(), Duration::from_secs(1), draw);
        std::hint::black_box(picked.expect("there are ten"));
    })
}

fn merging_nothing(world: &World) -> Box<dyn FnMut()> {
    let (world, merged) = (world.clone(), world.merged(&Merged::default()));
    Box::new(move || drop(std::hint::black_box(world.merged(&merged))))
}

fn merging_one(world: &World) -> Box<dyn FnMut()> {
    let (moved, merged) = (world.with_one_moved(), world.merged(&Merged::default()));
    Box::new(move || drop(std::hint::black_box(moved.merged(&merged))))
}

fn merging_all(world: &World) -> Box<dyn FnMut()> {
    let world = world.clone();
    Box::new(move || drop(std::hint::black_box(world.merged(&Merged::default()))))
}

fn writing_one(world: &World) -> Box<dyn FnMut()> {
    let before = world.merged(&Merged::default());
    let after = world.with_one_moved().merged(&before);
    Box::new(move || {
        let (from, to) = dataplane::around(&before.snapshot, &after.snapshot);
        std::hint::black_box(dataplane::diff(&from, &to));
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_work_with_more_tasks_than_services() {
        let world = World::new(Size { services: 3, endpoints: 1, tasks: 20 });
        for case in CASES {
            (case.make)(&world)();
        }
    }

    #[test]
    fn every_case_does_something() {
        for case in CASES {
            let world = World::new(Size { tasks: 1, ..SMALL });
            (case.make)(&world)();
        }
        let world = World::new(SMALL);
        let before = world.merged(&Merged::default());
        let after = world.with_one_moved().merged(&before);
        assert_eq!((before.snapshot.generation, after.snapshot.generation), (1, 2));
        assert_eq!(before.snapshot.services.len(), 11, "ten elsewhere, one here");
        let (from, to) = dataplane::around(&before.snapshot, &after.snapshot);
        assert!(!dataplane::diff(&from, &to).is_empty());
    }

    #[test]
    fn addresses_are_all_different() {
        let all: std::collections::BTreeSet<_> = (0..5000).flat_map(|n| (0..10).map(move |e| address(n, e))).collect();
        assert_eq!(all.len(), 50_000);
    }
}
