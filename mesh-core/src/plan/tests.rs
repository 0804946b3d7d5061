//! Where connections go, and every way in which they do not. Snapshots are built by hand or generated.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    arb::{self, World, bridge_task},
    consul::answer::{Instance, Status, Weights},
    merge::{self, Merged},
    model::{Health, Numbers, OnAgentDeath, Reach, Target, TlsMode},
    services,
    task::{Phase, Task},
    vip::VipTable,
};

const FILE: &str = r#"
[[service]]
name = "world"
ports = [ { port = 80, protocol = "http" }, { port = 5432 }, { port = 7 } ]
[[service.endpoint]]
address = "10.90.1.11:32768"
port = 80
agent = "10.90.1.11:15008"
[[service.endpoint]]
address = "10.90.1.12:80"
port = 80
[[service.endpoint]]
address = "10.90.1.11:5432"
port = 5432
agent = "10.90.1.11:15008"
[[service]]
name = "legacy"
tls = "permissive"
ports = [ { port = 80 } ]
[[service.endpoint]]
address = "10.90.1.13:80"
[[service]]
name = "plain"
ports = [ { port = 80 } ]
[[service.endpoint]]
address = "10.90.1.14:80"
[[service]]
name = "cache"
ports = [ { port = 6379 } ]
[[service.endpoint]]
address = "10.90.1.11:6379"
agent = "10.90.1.11:15008"
[policy]
[[policy.rule]]
name = "no-cache"
effect = "deny"
from = ["spiffe://a/ns/demo/sa/web"]
to = ["cache"]
"#;

/// A host with task `web` (the caller) and whatever else is given.
fn snapshot(more: Vec<Task>) -> Snapshot {
    let mut tasks = vec![bridge_task("caller", "web", "172.17.0.9", &[])];
    tasks.extend(more);
    World { sets: vec![services::parse(FILE).expect("parses")], tasks, ..World::default() }.snapshot()
}

fn database(phase: Phase) -> Task {
    let mut task = bridge_task("db", "world", "172.17.0.2", &[5432]);
    task.phase = phase;
    task.containers[0].published[0].host.set_port(32_999);
    task
}

fn vip(snapshot: &Snapshot, service: &str, port: u16) -> SocketAddr {
    SocketAddr::new(snapshot.services[service].vip.v4.into(), port)
}

/// Asks for `dst` from the task `caller`; answers in one line.
fn ask(snapshot: &Snapshot, dst: SocketAddr, tried: &[&str], draw: u64) -> String {
    let tried: Vec<_> = tried.iter().map(|id| EndpointId::of(id.parse().expect("an address"))).collect();
    let ask = Outbound {
        source: &snapshot.workloads["caller"],
        dst: OrigDst(dst),
        tried: &tried,
        load: &|_| Load::default(),
        now: Duration::ZERO,
        draw,
    };
    match outbound(snapshot, &ask) {
        Ok(plan) => match plan.delivery {
            Delivery::Local { task, to } => format!("{task} {to}"),
            Delivery::Tunnel { agent, authority, from, expect } => {
                assert_eq!(from.as_str(), "spiffe://a/ns/demo/sa/web");
                format!("tunnel {agent} {authority} {}", expect.path())
            }
            Delivery::Plaintext { to } => format!("plain {to}"),
        },
        Err(refused) => {
            assert!(!refused.reasons.is_empty());
            refused.refusal.label().to_owned()
        }
    }
}

#[test]
fn each_way_to_an_endpoint() {
    let snapshot = snapshot(vec![]);
    let world = "tunnel 10.90.1.11:15008 10.90.1.11:32768 /ns/demo/sa/world";
    for draw in [0, u64::MAX, 1 << 63] {
        assert_eq!(ask(&snapshot, vip(&snapshot, "world", 80), &[], draw), world, "never the plaintext one");
        assert_eq!(ask(&snapshot, vip(&snapshot, "legacy", 80), &[], draw), "plain 10.90.1.13:80");
    }
    let v6 = SocketAddr::new(snapshot.services["world"].vip.v6.into(), 80);
    assert_eq!(ask(&snapshot, v6, &[], 0), world);
    let mapped = format!("[::ffff:{}]:80", snapshot.services["world"].vip.v4).parse().expect("an address");
    assert_eq!(ask(&snapshot, mapped, &[], 0), world);
}

#[test]
fn each_refusal_has_its_number() {
    let snapshot = snapshot(vec![]);
    let ask = |dst, tried: &[&str]| ask(&snapshot, dst, tried, 0);
    assert_eq!(ask(vip(&snapshot, "world", 81), &[]), "unknown_port");
    assert_eq!(ask("10.0.0.1:80".parse().expect("a literal"), &[]), "unknown_port");
    assert_eq!(ask(vip(&snapshot, "world", 7), &[]), "no_endpoint");
    assert_eq!(ask(vip(&snapshot, "legacy", 80), &["10.90.1.13:80"]), "no_healthy_endpoint");
    assert_eq!(ask(vip(&snapshot, "plain", 80), &[]), "plaintext_forbidden");
    assert_eq!(ask(vip(&snapshot, "world", 80), &["10.90.1.11:32768"]), "plaintext_forbidden");
    assert_eq!(ask(vip(&snapshot, "cache", 6379), &[]), "denied");
}

#[test]
fn a_byte_stream_stays_on_the_host_while_it_can() {
    let (near, far) = ("db 172.17.0.2:5432", "tunnel 10.90.1.11:15008 10.90.1.11:5432 /ns/demo/sa/world");
    let running = snapshot(vec![database(Phase::Running)]);
    for draw in [0, u64::MAX, 1 << 63, 1 << 31] {
        assert_eq!(ask(&running, vip(&running, "world", 5432), &[], draw), near);
    }
    assert_eq!(ask(&running, vip(&running, "world", 5432), &["10.90.1.10:32999"], 0), far);
    let stopping = snapshot(vec![database(Phase::Stopping)]);
    assert_eq!(ask(&stopping, vip(&stopping, "world", 5432), &[], 0), far);
}

#[test]
fn a_named_endpoint_is_that_endpoint() {
    let snapshot = snapshot(vec![database(Phase::Stopping)]);
    let ask = |dst: &str, tried: &[&str]| ask(&snapshot, dst.parse().expect("a literal"), tried, 0);
    assert_eq!(ask("10.90.1.11:5432", &[]), "tunnel 10.90.1.11:15008 10.90.1.11:5432 /ns/demo/sa/world");
    assert_eq!(ask("10.90.1.10:32999", &[]), "db 172.17.0.2:5432", "whoever names it means it");
    assert_eq!(ask("172.17.0.2:5432", &[]), "db 172.17.0.2:5432");
    assert_eq!(ask("172.17.0.2:5432", &["10.90.1.10:32999"]), "no_healthy_endpoint");
    assert_eq!(ask("10.90.1.12:80", &[]), "plaintext_forbidden");
    assert_eq!(ask("10.90.1.13:80", &[]), "plain 10.90.1.13:80");
}

#[test]
fn a_task_listed_under_another_name_is_still_what_it_is() {
    let mut world = World {
        sets: vec![services::parse(FILE).expect("parses")],
        tasks: vec![bridge_task("caller", "web", "172.17.0.9", &[]), bridge_task("c", "cache", "172.17.0.3", &[6379])],
        ..World::default()
    };
    let alias = "[[service]]\nname = \"alias\"\nports = [{ port = 6379 }]\n\
                 [[service.endpoint]]\naddress = \"10.90.1.10:32768\"\n";
    world.sets.push(services::parse(alias).expect("parses"));
    let snapshot = world.snapshot();
    assert_eq!(ask(&snapshot, vip(&snapshot, "cache", 6379), &[], 0), "denied");
    assert_eq!(ask(&snapshot, vip(&snapshot, "alias", 6379), &[], 0), "denied", "by its other name too");
    // Where the range of virtual addresses is full, the other name may be the only one.
    world.vips.v4 = "240.240.0.0/30".parse().expect("valid");
    let mut vips = VipTable::default();
    let names = [&"alias".parse().expect("valid"), &"world".parse().expect("valid")];
    vips.assign(names.into_iter(), world.vips.v4, world.vips.v6);
    let merged = merge::merge(&Merged::beginning(vips, Numbers::default()), &world.sources());
    assert!(merged.homeless.contains("cache"));
    let snapshot = merged.snapshot;
    assert!(!snapshot.services.contains_key("cache"));
    let (web, cache) = ("spiffe://a/ns/demo/sa/web".parse(), "spiffe://a/ns/demo/sa/cache".parse());
    let (peer, presented) = (web.expect("valid"), cache.expect("valid"));
    let target = "10.90.1.10:32768".parse().expect("valid");
    let refused = inbound(&snapshot, &Inbound { peer: &peer, presented: &presented, target, elsewhere: false })
        .expect_err("denied");
    assert_eq!(refused.refusal, Refusal::Denied);
}

#[test]
fn reasons_are_sentences_and_cost_nothing_unasked() {
    let snapshot = snapshot(vec![]);
    let dst = vip(&snapshot, "world", 80);
    let ask = Outbound {
        source: &snapshot.workloads["caller"],
        dst: OrigDst(dst),
        tried: &[],
        load: &|_| Load::default(),
        now: Duration::ZERO,
        draw: 0,
    };
    assert!(outbound(&snapshot, &ask).expect("a plan").reasons.is_empty());
    let plan = explain(&snapshot, &ask).expect("a plan");
    let shown: Vec<_> = plan.reasons.iter().map(|reason| reason.0.as_str()).collect();
    assert_eq!(
        shown,
        [
            format!("{dst} is port 80 of service world").as_str(),
            "no policy rule matches; the default allows spiffe://a/ns/demo/sa/web to call world",
            "picked 10.90.1.11:32768 (cost 30.0 ms), the only one that may be chosen",
            "mTLS to the agent at 10.90.1.11:15008, which must prove to be spiffe://a/ns/demo/sa/world",
        ]
    );
    let refused =
        explain(&snapshot, &Outbound { dst: OrigDst(vip(&snapshot, "cache", 6379)), ..ask }).expect_err("denied");
    assert_eq!(refused.reasons[1].0, "policy rule `no-cache` denies spiffe://a/ns/demo/sa/web to call cache");
}

#[test]
fn the_destination_alone() {
    let snapshot = snapshot(vec![]);
    let (service, port) = destination(&snapshot, OrigDst(vip(&snapshot, "world", 5432))).expect("known");
    assert_eq!((service.name.as_str(), service.ports[port].protocol), ("world", Protocol::Tcp));
    let refused = destination(&snapshot, OrigDst(vip(&snapshot, "world", 81))).expect_err("no such port");
    assert!(refused.reasons[0].0.ends_with("its ports: 7, 80, 5432"), "{:?}", refused.reasons);
}

#[test]
fn inbound_streams() {
    let snapshot = snapshot(vec![database(Phase::Stopping), bridge_task("c", "cache", "172.17.0.3", &[6379])]);
    let ask_as = |snapshot: &Snapshot, peer: &str, presented: &str, target: &str| {
        let (peer, presented) = (peer.parse().expect("an identity"), presented.parse().expect("an identity"));
        let target = target.parse().expect("a literal");
        match inbound(snapshot, &Inbound { peer: &peer, presented: &presented, target, elsewhere: false }) {
            Ok(plan) => format!("{} {} {}", plan.workload.task, plan.service.name, plan.to),
            Err(refused) => refused.refusal.label().to_owned(),
        }
    };
    let (world, cache) = ("spiffe://a/ns/demo/sa/world", "spiffe://a/ns/demo/sa/cache");
    let ask = |snapshot: &Snapshot, peer: &str, target: &str| {
        ask_as(snapshot, peer, if target.ends_with(":32768") { cache } else { world }, target)
    };
    let (web, batch) = ("spiffe://a/ns/other/sa/web", "spiffe://a/ns/demo/sa/web");
    let other = "unexpected_identity";
    assert_eq!(ask_as(&snapshot, web, cache, "10.90.1.10:32999"), other, "the address is another task's by now");
    assert_eq!(ask_as(&snapshot, web, "spiffe://a/ns/demo/sa/ecs-mesh-agent", "10.90.1.10:32999"), other);
    assert_eq!(ask(&snapshot, web, "10.90.1.10:32999"), "db world 172.17.0.2:5432", "draining, and all there is");
    let (peer, presented) = (web.parse().expect("an identity"), world.parse().expect("an identity"));
    let other = |target: &str| {
        let target = target.parse().expect("a literal");
        let ask = Inbound { peer: &peer, presented: &presented, target, elsewhere: true };
        inbound(&snapshot, &ask).map(|plan| plan.to).map_err(|refused| refused.refusal)
    };
    assert_eq!(other("10.90.1.10:32999"), Err(Refusal::NotReady), "there is another");
    assert_eq!(ask(&snapshot, web, "[::ffff:172.17.0.2]:5432"), "db world 172.17.0.2:5432");
    assert_eq!(ask(&snapshot, web, "10.90.1.10:32768"), "c cache 172.17.0.3:6379");
    assert_eq!(ask(&snapshot, batch, "10.90.1.10:32768"), "denied");
    assert_eq!(ask(&snapshot, "spiffe://b/ns/demo/sa/web", "10.90.1.10:32999"), "denied", "another trust domain");
    assert_eq!(ask(&snapshot, web, "10.90.1.11:5432"), "not_local");
    assert_eq!(ask(&snapshot, web, "127.0.0.1:22"), "not_local");
    assert_eq!(ask(&snapshot, web, &vip(&snapshot, "world", 80).to_string()), "not_local");
    let mut gone = snapshot.clone();
    gone.workloads.remove("db");
    assert_eq!(ask(&gone, web, "10.90.1.10:32999"), "task_gone");
}

/// An instance of a service: address, tag, meta.
type Registered<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

/// What Consul, asked with this configuration, says of the one service `name`, of which it knows these.
fn consul(name: &str, datacenter: Option<&str>, instances: &[Registered<'_>]) -> services::ServiceSet {
    let instance = |(addr, tag, meta): &Registered<'_>| Instance {
        addr: addr.parse().expect("a literal"),
        tags: [(*tag).to_owned()].into(),
        meta: meta.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        weights: Weights { passing: 1, warning: 1 },
        status: Status::Passing,
        node_meta: BTreeMap::new(),
    };
    let instances: Vec<_> = instances.iter().map(instance).collect();
    let config = crate::config::discovery::tests::consul("");
    let (found, problems) =
        crate::consul::entries::entries(&name.parse().expect("valid"), datacenter, &instances, &config);
    assert!(problems.is_empty(), "{problems:?}");
    services::ServiceSet::of(found.into_iter().map(|it| services::ServiceEntry::clone(&it.entry)))
}

/// One ECS service with one Fargate task, which has Service Connect's alias.
fn ecs(service: &str, family: &str, alias: &str, at: [u8; 4]) -> services::ServiceSet {
    use crate::ecs::model::{Checked, Cluster, Connect, Container, Definition, Deployment, Port, Service, State, Task};
    let connect = Connect { port_name: "http".into(), aliases: vec![(alias.to_owned(), 80)] };
    let deployment = Deployment { connects: vec![connect], ..Deployment::default() };
    let definition = Definition {
        family: family.into(),
        revision: 1,
        mode: crate::task::NetworkMode::Awsvpc,
        containers: vec![Container {
            ports: vec![Port { container: 8080, name: Some("http".into()), protocol: None }],
            ..Container::default()
        }],
        is_checked: false,
    };
    let task = Task {
        arn: "task/1".into(),
        service: Some(service.into()),
        definition: "d".into(),
        deployment: Some("ecs-svc/1".into()),
        instance: None,
        zone: None,
        launch_type: "FARGATE".into(),
        state: State::Running(Checked::Unknown),
        address: Some(at.into()),
        bindings: Vec::new(),
        tags: BTreeMap::new(),
    };
    let cluster = Cluster {
        services: [(service.to_owned(), Service { deployments: [("ecs-svc/1".to_owned(), deployment)].into() })].into(),
        tasks: vec![task],
        instances: BTreeMap::new(),
        definitions: [("d".to_owned(), definition.into())].into(),
    };
    let mesh = crate::ecs::entries::Mesh {
        trust_domain: "a".parse().expect("valid"),
        enrol: World::default().enrol,
        suffixes: vec!["mesh".into()],
    };
    let clusters = [("demo".parse().expect("valid"), cluster)];
    let (set, problems) = crate::ecs::entries::entries(&clusters, &crate::config::ecs::tests::ecs(""), &mesh);
    assert!(problems.is_empty(), "{problems:?}");
    set
}

#[test]
fn a_refusal_says_what_the_name_leads_to() {
    let set = consul("db", None, &[("10.0.0.5:5432", "primary", &[])]);
    let snapshot = among(&format!("{DENIED}to = [\"db\"]\n"), vec![set]);
    let ask = Outbound {
        source: &snapshot.workloads["caller"],
        dst: OrigDst(vip(&snapshot, "db--tag-primary", 5432)),
        tried: &[],
        load: &|_| Load::default(),
        now: Duration::ZERO,
        draw: 0,
    };
    assert_eq!(
        outbound(&snapshot, &ask).expect_err("denied").reasons[1].0,
        "policy rule `no-web` denies spiffe://a/ns/demo/sa/web to call db--tag-primary, a name of db"
    );
}

/// A host with the caller, a file, and what registries say; services are permissive where nobody says otherwise.
fn among(file: &str, sets: Vec<services::ServiceSet>) -> Snapshot {
    let file = services::parse(file).unwrap_or_else(|faults| panic!("{faults:?}"));
    let tasks = vec![bridge_task("caller", "web", "172.17.0.9", &[])];
    let mut world = World { sets: [file].into_iter().chain(sets).collect(), tasks, ..World::default() };
    world.enrol.tls = TlsMode::Permissive;
    world.snapshot()
}

const DENIED: &str =
    "[policy]\n[[policy.rule]]\nname = \"no-web\"\neffect = \"deny\"\nfrom = [\"spiffe://a/ns/demo/sa/web\"]\n";
const ALLOWED: &str = "[policy]\ndefault = \"deny\"\n[[policy.rule]]\nname = \"web\"\neffect = \"allow\"\n";

#[test]
fn a_name_of_a_service_is_under_its_rules() {
    let plain = &[("10.0.0.5:5432", "primary", &[][..])][..];
    for (set, name, port, rules) in [
        (consul("db", None, plain), "db--tag-primary", 5432, "db"),
        (consul("db", Some("dc2"), plain), "db--dc-dc2", 5432, "db"),
        (consul("db", Some("dc2"), plain), "db--tag-primary--dc-dc2", 5432, "db"),
        (consul("db", Some("dc2"), plain), "db--tag-primary--dc-dc2", 5432, "db--dc-dc2"),
        (ecs("db", "db", "api", [10, 0, 0, 5]), "api", 80, "db"),
    ] {
        let asked = |rules: &str| {
            let snapshot = among(rules, vec![set.clone()]);
            ask(&snapshot, vip(&snapshot, name, port), &[], 0)
        };
        let to = format!("plain 10.0.0.5:{}", if port == 5432 { 5432 } else { 8080 });
        for who in [rules, name] {
            assert_eq!(asked(&format!("{DENIED}to = [\"{who}\"]\n")), "denied", "{name}, by a rule about {who}");
            assert_eq!(asked(&format!("{ALLOWED}to = [\"{who}\"]\n")), to, "{name}, by a rule about {who}");
        }
        assert_eq!(asked(&format!("{DENIED}to = [\"another\"]\n")), to, "{name}");
        assert_eq!(asked(&format!("{ALLOWED}to = [\"another\"]\n")), "denied", "{name}");
    }
}

#[test]
fn a_name_that_only_says_whose_it_is_is_under_both_rules() {
    let says = [("ecs-mesh-service", "db")];
    let plain = consul("db-5432", None, &[("10.0.0.5:5432", "primary", &says)]);
    let tunnel = [("ecs-mesh-agent", "10.0.0.5:15008"), ("ecs-mesh-identity", "spiffe://a/ns/demo/sa/db")];
    let proved = consul("db-5432", None, &[("10.0.0.5:5432", "primary", &[&says[..], &tunnel].concat())]);
    for (set, name, port, service, opens) in [
        (plain.clone(), "db-5432", 5432, "db", "denied"),
        (plain, "db-5432--tag-primary", 5432, "db", "denied"),
        (proved.clone(), "db-5432", 5432, "db", "tunnel 10.0.0.5:15008 10.0.0.5:5432 /ns/demo/sa/db"),
        (proved, "db-5432--tag-primary", 5432, "db", "tunnel 10.0.0.5:15008 10.0.0.5:5432 /ns/demo/sa/db"),
        (ecs("Db", "db-task", "api", [10, 0, 0, 5]), "db", 8080, "db-task", "denied"),
        (ecs("Db", "db-task", "api", [10, 0, 0, 5]), "api", 80, "db", "denied"),
        (ecs("Db", "db-task", "api", [10, 0, 0, 5]), "api", 80, "db-task", "denied"),
    ] {
        let asked = |rules: &str, to: &str| {
            let snapshot = among(&format!("{rules}to = [{to}]\n"), vec![set.clone()]);
            ask(&snapshot, vip(&snapshot, name, port), &[], 0)
        };
        assert_eq!(asked(DENIED, &format!("\"{service}\"")), "denied", "{name}");
        assert_eq!(asked(ALLOWED, &format!("\"{service}\"")), opens, "{name}");
        assert_ne!(asked(ALLOWED, &format!("\"{name}\"")), "denied", "{name}");
        assert_ne!(asked(ALLOWED, "\"db\", \"db-5432\", \"db-task\""), "denied", "{name}");
    }
}

#[test]
fn a_name_of_a_service_has_its_settings() {
    let file = |more: &str| {
        format!(
            "[[service]]\nname = \"world\"\ntls = \"strict\"\non_agent_death = \"closed\"\n\
                 ports = [{{ port = 80, target = 8080, protocol = \"http\" }}, {{ port = 81, target = 8081 }}]\n{more}"
        )
    };
    let tag = consul("world", None, &[("10.0.0.5:32768", "v2", &[("ecs-mesh-ports", "80")])]);
    for (set, name, ports) in [
        (tag.clone(), "world--tag-v2", &[(80, Protocol::Http), (81, Protocol::Auto)][..]),
        (consul("world", Some("dc2"), &[]), "world--dc-dc2", &[(80, Protocol::Http), (81, Protocol::Auto)]),
        (ecs("world", "world", "api", [10, 0, 0, 5]), "api", &[(80, Protocol::Http)]),
    ] {
        let service = &among(&file(""), vec![set]).services[name];
        let found: Vec<_> = service.ports.iter().map(|port| (port.port, port.protocol)).collect();
        assert_eq!((service.tls, service.on_agent_death), (TlsMode::Strict, OnAgentDeath::Closed), "{name}");
        assert_eq!(found, ports, "{name}");
    }
    // What is said about the name itself counts.
    let own =
        "[[service]]\nname = \"world--tag-v2\"\ntls = \"permissive\"\nports = [{ port = 80, protocol = \"tcp\" }]\n";
    let service = &among(&file(own), vec![tag]).services["world--tag-v2"];
    assert_eq!((service.tls, service.on_agent_death), (TlsMode::Permissive, OnAgentDeath::Closed));
    assert_eq!(service.ports.iter().map(|port| (port.port, port.protocol)).collect::<Vec<_>>(), [(80, Protocol::Tcp)]);
}

#[test]
fn a_name_of_several_services_is_under_the_rules_of_each() {
    let own = "[[service]]\nname = \"api\"\nports = [{ port = 80 }]\n[[service.endpoint]]\naddress = \"10.0.0.9:80\"\n";
    let set = || vec![ecs("db", "db", "api", [10, 0, 0, 5])];
    let asked = |file: &str, rules: &str, to: &str, sets| {
        let snapshot = among(&format!("{file}{rules}to = [{to}]\n"), sets);
        ask(&snapshot, vip(&snapshot, "api", 80), &[], 0)
    };
    // Whoever gives another service's tasks the name of this one opens neither to those who may call the other.
    assert_eq!(asked(own, ALLOWED, "\"db\"", set()), "denied");
    assert!(asked(own, ALLOWED, "\"api\"", set()).starts_with("plain"), "that is what the operator wrote");
    assert_eq!(asked(own, DENIED, "\"db\"", set()), "denied");
    // The same tasks, known from a registry under their alias only, are not another service.
    let known = consul("api", None, &[("10.0.0.5:8080", "x", &[("ecs-mesh-ports", "80")])]);
    assert_eq!(asked("", ALLOWED, "\"db\"", [set(), vec![known]].concat()), "plain 10.0.0.5:8080");
}

fn load_of(seed: u64) -> impl Fn(&EndpointId) -> Load {
    move |id| {
        let hash = id.to_string().bytes().fold(seed, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
        let failures = u32::try_from(hash % 9).expect("small");
        Load {
            in_flight: u32::try_from(hash % 5).expect("small"),
            failures,
            ejected_until: Duration::from_secs(hash % 3),
            ..Load::default()
        }
    }
}

proptest! {
    #[test]
    fn no_destination_outside_the_snapshot(
        world in arb::world(), n in any::<prop::sample::Index>(), who in any::<prop::sample::Index>(), tried in 0_usize..4,
        seed in any::<u64>(), draw in any::<u64>(),
    ) {
        let snapshot = world.snapshot();
        if snapshot.workloads.is_empty() || snapshot.by_address.is_empty() {
            return Ok(());
        }
        let addresses: BTreeMap<_, _> = snapshot.by_address.iter().collect();
        let (dst, target) = addresses.iter().nth(n.index(addresses.len())).expect("in range");
        let source = snapshot.workloads.values().nth(who.index(snapshot.workloads.len())).expect("in range");
        let (service, port) = destination(&snapshot, OrigDst(SocketAddr::from(**dst))).expect("a known address");
        let endpoints = &service.ports[port].endpoints;
        let tried: Vec<_> = endpoints.iter().take(tried).map(|e| e.id).collect();
        let load = load_of(seed);
        let ask = Outbound { source, dst: OrigDst(SocketAddr::from(**dst)), tried: &tried, load: &load, now: Duration::from_secs(1), draw };
        let verdict = service.verdict(&snapshot.policy, &source.identity);
        let owner = |endpoint: &Endpoint| match &endpoint.reach {
            Reach::Local { task, .. } => snapshot.workloads.get(task).map(|workload| workload.service.clone()),
            Reach::Tunnel { .. } | Reach::Plaintext => None,
        };
        let admitted = |owner: ServiceName| snapshot.policy.decide(&source.identity, &owner).effect == Effect::Allow;
        let explained = explain(&snapshot, &ask);
        match outbound(&snapshot, &ask) {
            Ok(plan) => {
                prop_assert_eq!(verdict.effect, Effect::Allow);
                prop_assert!(owner(&plan.endpoint).is_none_or(admitted), "listed under another name");
                prop_assert!(Arc::ptr_eq(&plan.service, &service) && plan.port == port);
                prop_assert!(endpoints.iter().any(|e| Arc::ptr_eq(e, &plan.endpoint)));
                prop_assert!(!tried.contains(&plan.endpoint.id));
                match (&plan.delivery, &plan.endpoint.reach) {
                    (Delivery::Local { task, to }, Reach::Local { task: own, deliver, .. }) => prop_assert!(task == own && to == deliver),
                    (Delivery::Tunnel { agent, authority, from, expect }, Reach::Tunnel { agent: own }) => {
                        prop_assert!(agent == own && *authority == plan.endpoint.addr() && *from == source.identity);
                        prop_assert_eq!(Some(expect), plan.endpoint.identity.as_ref());
                    }
                    (Delivery::Plaintext { to }, Reach::Plaintext) => {
                        prop_assert_eq!(service.tls, TlsMode::Permissive);
                        prop_assert_eq!(*to, plan.endpoint.addr());
                    }
                    other => prop_assert!(false, "{:?}", other),
                }
                match &target.target {
                    Target::Endpoint { endpoint, .. } => prop_assert_eq!(&plan.endpoint.id, endpoint),
                    Target::Service { .. } => prop_assert_eq!(plan.endpoint.health, Health::Healthy),
                }
                let explained = explained.expect("the same decision");
                prop_assert_eq!(explained.delivery, plan.delivery);
                prop_assert!(plan.reasons.is_empty() && !explained.reasons.is_empty());
            }
            Err(refused) => {
                prop_assert!(Refusal::from_number(refused.refusal as u32).is_some() && !refused.reasons.is_empty());
                let owned_by_denied = endpoints.iter().filter_map(|e| owner(e)).any(|owner| !admitted(owner));
                prop_assert!(verdict.effect == Effect::Allow || refused.refusal == Refusal::Denied);
                prop_assert!(refused.refusal != Refusal::Denied || verdict.effect == Effect::Deny || owned_by_denied);
                prop_assert_eq!(Some(refused), explained.err());
            }
        }
    }

    #[test]
    fn an_unrelated_service_never_changes_a_plan(
        world in arb::world(), n in any::<prop::sample::Index>(), who in any::<prop::sample::Index>(),
        seed in any::<u64>(), draw in any::<u64>(),
    ) {
        let mut more = world.clone();
        let text = "[[service]]\nname = \"unrelated\"\nports = [{ port = 80 }]\n[[service.endpoint]]\naddress = \"10.99.9.9:80\"\nagent = \"10.99.9.9:15008\"\n";
        more.sets.push(services::ServiceSet { policy: None, ..services::parse(text).expect("parses") });
        let first = merge::merge(&Merged::default(), &world.sources());
        let (b, a) = (merge::merge(&first, &more.sources()).snapshot, first.snapshot);
        if a.workloads.is_empty() || a.by_address.is_empty() {
            return Ok(());
        }
        let addresses: BTreeMap<_, _> = a.by_address.iter().collect();
        let dst = OrigDst(SocketAddr::from(**addresses.keys().nth(n.index(addresses.len())).expect("in range")));
        let source = a.workloads.values().nth(who.index(a.workloads.len())).expect("in range");
        let load = load_of(seed);
        let ask = Outbound { source, dst, tried: &[], load: &load, now: Duration::ZERO, draw };
        match (outbound(&a, &ask), outbound(&b, &ask)) {
            (Ok(a), Ok(b)) => prop_assert_eq!((a.delivery, a.endpoint), (b.delivery, b.endpoint)),
            (a, b) => prop_assert_eq!(a.err(), b.err()),
        }
    }

    #[test]
    fn inbound_reaches_only_local_tasks(
        world in arb::world(), n in any::<prop::sample::Index>(), peer in arb::spiffe_id(), presented in arb::spiffe_id(),
    ) {
        let snapshot = world.snapshot();
        if snapshot.by_address.is_empty() {
            return Ok(());
        }
        let addresses: BTreeMap<_, _> = snapshot.by_address.iter().collect();
        let target = SocketAddr::from(**addresses.keys().nth(n.index(addresses.len())).expect("in range"));
        match inbound(&snapshot, &Inbound { peer: &peer, presented: &presented, target, elsewhere: false }) {
            Ok(plan) => {
                prop_assert_eq!(&presented, &plan.workload.identity, "who was promised is who answers");
                let owner = snapshot.policy.decide(&peer, &plan.workload.service);
                let listed = plan.service.verdict(&snapshot.policy, &peer);
                prop_assert!([owner, listed].iter().all(|verdict| verdict.effect == Effect::Allow));
                prop_assert_eq!(peer.trust_domain(), plan.workload.identity.trust_domain());
                let own = |e: &&Arc<Endpoint>| matches!(&e.reach, Reach::Local { task, deliver, .. }
                    if *task == plan.workload.task && *deliver == plan.to && (e.addr() == target || plan.to == target));
                prop_assert!(plan.service.ports[plan.port].endpoints.iter().any(|e| own(&e)));
            }
            Err(refused) => {
                let known = [Refusal::NotLocal, Refusal::Denied, Refusal::UnexpectedIdentity];
                prop_assert!(known.contains(&refused.refusal));
            }
        }
    }
}
