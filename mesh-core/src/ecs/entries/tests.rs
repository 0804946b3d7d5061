//! Clusters, and what the mesh makes of them.

use std::sync::Arc;

use proptest::prelude::*;

use super::{
    super::model::{Deployment, Port, Service},
    *,
};
use crate::{
    config::{self, ecs::tests::ecs},
    merge,
    model::Protocol,
    task,
};

fn usual() -> config::Config {
    let text = "[identity]\ntrust_domain = \"t\"\nca_bundle = \"/x\"\njoin_token_file = \"/x\"\n";
    config::parse(text).expect("parses")
}

fn mesh() -> Mesh {
    let config = usual();
    let suffixes = vec!["mesh".to_owned(), "my.demo".to_owned()];
    Mesh { trust_domain: config.identity.trust_domain, enrol: config.enrol, suffixes }
}

fn definition(family: &str, mode: NetworkMode, ports: &[u16]) -> Definition {
    let port = |port: &u16| Port { container: *port, name: Some(format!("p{port}")), protocol: Some(Protocol::Grpc) };
    Definition {
        family: family.into(),
        revision: 7,
        mode,
        containers: vec![Container {
            name: "c".into(),
            ports: ports.iter().map(port).collect(),
            ..Container::default()
        }],
        is_checked: false,
    }
}

fn labels(labels: &[(&str, &str)]) -> BTreeMap<String, String> {
    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn labelled(mut definition: Definition, all: &[(&str, &str)]) -> Definition {
    definition.containers[0].labels = labels(all);
    definition
}

fn bindings(container: &str, ports: &[(u16, u16)]) -> Vec<Binding> {
    ports
        .iter()
        .map(|(port, host_port)| Binding { container: container.into(), port: *port, host_port: *host_port })
        .collect()
}

fn task(n: u8, definition: &str) -> Task {
    Task {
        arn: format!("task/{n}"),
        service: Some("World".into()),
        definition: definition.into(),
        deployment: Some("ecs-svc/1".into()),
        instance: Some("host/1".into()),
        zone: Some("eu-central-1a".into()),
        launch_type: "EC2".into(),
        state: State::Running(Checked::Unknown),
        address: None,
        bindings: Vec::new(),
        tags: BTreeMap::new(),
    }
}

/// A cluster with one service, one deployment, one container instance with an agent, and these.
fn cluster(definition: Definition, tasks: Vec<Task>) -> Cluster {
    let deployment = Deployment { status: "PRIMARY".into(), ..Deployment::default() };
    let service = Service { deployments: [("ecs-svc/1".to_owned(), deployment)].into() };
    let attributes = [(attribute::ADDRESS, "10.0.0.1"), (attribute::TUNNEL_PORT, "15008")];
    let attributes = attributes.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let instance = Instance { ec2_id: Some("i-1".into()), attributes };
    Cluster {
        services: [("World".to_owned(), service)].into(),
        tasks,
        instances: [("host/1".to_owned(), instance)].into(),
        definitions: [("d".to_owned(), definition.into())].into(),
    }
}

fn found(cluster: &Cluster) -> (ServiceSet, Vec<String>) {
    entries(&[("demo".parse().expect("valid"), cluster.clone())], &ecs(""), &mesh())
}

/// `name: port[*] addr [by agent as service], …`
fn show(cluster: &Cluster) -> Vec<String> {
    lines(&found(cluster).0)
}

fn lines(set: &ServiceSet) -> Vec<String> {
    let endpoint = |e: &EndpointEntry| {
        let agent = e.endpoint.agent().map(|agent| format!(" by {agent}")).unwrap_or_default();
        let id = e.endpoint.identity.as_ref().map(|id| format!(" as {}", id.as_str())).unwrap_or_default();
        format!("{}{} {}{agent}{id}", e.port.unwrap_or(0), if e.alias { "*" } else { "" }, e.endpoint.addr())
    };
    let entry = |entry: &Arc<ServiceEntry>| {
        format!("{}: {}", entry.name, entry.endpoints.iter().map(endpoint).collect::<Vec<_>>().join(", "))
    };
    set.services.values().map(entry).collect()
}

#[test]
fn each_network_mode_has_its_addresses() {
    let by = "by 10.0.0.1:15008 as spiffe://t/ns/demo/sa/world";
    let bridge = Task { bindings: bindings("c", &[(8080, 32768)]), ..task(1, "d") };
    let awsvpc = Task { address: Some([10, 0, 1, 7].into()), ..task(1, "d") };
    for (mode, ports, task, expected) in [
        (NetworkMode::Bridge, &[8080][..], bridge, format!("world: 80* 10.0.0.1:32768 {by}, 8080 10.0.0.1:32768 {by}")),
        (NetworkMode::Bridge, &[8080], task(1, "d"), "world: ".into()),
        (
            NetworkMode::Awsvpc,
            &[80, 9090],
            awsvpc,
            "world: 80 10.0.1.7:80 by 10.0.1.7:15008 as spiffe://t/ns/demo/sa/world, \
             9090 10.0.1.7:9090 by 10.0.1.7:15008 as spiffe://t/ns/demo/sa/world"
                .into(),
        ),
        (NetworkMode::Host, &[80], task(1, "d"), format!("world: 80 10.0.0.1:80 {by}")),
        (NetworkMode::None, &[80], task(1, "d"), "world: ".into()),
    ] {
        assert_eq!(show(&cluster(definition("world", mode, ports), vec![task])), [expected], "{mode:?}");
    }
}

#[test]
fn who_does_not_serve_is_left_out_at_once() {
    let checked = Definition { is_checked: true, ..definition("world", NetworkMode::Host, &[80]) };
    let plain = definition("world", NetworkMode::Host, &[80]);
    for (definition, state, serves) in [
        (&plain, State::Running(Checked::Unknown), true),
        (&checked, State::Running(Checked::Unknown), false),
        (&checked, State::Running(Checked::Healthy), true),
        (&checked, State::Running(Checked::Unhealthy), false),
        (&plain, State::Not, false),
    ] {
        let cluster = cluster(definition.clone(), vec![Task { state, ..task(1, "d") }]);
        let (set, _) = found(&cluster);
        assert_eq!(set.services["world"].endpoints.len(), usize::from(serves), "{state:?}");
    }
}

#[test]
fn in_the_mesh_or_not_is_known() {
    let plain = "world: 80 10.0.0.1:80";
    let meshed = format!("{plain} by 10.0.0.1:15008 as spiffe://t/ns/demo/sa/world");
    let host = |labels: &[(&str, &str)]| {
        cluster(labelled(definition("world", NetworkMode::Host, &[80]), labels), vec![task(1, "d")])
    };
    assert_eq!(show(&host(&[])), [meshed]);
    assert_eq!(show(&host(&[("ecs-mesh.enabled", "false")])), [plain]);
    let mut without = host(&[]);
    without.instances.values_mut().for_each(|it| drop(it.attributes.remove(attribute::TUNNEL_PORT)));
    assert_eq!(show(&without), [plain], "no agent there");
    let (set, _) = entries(
        &[("demo".parse().expect("valid"), host(&[]))],
        &ecs(""),
        &Mesh { enrol: Enrol { exclude: vec!["world".into()], ..mesh().enrol }, ..mesh() },
    );
    assert_eq!(lines(&set), [plain], "never in the mesh");
    let mut nowhere = host(&[]);
    nowhere.instances.values_mut().for_each(|it| it.attributes.clear());
    let (set, problems) = found(&nowhere);
    assert_eq!(lines(&set), ["world: "]);
    assert!(problems[0].starts_with("World: the container instance i-1 does not say its address"), "{problems:?}");
    for (key, value) in [(attribute::ADDRESS, "127.0.0.1"), (attribute::TUNNEL_PORT, "0")] {
        let mut bad = host(&[]);
        bad.instances.values_mut().for_each(|it| drop(it.attributes.insert(key.into(), value.into())));
        let (set, problems) = found(&bad);
        assert_eq!((lines(&set), problems.len()), (vec!["world: ".to_owned()], 1), "{key}");
    }
    // Fargate: an address of its own, and no host.
    let fargate = Task { address: Some([10, 0, 1, 7].into()), instance: None, ..task(1, "d") };
    assert_eq!(
        show(&cluster(definition("world", NetworkMode::Awsvpc, &[80]), vec![fargate])),
        ["world: 80 10.0.1.7:80"]
    );
}

#[test]
fn a_service_and_its_family_have_names_of_their_own() {
    let labelled = labelled(definition("world-task", NetworkMode::Host, &[80]), &[(SERVICE_LABEL, "shop")]);
    let by = "80 10.0.0.1:80 by 10.0.0.1:15008 as spiffe://t/ns/demo/sa";
    assert_eq!(show(&cluster(labelled, vec![task(1, "d")])), [format!("shop: {by}/shop"), format!("world: {by}/shop")]);
    let family = cluster(definition("world-task", NetworkMode::Host, &[80]), vec![task(1, "d")]);
    assert_eq!(show(&family), [format!("world: {by}/world-task"), format!("world-task: {by}/world-task")]);
    let alone = Task { service: None, ..task(1, "d") };
    let cluster = cluster(definition("world", NetworkMode::Host, &[80]), vec![alone]);
    assert_eq!(show(&cluster), ["world: "], "nobody's service");
    let clusters =
        [("demo".parse().expect("valid"), Cluster::default()), ("Other_one".parse().expect("valid"), family)];
    let (set, _) = entries(&clusters, &ecs("exclude = [\"x\"]"), &mesh());
    let by = "80 10.0.0.1:80 by 10.0.0.1:15008 as spiffe://t/ns/Other_one/sa/world-task";
    assert_eq!(lines(&set), [format!("world--dc-other-one: {by}"), format!("world-task--dc-other-one: {by}")]);
    let (set, _) = entries(&clusters, &ecs("exclude = [\"World\"]"), &mesh());
    assert!(lines(&set).is_empty());
}

/// The task as its host sees it, one for each container where they have no namespace together.
fn seen_by_host(definition: &Definition, task: &Task) -> Vec<task::Task> {
    let host: IpAddr = [10, 0, 0, 1].into();
    let container = |it: &Container| {
        let own = task.bindings.iter().filter(|binding| binding.container == it.name);
        let published = |it: &Binding| task::Published { container_port: it.port, host: (host, it.host_port).into() };
        task::Container {
            id: it.name.clone(),
            name: it.name.clone(),
            exposed: it.ports.iter().map(|port| port.container).collect(),
            published: own.map(published).collect(),
            cgroup: None,
            pid: None,
            health: None,
        }
    };
    let one = |n: usize, containers: &[Container]| {
        let mut labels = BTreeMap::new();
        for (key, value) in containers.iter().flat_map(|it| &it.labels) {
            labels.entry(key.clone()).or_insert_with(|| value.clone());
        }
        task::Task {
            id: format!("t{n}").parse().expect("valid"),
            cluster: Some("demo".parse().expect("valid")),
            family: definition.family.clone(),
            mode: definition.mode,
            phase: task::Phase::Running,
            containers: containers.iter().map(container).collect(),
            address: task.address.or_else(|| Some([172, 17, 0, u8::try_from(n).expect("few")].into())),
            netns: None,
            labels,
        }
    };
    match definition.mode {
        NetworkMode::Awsvpc => vec![one(2, &definition.containers)],
        NetworkMode::Bridge | NetworkMode::Host | NetworkMode::None => {
            definition.containers.chunks(1).enumerate().map(|(n, containers)| one(n + 2, containers)).collect()
        }
    }
}

/// `address as identity`, of every endpoint that the tasks' own host knows.
fn known_by_host(tasks: Vec<task::Task>) -> BTreeSet<String> {
    let mesh = mesh();
    let sources = merge::Sources {
        sets: &[],
        tasks: tasks.into(),
        gate: &crate::readiness::Gate::Open,
        enrol: &mesh.enrol,
        cluster: &"demo".parse().expect("valid"),
        trust_domain: &mesh.trust_domain,
        host: [10, 0, 0, 1].into(),
        tunnel: ([10, 0, 0, 1], 15008).into(),
        zone: None,
        vips: &usual().vip,
    };
    let snapshot = merge::merge(&merge::Merged::default(), &sources).snapshot;
    let endpoints = snapshot.services.values().flat_map(|service| &service.ports).flat_map(|port| &port.endpoints);
    endpoints.map(|it| format!("{} as {}", it.addr(), it.identity.as_ref().expect("in the mesh"))).collect()
}

#[test]
fn other_hosts_expect_who_the_tasks_own_host_lets_in() {
    let port = |port: u16| Port { container: port, name: None, protocol: None };
    let container = |name: &str, number: u16, all: &[(&str, &str)]| Container {
        name: name.into(),
        ports: vec![port(number)],
        labels: labels(all),
    };
    let containers = vec![
        container("a", 8080, &[(SERVICE_LABEL, "shop")]),
        container("b", 8081, &[(SERVICE_LABEL, "metrics")]),
        container("c", 8082, &[]),
        container("d", 8083, &[("ecs-mesh.enabled", "false")]),
    ];
    let mut seen = Vec::new();
    for mode in [NetworkMode::Bridge, NetworkMode::Host, NetworkMode::Awsvpc] {
        let definition = Definition { containers: containers.clone(), ..definition("world", mode, &[]) };
        let bound = [("a", 8080, 32768), ("b", 8081, 32769), ("c", 8082, 32770), ("d", 8083, 32771)];
        let bound = |_: ()| bound.iter().flat_map(|(name, port, host)| bindings(name, &[(*port, *host)])).collect();
        let (bindings, address) = match mode {
            NetworkMode::Bridge => (bound(()), None),
            NetworkMode::Awsvpc => (Vec::new(), Some([10, 0, 1, 7].into())),
            NetworkMode::Host | NetworkMode::None => (Vec::new(), None),
        };
        let task = Task { bindings, address, ..task(1, "d") };
        let local = known_by_host(seen_by_host(&definition, &task));
        let (set, problems) = found(&cluster(definition, vec![task]));
        assert!(problems.is_empty(), "{problems:?}");
        let endpoints: Vec<_> = set.services.values().flat_map(|entry| &entry.endpoints).collect();
        let remote = endpoints
            .iter()
            .filter_map(|it| Some(format!("{} as {}", it.endpoint.addr(), it.endpoint.identity.as_ref()?)));
        assert_eq!(remote.collect::<BTreeSet<_>>(), local, "{mode:?}");
        seen.push(lines(&set));
    }
    let by = |service: &str| format!("by 10.0.0.1:15008 as spiffe://t/ns/demo/sa/{service}");
    let (a, b, c) = (by("shop"), by("metrics"), by("world"));
    // The service of ECS has them all; its name is the family's here.
    assert_eq!(
        seen[0],
        [
            format!("metrics: 80* 10.0.0.1:32769 {b}, 8081 10.0.0.1:32769 {b}"),
            format!("shop: 80* 10.0.0.1:32768 {a}, 8080 10.0.0.1:32768 {a}"),
            format!(
                "world: 8080 10.0.0.1:32768 {a}, 8081 10.0.0.1:32769 {b}, 8082 10.0.0.1:32770 {c}, 8083 10.0.0.1:32771"
            ),
        ]
    );
    assert_eq!(seen[2].len(), 2, "one namespace, one service, besides that of ECS: {:?}", seen[2]);
}

#[test]
fn service_connect_gives_names_and_ports() {
    let mut cluster = cluster(definition("world", NetworkMode::Bridge, &[8080, 9090]), Vec::new());
    cluster.tasks = vec![Task { bindings: bindings("c", &[(8080, 32768), (9090, 32769)]), ..task(1, "d") }];
    let aliases = |all: &[(&str, u16)]| all.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect();
    let connects = vec![
        Connect { port_name: "p8080".into(), aliases: aliases(&[("server", 80), ("Api.my.demo", 8000)]) },
        Connect { port_name: "p9090".into(), aliases: aliases(&[("server", 81), ("far.example", 1)]) },
        Connect { port_name: "none".into(), aliases: aliases(&[("x", 1)]) },
    ];
    let service = cluster.services.get_mut("World").expect("there");
    service.deployments.get_mut("ecs-svc/1").expect("there").connects = connects;
    let (set, problems) = found(&cluster);
    let lines = lines(&set);
    let by = "by 10.0.0.1:15008 as spiffe://t/ns/demo/sa/world";
    assert_eq!(lines[0], format!("api: 8000 10.0.0.1:32768 {by}"));
    assert_eq!(lines[1], format!("server: 80 10.0.0.1:32768 {by}, 81 10.0.0.1:32769 {by}"));
    let ports = &set.services["server"].ports;
    assert_eq!(ports[0], PortEntry { port: 80, target: Some(8080), protocol: Some(Protocol::Grpc) });
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[1].contains("no name of the mesh can be made of the Service Connect alias far.example"));
    assert!(problems[0].contains("names the port none"));
}

#[test]
fn what_ecs_says_is_carried() {
    let mut cluster = cluster(definition("world", NetworkMode::Host, &[80]), Vec::new());
    let tags = [("color", "green"), ("ecs-revision", "99")];
    let tags = tags.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    cluster.tasks = vec![Task { tags, ..task(1, "d") }];
    let service = cluster.services.get_mut("World").expect("there");
    service.deployments.get_mut("ecs-svc/1").expect("there").external_id = Some("blue".into());
    let (set, _) = found(&cluster);
    let endpoint = &set.services["world"].endpoints[0];
    assert_eq!(endpoint.endpoint.zone.as_deref(), Some("eu-central-1a"));
    let shown: Vec<_> = endpoint.endpoint.attributes.meta.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(
        shown,
        [
            "color=green",
            "ecs-cluster=demo",
            "ecs-deployment=ecs-svc/1",
            "ecs-deployment-status=PRIMARY",
            "ecs-family=world",
            "ecs-instance=i-1",
            "ecs-launch-type=EC2",
            "ecs-revision=7",
            "ecs-service=World",
            "ecs-task-set=blue",
        ]
    );
}

proptest! {
    /// The order of tasks does not matter, every endpoint is a running task's, and a tunnel never comes without an
    /// identity.
    #[test]
    fn order_does_not_matter(states in prop::collection::vec((0_u8..4, any::<bool>(), 1_u8..250), 0..12)) {
        let mut tasks: Vec<Task> = Vec::new();
        for (n, (state, hosted, last)) in states.iter().enumerate() {
            let state = match state {
                0 => State::Not,
                1 => State::Running(Checked::Unhealthy),
                2 => State::Running(Checked::Unknown),
                _ => State::Running(Checked::Healthy),
            };
            let instance = hosted.then(|| "host/1".to_owned());
            let address = Some([10, 0, 2, *last].into());
            tasks.push(Task { state, instance, address, ..task(u8::try_from(n).expect("few"), "d") });
        }
        let well: BTreeSet<IpAddr> = tasks
            .iter()
            .filter(|it| matches!(it.state, State::Running(Checked::Unknown | Checked::Healthy)))
            .filter_map(|it| it.address)
            .collect();
        let forth = cluster(definition("world", NetworkMode::Awsvpc, &[80]), tasks.clone());
        let (set, problems) = found(&forth);
        prop_assert!(problems.is_empty());
        let endpoints = &set.services["world"].endpoints;
        let reached: BTreeSet<IpAddr> = endpoints.iter().map(|endpoint| endpoint.endpoint.addr().ip()).collect();
        prop_assert_eq!(reached, well);
        prop_assert!(endpoints.iter().all(|it| it.endpoint.agent().is_some() == it.endpoint.identity.is_some()));
        let unique: BTreeSet<_> = states.iter().map(|(_, _, last)| last).collect();
        if unique.len() == states.len() {
            tasks.reverse();
            let back = cluster(definition("world", NetworkMode::Awsvpc, &[80]), tasks);
            prop_assert_eq!(set, found(&back).0);
        }
    }
}
