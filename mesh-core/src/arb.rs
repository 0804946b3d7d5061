//! Generators for property tests.
//!
//! Names come from small sets, so that things meet: tasks and static entries share services, rules match sources.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use proptest::prelude::*;

use crate::{
    config::{Enrol, VipRanges},
    id::{ClusterName, ServiceName, SpiffeId, TrustDomain},
    merge::{self, ENABLED_LABEL, Merged, SERVICE_LABEL, Sources},
    model::{Endpoint, OnAgentDeath, Protocol, Snapshot, TlsMode},
    owners::Owners,
    policy::{Effect, Policy, Rule},
    readiness::{Gate, Incarnation},
    services::{EndpointEntry, PortEntry, ServiceEntry, ServiceSet},
    task::{Container, ContainerHealth, NetworkMode, Phase, Published, Task},
};

/// Everything a snapshot is made from, owned.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) sets: Vec<ServiceSet>,
    pub(crate) tasks: Vec<Task>,
    pub(crate) gate: Gate,
    pub(crate) enrol: Enrol,
    pub(crate) cluster: ClusterName,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) host: IpAddr,
    pub(crate) tunnel: SocketAddr,
    pub(crate) vips: VipRanges,
}

impl Default for World {
    /// A host without tasks, 10.90.1.10 of cluster demo.
    fn default() -> Self {
        Self {
            sets: Vec::new(),
            tasks: Vec::new(),
            gate: Gate::Open,
            enrol: Enrol {
                default: true,
                exclude: vec!["excluded".into()],
                tls: TlsMode::Strict,
                on_agent_death: OnAgentDeath::Open,
            },
            cluster: "demo".parse().expect("valid"),
            trust_domain: "a".parse().expect("valid"),
            host: "10.90.1.10".parse().expect("valid"),
            tunnel: "10.90.1.10:15008".parse().expect("valid"),
            vips: VipRanges {
                v4: "240.240.0.0/16".parse().expect("valid"),
                v6: "fd65:6373:6d65:7368::/96".parse().expect("valid"),
            },
        }
    }
}

impl World {
    pub(crate) fn sources(&self) -> Sources<'_> {
        Sources {
            sets: &self.sets,
            tasks: Arc::new(self.tasks.clone()),
            gate: &self.gate,
            enrol: &self.enrol,
            cluster: &self.cluster,
            trust_domain: &self.trust_domain,
            host: self.host,
            tunnel: self.tunnel,
            zone: Some("z"),
            vips: &self.vips,
        }
    }

    /// The snapshot after `previous`, of which nothing else is known: made from the beginning.
    pub(crate) fn after(&self, previous: &Snapshot) -> Snapshot {
        let mut before = Merged::default();
        before.snapshot = Arc::new(previous.clone());
        Snapshot::clone(&merge::merge(&before, &self.sources()).snapshot)
    }

    /// The first snapshot.
    pub(crate) fn snapshot(&self) -> Snapshot {
        self.after(&Snapshot::default())
    }
}

/// A bridge task with one container that runs, serves `ports` and has them published at 32768 and up.
pub(crate) fn bridge_task(id: &str, family: &str, ip: &str, ports: &[u16]) -> Task {
    let publish = |(n, port): (u16, &u16)| Published {
        container_port: *port,
        host: SocketAddr::new("0.0.0.0".parse().expect("valid"), 32_768 + n),
    };
    Task {
        id: id.parse().expect("valid"),
        cluster: None,
        family: family.into(),
        mode: NetworkMode::Bridge,
        phase: Phase::Running,
        containers: vec![Container {
            id: "0".repeat(64),
            name: family.into(),
            exposed: ports.to_vec(),
            published: (0..).zip(ports).map(publish).collect(),
            cgroup: Some(format!("/ecstasks.slice/{id}").into()),
            pid: Some(1),
            health: None,
        }],
        address: Some(ip.parse().expect("valid")),
        netns: Some(format!("/netns/{id}").into()),
        labels: BTreeMap::new(),
    }
}

/// Tasks with few ids, so that two worlds share some.
pub(crate) fn task() -> impl Strategy<Value = Task> {
    let port = || prop::sample::select(vec![80_u16, 8080, 6379, 9000]);
    let container = (
        prop::collection::vec(port(), 0..3),
        prop::collection::vec(
            (port(), prop::sample::select(vec!["0.0.0.0", "127.0.0.1", "::"]), 32_768_u16..32_772),
            0..3,
        ),
        any::<bool>(),
        prop::option::weighted(
            0.3,
            prop::sample::select(vec![ContainerHealth::Starting, ContainerHealth::Healthy, ContainerHealth::Unhealthy]),
        ),
    );
    let labels = (
        prop::option::weighted(0.2, prop::sample::select(vec!["true", "false", "perhaps"])),
        prop::option::weighted(0.2, prop::sample::select(vec!["web", "cache"])),
    );
    (
        0_u8..8,
        prop::sample::select(vec!["web", "world-v1", "batch", "excluded", "___"]),
        prop::sample::select(vec![NetworkMode::Bridge, NetworkMode::Awsvpc, NetworkMode::Host, NetworkMode::None]),
        prop::sample::select(vec![Phase::Created, Phase::Running, Phase::Running, Phase::Running, Phase::Stopping]),
        prop::collection::vec(container, 1..3),
        (any::<bool>(), 0_u8..4),
        labels,
    )
        .prop_map(|(n, family, mode, phase, containers, (addressed, netns), (enabled, service))| {
            let own = mode != NetworkMode::Host;
            let labels = [(ENABLED_LABEL, enabled), (SERVICE_LABEL, service)];
            let containers = (0..).zip(containers).map(|(c, (exposed, published, cgroup, health))| Container {
                id: format!("{n:032}{c:032}"),
                name: format!("c{c}"),
                exposed,
                published: published
                    .into_iter()
                    .map(|(container_port, ip, port)| Published {
                        container_port,
                        host: SocketAddr::new(ip.parse().expect("valid"), port),
                    })
                    .collect(),
                cgroup: cgroup.then(|| format!("/cgroup/{n}/{c}").into()),
                pid: None,
                health,
            });
            Task {
                id: format!("task-{n}").parse().expect("valid"),
                cluster: None,
                family: family.into(),
                mode,
                phase,
                containers: containers.collect(),
                address: (addressed && own).then(|| IpAddr::from([172, 17, 0, n + 2])),
                netns: (own && netns > 0).then(|| format!("/netns/{n}/{}", netns % 2).into()),
                labels: labels.into_iter().filter_map(|(key, value)| Some((key.into(), value?.into()))).collect(),
            }
        })
}

fn endpoint_entry() -> impl Strategy<Value = EndpointEntry> {
    let addr = prop::sample::select(vec![
        "10.90.1.10:32768",
        "10.90.1.10:32769",
        "10.90.1.11:32768",
        "10.90.1.12:80",
        "172.17.0.3:8080",
        "[fd00::1]:6379",
        "[::ffff:10.90.1.12]:80",
    ]);
    let agent = prop::option::of(prop::sample::select(vec!["10.90.1.10:15008", "10.90.1.11:15008"]));
    (
        prop::sample::select(vec![80_u16, 6379, 8080]),
        addr,
        agent,
        prop::sample::select(vec![0_u32, 1, 100]),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(port, addr, agent, weight, alias, assumed)| EndpointEntry {
            port: if alias { Some(80) } else { Some(port) },
            endpoint: Arc::new(Endpoint {
                weight,
                ..Endpoint::listed(addr.parse().expect("valid"), agent.map(|agent| agent.parse().expect("valid")), None)
            }),
            alias,
            assumed: assumed && !alias && agent.is_none(),
        })
}

fn service_set() -> impl Strategy<Value = ServiceSet> {
    let ports = prop::sample::subsequence(vec![80_u16, 6379, 8080], 0..3).prop_flat_map(|ports| {
        let rest = (prop::option::of(Just(8080_u16)), prop::option::of(protocol()));
        prop::collection::vec(rest, ports.len()).prop_map(move |rest| {
            let entry = |(port, (target, protocol)): (&u16, _)| PortEntry { port: *port, target, protocol };
            ports.iter().zip(rest).map(entry).collect::<Vec<_>>()
        })
    });
    let tls = prop::option::of(prop::sample::select(vec![TlsMode::Strict, TlsMode::Permissive]));
    let death = prop::option::of(prop::sample::select(vec![OnAgentDeath::Open, OnAgentDeath::Closed]));
    let service = (ports, prop::collection::vec(endpoint_entry(), 0..5), tls, death, owners());
    let services = prop::collection::btree_map(service_name(), service, 0..4);
    (services, prop::option::of(policy())).prop_map(|(services, policy)| {
        let entry = |(name, (ports, endpoints, tls, on_agent_death, owners)): (ServiceName, _)| {
            let families = if name.as_str() == "world" { vec!["world-v1".into()] } else { Vec::new() };
            ServiceEntry { name, ports, endpoints, tls, on_agent_death, families, alone: false, owners }
        };
        ServiceSet { policy: policy.map(Arc::new), ..ServiceSet::of(services.into_iter().map(entry)) }
    })
}

/// Mostly none; otherwise one or two services with one or two names each, or the one that bears the name.
fn owners() -> impl Strategy<Value = Option<Arc<Owners>>> {
    let one = prop::collection::vec(service_name(), 0..3);
    prop_oneof![
        2 => Just(None),
        1 => prop::collection::vec(one, 1..3).prop_map(Owners::of),
    ]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop::sample::select(vec![Protocol::Auto, Protocol::Http, Protocol::Http2, Protocol::Grpc, Protocol::Tcp])
}

/// A host with some of a few tasks, and up to two sources about some of a few services.
pub(crate) fn world() -> impl Strategy<Value = World> {
    let tasks = prop::collection::btree_map(0_u8..8, task(), 0..6);
    (prop::collection::vec(service_set(), 0..3), tasks).prop_map(|(sets, tasks)| {
        let mut tasks: Vec<_> = tasks.into_values().collect();
        tasks.sort_by(|a, b| a.id.cmp(&b.id));
        tasks.dedup_by(|a, b| a.id == b.id);
        World { sets, tasks, ..World::default() }
    })
}

/// A host as time passes: now and then a task, a service, an endpoint or the policy changes, and sometimes everything.
pub(crate) fn worlds() -> impl Strategy<Value = Vec<World>> {
    let step = prop_oneof![
        1 => world().prop_map(Step::Everything),
        4 => task().prop_map(Step::Task),
        2 => any::<prop::sample::Index>().prop_map(Step::TaskGone),
        2 => any::<u8>().prop_map(Step::Probed),
        4 => (any::<prop::sample::Index>(), service_set()).prop_map(|(set, some)| Step::Services(set, some)),
        2 => (any::<prop::sample::Index>(), service_name()).prop_map(|(set, name)| Step::ServiceGone(set, name)),
        2 => (any::<prop::sample::Index>(), service_name(), endpoint_entry())
            .prop_map(|(set, name, entry)| Step::Endpoint(set, name, entry)),
        1 => Just(Step::Nothing),
    ];
    (world(), prop::collection::vec(step, 1..8)).prop_map(|(mut world, steps)| {
        let mut worlds = vec![world.clone()];
        for step in steps {
            step.happens(&mut world);
            worlds.push(world.clone());
        }
        worlds
    })
}

#[derive(Clone, Debug)]
enum Step {
    Everything(World),
    Task(Task),
    TaskGone(prop::sample::Index),
    /// The tasks in this set of bits are ready, each at all the ports that tasks here have.
    Probed(u8),
    Services(prop::sample::Index, ServiceSet),
    ServiceGone(prop::sample::Index, ServiceName),
    Endpoint(prop::sample::Index, ServiceName, EndpointEntry),
    Nothing,
}

impl Step {
    fn happens(self, world: &mut World) {
        fn pick(sets: &mut [ServiceSet], at: prop::sample::Index) -> Option<&mut ServiceSet> {
            if sets.is_empty() { None } else { Some(at.get_mut(sets)) }
        }
        let World { sets, tasks, gate, .. } = world;
        match self {
            Self::Everything(other) => *world = other,
            Self::Task(task) => match tasks.iter_mut().find(|known| known.id == task.id) {
                Some(known) => *known = task,
                None => tasks.push(task),
            },
            Self::Probed(which) => {
                let passed = (0..).zip(tasks.iter()).filter(|(n, _)| which & (1 << n) != 0);
                let ports = |task| [80, 8080, 6379, 9000].map(|port| (task, port));
                let passed = passed.flat_map(|(_, task): (u8, &Task)| ports(task));
                let of = |(task, port): (&Task, u16)| ((task.id.clone(), port), Incarnation::of(task, port));
                *gate = Gate::Probed(Arc::new(passed.map(of).collect()));
            }
            Self::TaskGone(at) if !tasks.is_empty() => drop(tasks.remove(at.index(tasks.len()))),
            Self::Services(at, some) => {
                if let Some(set) = pick(sets, at) {
                    set.services.extend(some.services);
                    set.policy = some.policy;
                }
            }
            Self::ServiceGone(at, name) => drop(pick(sets, at).and_then(|set| set.services.remove(&name))),
            Self::Endpoint(at, name, entry) => {
                if let Some(service) = pick(sets, at).and_then(|set| set.services.get_mut(&name)) {
                    let mut changed = ServiceEntry::clone(service);
                    changed.endpoints.retain(|known| known.endpoint.id != entry.endpoint.id);
                    changed.endpoints.push(entry);
                    *service = Arc::new(changed);
                }
            }
            Self::TaskGone(_) | Self::Nothing => {}
        }
    }
}

pub(crate) fn service_name() -> impl Strategy<Value = ServiceName> {
    prop::sample::select(vec!["web", "cache", "world", "batch"]).prop_map(|name| name.parse().expect("valid"))
}

pub(crate) fn any_service_name() -> impl Strategy<Value = ServiceName> {
    "[a-z]([a-z0-9-]{0,8}[a-z0-9])?".prop_map(|name| name.parse().expect("valid"))
}

pub(crate) fn spiffe_id() -> impl Strategy<Value = SpiffeId> {
    (prop::sample::select(vec!["a", "b"]), prop::sample::select(vec!["demo", "other"]), service_name()).prop_map(
        |(domain, cluster, service)| format!("spiffe://{domain}/ns/{cluster}/sa/{service}").parse().expect("valid"),
    )
}

fn source() -> impl Strategy<Value = String> {
    prop_oneof![
        spiffe_id().prop_map(|id| id.to_string()),
        prop::sample::select(vec!["spiffe://a/*", "spiffe://b/ns/demo/*", "spiffe://a/ns/demo/sa/w*"])
            .prop_map(String::from),
    ]
}

pub(crate) fn policy() -> impl Strategy<Value = Policy> {
    let effect = || prop_oneof![Just(Effect::Allow), Just(Effect::Deny)];
    let rule = (effect(), prop::collection::vec(source(), 0..3), prop::collection::vec(service_name(), 0..3));
    (effect(), prop::collection::vec(rule, 0..4)).prop_map(|(default, rules)| Policy {
        default,
        rules: (0..)
            .zip(rules)
            .map(|(n, (effect, from, to))| Rule { name: format!("rule-{n}"), effect, from, to })
            .collect(),
    })
}
