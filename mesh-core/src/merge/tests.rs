//! What several sources and the tasks of a host become; order and repetition must not matter.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::{
    arb::{self, World, bridge_task},
    model::{Destination, Health, Reach, Target},
    services,
    task::{ContainerHealth, NetworkMode, Phase},
};

const STATIC: &str = r#"
[[service]]
name = "world"
families = ["world-v1"]
ports = [ { port = 80, target = 8080, protocol = "http" } ]
[[service.endpoint]]
address = "10.90.1.11:32768"
agent = "10.90.1.11:15008"
[[service.endpoint]]
address = "10.90.1.10:32768"
agent = "10.90.1.10:15008"
weight = 7
[[service.endpoint]]
address = "10.90.1.12:80"
"#;

fn world(tasks: Vec<Task>, text: &str) -> World {
    World { sets: vec![services::parse(text).expect("parses")], tasks, ..World::default() }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("a literal")
}

/// `service:port protocol` and each endpoint as `addr reach health weight`.
fn show(snapshot: &Snapshot) -> Vec<String> {
    let mut lines = Vec::new();
    for service in snapshot.services.values() {
        for port in &service.ports {
            lines.push(format!("{}:{} {:?}", service.name, port.port, port.protocol));
            for endpoint in &port.endpoints {
                let reach = match &endpoint.reach {
                    Reach::Local { task, deliver, direct } => format!("{task} at {deliver} direct={direct}"),
                    Reach::Tunnel { agent } => format!("by {agent}"),
                    Reach::Plaintext => "plain".into(),
                };
                lines.push(format!("  {} {reach} {:?} {}", endpoint.addr(), endpoint.health, endpoint.weight));
            }
        }
    }
    lines
}

fn check(world: &World, expected: &[&str]) {
    assert_eq!(show(&world.snapshot()), expected);
}

#[test]
fn local_truth_wins_over_the_file() {
    let task = bridge_task("t1", "world-v1", "172.17.0.2", &[8080]);
    let rest = ["  10.90.1.11:32768 by 10.90.1.11:15008 Healthy 100", "  10.90.1.12:80 plain Healthy 100"];
    let local = "  10.90.1.10:32768 t1 at 172.17.0.2:8080 direct=true Healthy 7";
    check(&world(vec![task.clone()], STATIC), &["world:80 Http", local, rest[0], rest[1]]);
    // Gone here, although the file still says so.
    check(&world(vec![], STATIC), &["world:80 Http", rest[0], rest[1]]);
    let stopping = Task { phase: Phase::Stopping, ..task };
    let draining = "  10.90.1.10:32768 t1 at 172.17.0.2:8080 direct=true Draining 7";
    check(&world(vec![stopping], STATIC), &["world:80 Http", draining, rest[0], rest[1]]);
}

#[test]
fn ports_are_derived_from_tasks() {
    let one = bridge_task("t1", "web_App", "172.17.0.2", &[8080]);
    let ports = [
        "web-app:80 Auto",
        "  10.90.1.10:32768 t1 at 172.17.0.2:8080 direct=true Healthy 100",
        "web-app:8080 Auto",
        "  10.90.1.10:32768 t1 at 172.17.0.2:8080 direct=true Healthy 100",
    ];
    check(&world(vec![one.clone()], ""), &ports);
    let two = bridge_task("t1", "cache", "172.17.0.2", &[6379, 9000]);
    check(
        &world(vec![two], ""),
        &[
            "cache:6379 Tcp",
            "  10.90.1.10:32768 t1 at 172.17.0.2:6379 direct=true Healthy 100",
            "cache:9000 Auto",
            "  10.90.1.10:32769 t1 at 172.17.0.2:9000 direct=true Healthy 100",
        ],
    );
    let redis = bridge_task("t1", "cache", "172.17.0.2", &[6379]);
    assert_eq!(show(&world(vec![redis], "").snapshot())[0], "cache:80 Tcp", "the alias of an opaque port is opaque");
    // The service really has a port 80 elsewhere: then 8080 is only itself.
    let other = bridge_task("t2", "web_App", "172.17.0.3", &[80]);
    let shown = show(&world(vec![one, other], "").snapshot());
    assert_eq!(shown[1], "  10.90.1.10:32768 t2 at 172.17.0.3:80 direct=true Healthy 100");
    assert_eq!(shown.iter().filter(|line| line.contains("t1 at")).count(), 1);
}

#[test]
fn each_network_mode_has_its_addresses() {
    let bridge = bridge_task("t1", "web", "172.17.0.2", &[80]);
    let with = |mode, address: Option<&str>| {
        let mut task = Task { mode, address: address.map(|ip| ip.parse().expect("a literal")), ..bridge.clone() };
        task.containers[0].published.clear();
        world(vec![task], "")
    };
    check(
        &with(NetworkMode::Bridge, Some("172.17.0.2")),
        &["web:80 Auto", "  172.17.0.2:80 t1 at 172.17.0.2:80 direct=true Healthy 100"],
    );
    check(
        &with(NetworkMode::Awsvpc, Some("10.0.0.9")),
        &["web:80 Auto", "  10.0.0.9:80 t1 at 10.0.0.9:80 direct=false Healthy 100"],
    );
    check(
        &with(NetworkMode::Host, None),
        &["web:80 Auto", "  10.90.1.10:80 t1 at 10.90.1.10:80 direct=true Healthy 100"],
    );
    check(&with(NetworkMode::None, None), &[]);
    let mut on_loopback = bridge;
    on_loopback.containers[0].published[0].host = addr("127.0.0.1:32768");
    check(
        &world(vec![on_loopback], ""),
        &["web:80 Auto", "  172.17.0.2:80 t1 at 172.17.0.2:80 direct=true Healthy 100"],
    );
}

#[test]
fn phase_and_health() {
    let mut task = bridge_task("t1", "web", "172.17.0.2", &[80]);
    let health = |task: &Task| {
        let snapshot = world(vec![task.clone()], "").snapshot();
        let service = &snapshot.services["web"];
        service.ports.first().and_then(|port| port.endpoints.first()).map(|endpoint| endpoint.health)
    };
    task.phase = Phase::Created;
    assert_eq!(health(&task), None);
    assert!(world(vec![task.clone()], "").snapshot().workloads.contains_key("t1"), "but it is to be armed");
    task.phase = Phase::Running;
    for (given, expected) in [
        (None, Health::Healthy),
        (Some(ContainerHealth::Healthy), Health::Healthy),
        (Some(ContainerHealth::Starting), Health::Unhealthy),
        (Some(ContainerHealth::Unhealthy), Health::Unhealthy),
    ] {
        task.containers[0].health = given;
        assert_eq!(health(&task), Some(expected), "{given:?}");
    }
}

#[test]
fn who_is_enrolled() {
    let enrol = World::default().enrol;
    let check = |family: &str, label: Option<&str>, default: bool, expected: bool| {
        let mut task = bridge_task("t", family, "172.17.0.2", &[80]);
        task.labels.extend(label.map(|label| (ENABLED_LABEL.to_owned(), label.to_owned())));
        assert_eq!(enrolled(&task, &Enrol { default, ..enrol.clone() }), expected, "{family} {label:?} {default}");
    };
    check("web", None, true, true);
    check("web", None, false, false);
    check("web", Some("false"), true, false);
    check("web", Some("True"), false, true);
    check("web", Some("perhaps"), true, true);
    check("excluded", None, true, false);
    check("excluded", Some("true"), true, false);
}

#[test]
fn a_label_names_the_service() {
    let mut task = bridge_task("t1", "world-v1", "172.17.0.2", &[8080]);
    task.labels.insert(SERVICE_LABEL.into(), "Checkout".into());
    let snapshot = world(vec![task], STATIC).snapshot();
    let workload = &snapshot.workloads["t1"];
    assert_eq!(workload.service.as_str(), "checkout");
    assert_eq!(workload.identity.as_str(), "spiffe://a/ns/demo/sa/checkout");
}

#[test]
fn the_file_lists_an_address_of_another_service() {
    let text = "[[service]]\nname = \"alias\"\nports = [{ port = 80 }]\n[[service.endpoint]]\naddress = \"10.90.1.10:32768\"\n";
    let snapshot = world(vec![bridge_task("t1", "web", "172.17.0.2", &[80])], text).snapshot();
    let endpoint = &snapshot.services["alias"].ports[0].endpoints[0];
    assert_eq!(endpoint.identity.as_ref().expect("in the mesh").as_str(), "spiffe://a/ns/demo/sa/web");
    let Some(Target::Endpoint { service, .. }) = snapshot.target(addr("[::ffff:10.90.1.10]:32768")) else {
        panic!("known");
    };
    assert_eq!(service.as_str(), "web", "its own service comes first");
}

#[test]
fn a_reused_host_port_belongs_to_the_running_task() {
    let old = Task { phase: Phase::Stopping, ..bridge_task("a", "web", "172.17.0.2", &[80]) };
    let new = bridge_task("b", "web", "172.17.0.3", &[80]);
    check(
        &world(vec![old, new], ""),
        &["web:80 Auto", "  10.90.1.10:32768 b at 172.17.0.3:80 direct=true Healthy 100"],
    );
}

#[test]
fn it_scales() {
    let entry = |n: u16| {
        let endpoint = |e: u16| EndpointEntry {
            port: None,
            endpoint: Arc::new(Endpoint::listed(
                SocketAddr::new([10, (n >> 8) as u8, n as u8, e as u8].into(), 80),
                Some(addr("10.91.0.1:15008")),
                Some("spiffe://a/ns/demo/sa/s".parse().expect("valid")),
            )),
            alias: false,
            assumed: false,
        };
        services::ServiceEntry {
            name: format!("s{n}").parse().expect("valid"),
            ports: vec![PortEntry { port: 80, target: None, protocol: None }],
            endpoints: (0..10).map(endpoint).collect(),
            tls: None,
            on_agent_death: None,
            families: Vec::new(),
            alone: false,
            owners: None,
        }
    };
    let set = ServiceSet::of((0..5000).map(entry));
    let world = World { sets: vec![set], ..World::default() };
    // Quadratic work over 50,000 endpoints would not end within the patience of anybody.
    let snapshot = world.snapshot();
    assert_eq!(snapshot.by_address.len(), 5000 * 12);
    // The snapshot holds what the source holds, and no copy.
    let (service, entry) = (&snapshot.services["s7"], &world.sets[0].services["s7"]);
    assert!(Arc::ptr_eq(&service.ports[0].endpoints[3], &entry.endpoints[3].endpoint));
    assert_eq!(world.after(&snapshot).generation, snapshot.generation);
    // A small change does not fill the tables anew, and they come to the same.
    let mut moved = services::ServiceEntry::clone(&world.sets[0].services["s7"]);
    moved.endpoints[3].endpoint = Arc::new(Endpoint::listed(addr("10.92.0.1:80"), None, None));
    let mut world = world;
    world.sets[0].services.insert(moved.name.clone(), Arc::new(moved));
    let after = world.after(&snapshot);
    assert!(after.target(addr("10.92.0.1:80")).is_some() && after.target(addr("10.0.7.3:80")).is_none());
    tables_are_those_of(&after).expect("as from the beginning");
}

/// The look-up tables, made again from the services alone.
fn tables_are_those_of(snapshot: &Snapshot) -> Result<(), TestCaseError> {
    let mut claims: BTreeMap<_, BTreeSet<Target>> = BTreeMap::new();
    let mut numbers = BTreeSet::new();
    for service in snapshot.services.values() {
        index::claim(service, |addr, target| {
            claims.entry(addr).or_default().insert(target);
        });
        numbers.extend(service.ports.iter().map(|port| port.id));
        let vips = [IpAddr::from(service.vip.v4), service.vip.v6.into()];
        prop_assert!(vips.iter().all(|ip| snapshot.service_at(*ip).is_some_and(|at| Arc::ptr_eq(at, service))));
    }
    prop_assert_eq!(snapshot.by_vip.len(), 2 * snapshot.services.len());
    prop_assert!(snapshot.by_address.keys().eq(claims.keys()));
    for (addr, destination) in &snapshot.by_address {
        let best = claims[addr].iter().min_by_key(|target| (index::rank(snapshot, *addr, target), *target));
        prop_assert_eq!(best, Some(&destination.target));
        numbers.insert(destination.number);
    }
    prop_assert!(snapshot.by_service_number.keys().eq(numbers.iter()), "a number without a destination");
    claims.retain(|_, claimants| claimants.len() > 1);
    prop_assert!(snapshot.contested.iter().map(|(addr, all)| (addr, &**all)).eq(&claims));
    Ok(())
}

/// What must hold of every snapshot.
fn consistent(snapshot: &Snapshot) -> Result<(), TestCaseError> {
    tables_are_those_of(snapshot)?;
    for (addr, target) in &snapshot.by_address {
        let Destination { number, target } = &**target;
        let addr = SocketAddr::from(*addr);
        let (Target::Service { service: name, port } | Target::Endpoint { service: name, port, .. }) = target;
        prop_assert_eq!(snapshot.by_service_number.get(number).map(|destination| &destination.target), Some(target));
        let service = &snapshot.services[name];
        let port = &service.ports[service.port_index(*port).expect("a port of the service")];
        match target {
            Target::Service { .. } => {
                prop_assert!(addr.ip() == service.vip.v4 || addr.ip() == service.vip.v6);
                prop_assert_eq!(port.id, *number);
            }
            Target::Endpoint { endpoint, .. } => {
                let endpoint = port.endpoint(endpoint).expect("an endpoint of the port");
                let deliver = match &endpoint.reach {
                    Reach::Local { deliver, .. } => Some(*deliver),
                    Reach::Tunnel { .. } | Reach::Plaintext => None,
                };
                prop_assert!(endpoint.addr() == addr || deliver == Some(addr));
            }
        }
    }
    for service in snapshot.services.values() {
        prop_assert!(service.ports.windows(2).all(|w| w[0].port < w[1].port));
        for port in &service.ports {
            prop_assert!(port.endpoints.windows(2).all(|w| w[0].id < w[1].id));
            prop_assert!(snapshot.target(SocketAddr::new(service.vip.v4.into(), port.port)).is_some());
            for endpoint in &port.endpoints {
                prop_assert!(snapshot.target(endpoint.addr()).is_some());
                prop_assert_eq!(endpoint.identity.is_none(), endpoint.reach == Reach::Plaintext);
                if let Reach::Local { task, .. } = &endpoint.reach {
                    prop_assert_eq!(endpoint.identity.as_ref(), Some(&snapshot.workloads[task].identity));
                }
            }
        }
    }
    for (number, workload) in &snapshot.by_number {
        prop_assert_eq!(*number, workload.number);
        prop_assert_ne!(*number, 0);
    }
    prop_assert_eq!(snapshot.by_number.len(), snapshot.workloads.len());
    prop_assert!(!snapshot.by_service_number.contains_key(&0));
    Ok(())
}

proptest! {
    #[test]
    fn a_snapshot_is_consistent(world in arb::world(), other in arb::world()) {
        let first = world.snapshot();
        consistent(&first)?;
        consistent(&other.after(&first))?;
    }

    #[test]
    fn order_of_arrival_does_not_matter(world in arb::world(), other in arb::world(), turn in any::<prop::sample::Index>()) {
        let previous = other.snapshot();
        let mut turned = world.clone();
        if !turned.tasks.is_empty() {
            let n = turn.index(turned.tasks.len());
            turned.tasks.rotate_left(n);
        }
        let (a, b) = (world.after(&previous), turned.after(&previous));
        prop_assert_eq!(&a.services, &b.services);
        prop_assert_eq!(&a.workloads, &b.workloads);
        prop_assert_eq!(&a.by_address, &b.by_address);
        prop_assert_eq!(&a.by_service_number, &b.by_service_number);
    }

    #[test]
    fn a_merge_that_begins_with_the_last_one_comes_to_the_same(worlds in arb::worlds()) {
        let mut known = Merged::default();
        for world in &worlds {
            let before = known.clone();
            known = merge(&before, &world.sources());
            let fresh = merge(&Merged { known: None, ..before }, &world.sources());
            prop_assert_eq!(format!("{:#?}", known.snapshot), format!("{:#?}", fresh.snapshot));
            prop_assert_eq!(&known.vips, &fresh.vips);
            prop_assert_eq!(&known.homeless, &fresh.homeless);
            consistent(&known.snapshot)?;
        }
    }

    #[test]
    fn twice_is_once(world in arb::world()) {
        let once = world.snapshot();
        let twice = world.after(&once);
        prop_assert_eq!(once.generation, twice.generation);
        for (name, service) in &once.services {
            prop_assert!(Arc::ptr_eq(service, &twice.services[name]));
        }
    }

    #[test]
    fn numbers_are_kept_and_never_pass_to_another(worlds in prop::collection::vec(arb::world(), 2..5)) {
        let mut previous = Snapshot::default();
        let mut owners: HashMap<u32, TaskId> = HashMap::new();
        let mut meaning: HashMap<u32, Target> = HashMap::new();
        for world in &worlds {
            let next = world.after(&previous);
            for workload in next.workloads.values() {
                if let Some(before) = previous.workloads.get(&workload.task) {
                    prop_assert_eq!(before.number, workload.number);
                }
                let owner = owners.entry(workload.number).or_insert_with(|| workload.task.clone());
                prop_assert_eq!(&*owner, &workload.task);
            }
            for (number, destination) in &next.by_service_number {
                prop_assert_eq!(*number, destination.number);
                let first = meaning.entry(*number).or_insert_with(|| destination.target.clone());
                prop_assert_eq!(&*first, &destination.target);
            }
            for (name, service) in &next.services {
                if let Some(before) = previous.services.get(name) {
                    prop_assert_eq!(before == service, Arc::ptr_eq(before, service));
                }
            }
            let same = next.services == previous.services && next.workloads == previous.workloads && next.policy == previous.policy;
            prop_assert_eq!(next.generation, previous.generation + u64::from(!same));
            previous = next;
        }
    }
}

#[test]
fn a_number_in_use_is_not_given_again_when_they_begin_anew() {
    let one = World { tasks: vec![bridge_task("a", "web", "172.17.0.2", &[80])], ..World::default() };
    let mut first = one.snapshot();
    assert_eq!(first.workloads["a"].number, 1);
    first.last.workload = u32::MAX;
    let two = World { tasks: vec![one.tasks[0].clone(), bridge_task("b", "web", "172.17.0.3", &[80])], ..one };
    let next = two.after(&first);
    assert_eq!((next.workloads["a"].number, next.workloads["b"].number), (1, 2), "never 0, never twice");
}

#[test]
fn nobody_takes_a_virtual_address_away_by_registering_it() {
    let file = |text: &str| services::parse(text).expect("parses");
    let service = "[[service]]\nname = \"world\"\nports = [{ port = 80 }]\n";
    let mut world = World { sets: vec![file(service)], ..World::default() };
    let before = world.snapshot();
    let vip = SocketAddr::new(before.services["world"].vip.v4.into(), 80);
    let thief = format!(
        "[[service]]\nname = \"thief\"\nports = [{{ port = 80 }}]\n[[service.endpoint]]\naddress = \"{vip}\"\n"
    );
    world.sets.push(file(&thief));
    let after = world.after(&before);
    assert!(after.services.contains_key("thief"));
    assert_eq!(after.target(vip), before.target(vip));
}

#[test]
fn an_alias_gives_way_to_who_is_asked_for_by_that_port() {
    let endpoint = |port, alias, at: &str| EndpointEntry {
        port,
        endpoint: Arc::new(Endpoint::listed(addr(at), None, None)),
        alias,
        assumed: false,
    };
    let registry = |endpoints| ServiceSet::of([registered("world", endpoints)]);
    let two = vec![endpoint(Some(80), true, "10.0.0.1:32768"), endpoint(None, true, "10.0.0.2:32768")];
    let world = |sets| World { sets, ..World::default() };
    let (one, other) = ("  10.0.0.1:32768 plain Healthy 100", "  10.0.0.2:32768 plain Healthy 100");
    check(&world(vec![registry(two.clone())]), &["world:80 Auto", one, other]);
    // Somebody is really at port 80.
    let real = vec![two[0].clone(), two[1].clone(), endpoint(Some(80), false, "10.0.0.3:80")];
    check(&world(vec![registry(real)]), &["world:80 Auto", "  10.0.0.3:80 plain Healthy 100"]);
    // Somebody defines the ports.
    let file = |ports: &str| services::parse(&format!("[[service]]\nname = \"world\"\nports = [{ports}]\n"));
    let file = |ports: &str| file(ports).expect("parses");
    check(
        &world(vec![file("{ port = 8080 }"), registry(two.clone())]),
        &["world:8080 Auto", "  10.0.0.2:32768 plain Healthy 100"],
    );
    check(
        &world(vec![file("{ port = 8080 }, { port = 80 }"), registry(two)]),
        &["world:80 Auto", one, other, "world:8080 Auto"],
    );
}

/// What Cloud Map says of `world`: an instance for each of these, of which nobody says the port.
fn without_ports(addresses: &[&str]) -> ServiceSet {
    use crate::{cloud_map::entries, config::cloud_map::tests::cloud_map};
    let instance = |ip: &&str| entries::Instance {
        id: (*ip).into(),
        health: entries::Said::Healthy,
        attributes: [(entries::attribute::IPV4.to_owned(), (*ip).to_owned())].into(),
    };
    let instances: Vec<_> = addresses.iter().map(instance).collect();
    let (found, problems) = entries::entries(&"world".parse().expect("valid"), None, &instances, &cloud_map(""));
    assert!(problems.is_empty(), "{problems:?}");
    ServiceSet::of(found.iter().map(|it| services::ServiceEntry::clone(&it.entry)))
}

#[test]
fn a_port_that_nobody_said_gives_way_to_one_that_somebody_knows() {
    let endpoint = |port, alias, at: &str| EndpointEntry {
        port: Some(port),
        endpoint: Arc::new(Endpoint::listed(addr(at), Some(SocketAddr::new(addr(at).ip(), 15008)), None)),
        alias,
        assumed: false,
    };
    let world = |tasks, sets: Vec<ServiceSet>| World { sets, tasks, ..World::default() };
    // Alone, it has the usual port, also beside one that is really there.
    let (one, other) = ("  10.0.0.1:80 plain Healthy 100", "  10.0.0.2:80 plain Healthy 100");
    check(&world(vec![], vec![without_ports(&["10.0.0.1", "10.0.0.2"])]), &["world:80 Auto", one, other]);
    let real = ServiceSet::of([registered("world", vec![endpoint(80, false, "10.0.0.3:80")])]);
    let third = "  10.0.0.3:80 by 10.0.0.3:15008 Healthy 100";
    check(&world(vec![], vec![real, without_ports(&["10.0.0.1"])]), &["world:80 Auto", one, third]);
    // ECS knows the container's port, and who is in front of it.
    let by_ecs = vec![endpoint(8080, false, "10.0.0.1:8080"), endpoint(80, true, "10.0.0.1:8080")];
    let by_ecs = ServiceSet::of([registered("world", by_ecs)]);
    let tunnel = "  10.0.0.1:8080 by 10.0.0.1:15008 Healthy 100";
    for sets in [vec![by_ecs.clone(), without_ports(&["10.0.0.1"])], vec![without_ports(&["10.0.0.1"]), by_ecs]] {
        check(&world(vec![], sets), &["world:80 Auto", tunnel, "world:8080 Auto", tunnel]);
    }
    // So does this host, of its own tasks.
    let mut task = Task { mode: NetworkMode::Awsvpc, ..bridge_task("t1", "world", "10.0.0.1", &[8080]) };
    task.containers[0].published.clear();
    let local = "  10.0.0.1:8080 t1 at 10.0.0.1:8080 direct=false Healthy 100";
    check(
        &world(vec![task], vec![without_ports(&["10.0.0.1", "10.0.0.2"])]),
        &["world:80 Auto", local, other, "world:8080 Auto", local],
    );
}

fn registered(name: &str, endpoints: Vec<EndpointEntry>) -> services::ServiceEntry {
    services::ServiceEntry {
        name: name.parse().expect("valid"),
        ports: Vec::new(),
        endpoints,
        tls: None,
        on_agent_death: None,
        families: Vec::new(),
        alone: false,
        owners: None,
    }
}

#[test]
fn a_source_may_say_that_it_alone_counts() {
    let file = |more: &str, at: &str| {
        services::parse(&format!(
            "[[service]]\nname = \"world\"\n{more}\nports = [{{ port = 80 }}]\n[[service.endpoint]]\naddress = \"{at}\"\n"
        ))
        .expect("parses")
    };
    let (one, other) = ("10.0.0.1:80", "10.0.0.2:80");
    let lines = |all: &[&str]| -> Vec<String> {
        let endpoint = |at: &&str| format!("  {at} plain Healthy 100");
        ["world:80 Auto".to_owned()].into_iter().chain(all.iter().map(endpoint)).collect()
    };
    for (first, second, expected) in [
        ("", "", vec![one, other]),
        ("override = true", "", vec![one]),
        ("", "override = true", vec![one, other]),
        ("override = true", "override = true", vec![one]),
    ] {
        let world = World { sets: vec![file(first, one), file(second, other)], ..World::default() };
        assert_eq!(show(&world.snapshot()), lines(&expected), "{first:?} {second:?}");
    }
}

/// The sources of a world in another order.
fn reordered(world: &World) -> World {
    let mut other = world.clone();
    other.sets.reverse();
    other
}

proptest! {
    /// A source that is asked twice says nothing new, wherever it stands.
    #[test]
    fn a_source_twice_is_the_source_once(world in arb::world(), which in any::<prop::sample::Index>()) {
        let mut twice = world.clone();
        if !world.sets.is_empty() {
            twice.sets.push(which.get(&world.sets).clone());
        }
        prop_assert_eq!(show(&world.snapshot()), show(&twice.snapshot()));
    }

    /// Where two sources do not speak of the same services, their order does not matter.
    #[test]
    fn sources_that_do_not_meet_are_equal(mut world in arb::world()) {
        let mut seen = BTreeSet::new();
        for set in &mut world.sets {
            let services = set.services.clone();
            set.services = services.into_iter().filter(|(name, _)| seen.insert(name.clone())).collect();
            set.policy = None;
        }
        prop_assert_eq!(show(&world.snapshot()), show(&reordered(&world).snapshot()));
    }

    /// Order decides who wins, not which endpoints there are: none is lost and none is there twice.
    #[test]
    fn order_loses_no_endpoint(mut world in arb::world()) {
        // Whether an endpoint is this host's own stale one depends on what is said of it, and who says it first.
        for set in &mut world.sets {
            set.services = set.services.iter().map(|(name, entry)| {
                let mut entry = services::ServiceEntry::clone(entry);
                entry.endpoints.iter_mut().for_each(|it| Arc::make_mut(&mut it.endpoint).reach = Reach::Plaintext);
                (name.clone(), Arc::new(entry))
            }).collect();
        }
        let addresses = |world: &World| -> Vec<(ServiceName, u16, SocketAddr)> {
            let snapshot = world.snapshot();
            let all = snapshot.services.values().flat_map(|service| {
                service.ports.iter().flat_map(|port| port.endpoints.iter().map(|e| (service.name.clone(), port.port, e.addr())))
            });
            all.collect()
        };
        let (a, b) = (addresses(&world), addresses(&reordered(&world)));
        prop_assert_eq!(a.iter().collect::<BTreeSet<_>>().len(), a.len(), "twice");
        // A task's family belongs to the first source that claims it.
        prop_assume!(world.sets.iter().filter(|set| set.services.values().any(|entry| !entry.families.is_empty())).count() < 2);
        prop_assert_eq!(a.into_iter().collect::<BTreeSet<_>>(), b.into_iter().collect::<BTreeSet<_>>());
    }
}
