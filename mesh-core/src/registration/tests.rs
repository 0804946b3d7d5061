//! Tasks as they are registered, with any registry.

use super::*;
use crate::{
    arb::{World, bridge_task},
    task::{ContainerHealth, Phase},
};

const TUNNEL: &str = "10.90.1.10:15008";

fn wanted(tasks: &[Task]) -> BTreeMap<String, Registration> {
    let world = World { tasks: tasks.to_vec(), ..World::default() };
    let form = Form { tags: &["mesh".into()], meta: 20, takes: |key, _| !key.contains(' ') };
    desired(&world.snapshot(), tasks, TUNNEL.parse().expect("a literal"), &form)
}

fn only(task: Task) -> Registration {
    let mut all = wanted(&[task]);
    assert_eq!(all.len(), 1, "{all:?}");
    all.pop_first().expect("one").1
}

fn labelled(mut task: Task, labels: &[(&str, &str)]) -> Task {
    task.labels.extend(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    task
}

#[test]
fn a_bridge_task_is_registered_at_its_host_port() {
    let found = only(bridge_task("t1", "world", "172.17.0.2", &[8080]));
    assert_eq!((found.name.as_str(), found.addr.to_string().as_str()), ("world", "10.90.1.10:32768"));
    assert_eq!(found.id, "ecs-mesh:10.90.1.10:32768:t1");
    let meta: Vec<_> = found.meta.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(
        meta,
        [
            "ecs-mesh-agent=10.90.1.10:15008",
            "ecs-mesh-identity=spiffe://a/ns/demo/sa/world",
            "ecs-mesh-owner=ecs-mesh@10.90.1.10",
            "ecs-mesh-ports=80,8080",
            "ecs-mesh-service=world",
            "ecs-mesh-target=8080",
            "ecs-mesh-task=t1",
            "ecs-mesh-zone=z",
        ]
    );
    assert!(found.ready && found.tags.contains("mesh"));
}

#[test]
fn an_awsvpc_task_has_a_tunnel_of_its_own() {
    let task = bridge_task("t1", "world", "10.90.2.7", &[8080]);
    let found = only(Task { mode: NetworkMode::Awsvpc, ..task });
    assert_eq!((found.addr.to_string(), &*found.meta[meta::AGENT]), ("10.90.2.7:8080".into(), "10.90.2.7:15008"));
}

#[test]
fn readiness_follows_health_and_a_stop_ends_it() {
    let task = |health, phase| {
        let mut task = bridge_task("t1", "world", "172.17.0.2", &[8080]);
        task.containers[0].health = health;
        Task { phase, ..task }
    };
    for (health, ready) in [
        (None, true),
        (Some(ContainerHealth::Healthy), true),
        (Some(ContainerHealth::Starting), false),
        (Some(ContainerHealth::Unhealthy), false),
    ] {
        assert_eq!(only(task(health, Phase::Running)).ready, ready, "{health:?}");
    }
    assert!(wanted(&[task(None, Phase::Stopping)]).is_empty());
    assert!(wanted(&[task(None, Phase::Created)]).is_empty());
}

#[test]
fn labels_of_registrator_and_ours() {
    let task = bridge_task("t1", "world", "172.17.0.2", &[8080]);
    let labels = [
        ("SERVICE_NAME", "planet"),
        ("SERVICE_TAGS", "a, b,,"),
        ("ecs-mesh.tags", "c"),
        ("SERVICE_REGION", "eu"),
        ("SERVICE_8080_COLOR", "blue"),
        ("SERVICE_9090_COLOR", "red"),
        ("SERVICE_CHECK_HTTP", "/"),
        ("ecs-mesh.meta.team", "x"),
        ("ecs-mesh.meta.ecs-mesh-agent", "10.6.6.6:15008"),
        ("ecs-mesh.meta.b d", "no key"),
    ];
    let found = only(labelled(task.clone(), &labels));
    assert_eq!(found.name, "planet");
    assert_eq!(found.tags.iter().collect::<Vec<_>>(), ["a", "b", "c", "mesh"]);
    let own: Vec<_> = found.meta.iter().filter(|(key, _)| !key.starts_with(meta::PREFIX)).collect();
    let expected = [("color", "blue"), ("region", "eu"), ("team", "x")];
    assert_eq!(
        own,
        expected.map(|(k, v)| (k.to_owned(), v.to_owned())).iter().map(|(k, v)| (k, v)).collect::<Vec<_>>()
    );
    assert_eq!(found.meta[meta::AGENT], TUNNEL, "no label says where the tunnel is");
    assert_eq!(found.meta[meta::SERVICE], "world");
    assert_eq!(only(labelled(task.clone(), &[("SERVICE_8080_NAME", "one"), ("SERVICE_NAME", "all")])).name, "one");
    for refused in [("SERVICE_IGNORE", "true"), ("SERVICE_8080_IGNORE", "1"), ("ecs-mesh.register", "False")] {
        assert!(wanted(&[labelled(task.clone(), &[refused])]).is_empty(), "{refused:?}");
    }
    assert_eq!(wanted(&[labelled(task, &[("SERVICE_9090_IGNORE", "1"), ("ecs-mesh.register", "yes")])]).len(), 1);
}

#[test]
fn several_ports_have_several_names() {
    let found = wanted(&[bridge_task("t1", "world", "172.17.0.2", &[8080, 9090])]);
    let names: Vec<_> = found.values().map(|it| (it.name.as_str(), it.meta[meta::PORTS].as_str())).collect();
    assert_eq!(names, [("world-8080", "8080"), ("world-9090", "9090")]);
}

#[test]
fn what_others_cannot_reach_is_not_registered() {
    let mut task = bridge_task("t1", "world", "172.17.0.2", &[8080]);
    task.containers[0].published.clear();
    assert!(wanted(&[task]).is_empty());
}
