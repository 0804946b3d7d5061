//! Inspect answers, as dockerd 20.10 and 28 give them for what the ECS agent starts, to tasks.

use std::{collections::BTreeMap, net::IpAddr};

use mesh_core::task::{ContainerHealth, NetworkMode, Phase, Task};
use serde_json::{Value, json};

use super::*;

const TASK: &str = "0123456789abcdef0123456789abcdef";
const HOST: &str = "10.90.1.10";

/// A running container in bridge mode as dockerd 20.10 showed it, with an id and addresses of its own and `patch`
/// merged in (RFC 7396).
fn inspect(n: u8, patch: &Value) -> Value {
    let mut answer: Value = serde_json::from_str(include_str!("inspect.json")).unwrap();
    let own = json!({
        "Id": id(n),
        "Created": format!("2026-11-21T04:06:{n:02}.68Z"),
        "Name": format!("/ecs-web-v1-3-web-{n:02}"),
        "State": {"Pid": 400 + u32::from(n)},
        "NetworkSettings": {
            "SandboxKey": format!("/var/run/docker/netns/{n:012}"),
            "Networks": {"bridge": {"IPAddress": format!("172.17.0.{n}")}},
        },
    });
    merge(&mut answer, &own);
    merge(&mut answer, patch);
    answer
}

fn merge(into: &mut Value, patch: &Value) {
    match (into.as_object_mut(), patch) {
        (Some(into), Value::Object(patch)) => {
            for (key, value) in patch {
                if value.is_null() {
                    into.remove(key);
                } else {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        _ => *into = patch.clone(),
    }
}

fn id(n: u8) -> String {
    format!("{n:02x}").repeat(32)
}

fn labels(container: &str) -> Value {
    json!({
        "com.amazonaws.ecs.cluster": "demo",
        "com.amazonaws.ecs.container-name": container,
        "com.amazonaws.ecs.task-arn": format!("arn:aws:ecs:eu-west-1:123456789012:task/demo/{TASK}"),
        "com.amazonaws.ecs.task-definition-family": "web-v1",
        "com.amazonaws.ecs.task-definition-version": "3",
    })
}

fn no_labels() -> Value {
    json!({"Config": {"Labels": null}})
}

/// The pause container of an awsvpc task, before or after its interface was moved in.
fn pause(n: u8) -> Value {
    inspect(
        n,
        &json!({
            "Name": "/ecs-web-v1-3-internalecspause-aa",
            "Config": {"Labels": labels("~internal~ecs~pause"), "ExposedPorts": null},
            "HostConfig": {"NetworkMode": "none", "PortBindings": null},
            "NetworkSettings": {"Ports": {"8080/tcp": null}, "Networks": {"bridge": null, "none": {"IPAddress": ""}}},
        }),
    )
}

fn joined(n: u8, owner: u8, name: &str) -> Value {
    inspect(
        n,
        &json!({
            "HostConfig": {"NetworkMode": format!("container:{}", id(owner)), "PortBindings": null},
            "Config": {"Labels": labels(name)},
            "NetworkSettings": {"Ports": {"8080/tcp": null}, "SandboxKey": "", "Networks": {"bridge": null}},
        }),
    )
}

fn status(text: &str) -> Value {
    json!({"State": {"Status": text, "Running": text == "running", "Pid": 0}})
}

fn patched(mut answer: Value, patch: &Value) -> Value {
    merge(&mut answer, patch);
    answer
}

fn read(answers: &[Value]) -> BTreeMap<String, Seen> {
    let host: IpAddr = HOST.parse().unwrap();
    answers
        .iter()
        .map(|answer| Seen::read(serde_json::from_value(answer.clone()).unwrap(), host, 0).unwrap())
        .map(|seen| (seen.id.clone(), seen))
        .collect()
}

fn tasks(answers: &[Value]) -> Vec<Task> {
    assemble(&read(answers), None)
}

fn one(answers: &[Value]) -> Task {
    let mut tasks = tasks(answers);
    assert_eq!(tasks.len(), 1, "{tasks:#?}");
    tasks.remove(0)
}

#[test]
fn an_ecs_task_in_bridge_mode() {
    let task = one(&[inspect(2, &json!({}))]);
    assert_eq!(task.id.as_str(), TASK);
    assert_eq!(task.cluster.unwrap().as_str(), "demo");
    assert_eq!(task.family, "web-v1");
    assert_eq!((task.mode, task.phase), (NetworkMode::Bridge, Phase::Running));
    assert_eq!(task.address, Some("172.17.0.2".parse().unwrap()));
    assert_eq!(task.netns, Some("/var/run/docker/netns/000000000002".into()));
    let [container] = &task.containers[..] else { panic!("{:?}", task.containers) };
    assert_eq!((container.name.as_str(), container.pid), ("web", Some(402)));
    assert_eq!(container.exposed, [8080], "UDP is not ours");
    let [published] = container.published[..] else { panic!("{:?}", container.published) };
    assert_eq!((published.container_port, published.host), (8080, "10.90.1.10:32768".parse().unwrap()));
    assert_eq!(task.labels["com.amazonaws.ecs.task-definition-version"], "3");
}

#[test]
fn a_published_address_of_its_own_is_kept() {
    let bound = json!({"NetworkSettings": {"Ports": {"8080/tcp": [{"HostIp": "10.90.1.77", "HostPort": "80"}]}}});
    assert_eq!(one(&[inspect(2, &bound)]).containers[0].published[0].host, "10.90.1.77:80".parse().unwrap());
}

#[test]
fn phases_of_one_container() {
    let check = |patch: Value, stopping: bool, wanted: Option<Phase>| {
        let mut seen = read(&[inspect(2, &patch)]);
        seen.values_mut().for_each(|container| container.stopping |= stopping);
        assert_eq!(assemble(&seen, None).first().map(|task| task.phase), wanted, "{patch} {stopping}");
    };
    check(status("created"), false, Some(Phase::Created));
    // Docker could not start it, and remembers a namespace that only we would keep alive.
    check(json!({"State": {"Status": "created", "Running": false, "Pid": 0, "ExitCode": 127}}), false, None);
    check(status("restarting"), false, Some(Phase::Created));
    check(status("running"), false, Some(Phase::Running));
    check(status("running"), true, Some(Phase::Stopping));
    check(status("paused"), false, Some(Phase::Stopping));
    check(status("stopping"), false, Some(Phase::Stopping));
    check(status("exited"), false, None);
    check(status("removing"), false, None);
    check(status("dead"), true, None);
}

#[test]
fn a_created_container_has_no_namespace_yet() {
    let created = json!({
        "State": {"Status": "created", "Running": false, "Pid": 0, "StartedAt": "0001-01-01T00:00:00Z"},
        "NetworkSettings": {"SandboxKey": "", "Ports": {"8080/tcp": null}, "Networks": {"bridge": {"IPAddress": ""}}},
    });
    let task = one(&[inspect(2, &created)]);
    assert_eq!((task.phase, task.netns, task.address), (Phase::Created, None, None));
    assert_eq!(task.containers[0].pid, None);
}

#[test]
fn host_mode_has_neither_namespace_nor_address() {
    let host = json!({
        "HostConfig": {"NetworkMode": "host"},
        "NetworkSettings": {"Ports": {"8080/tcp": null}, "SandboxKey": "/var/run/docker/netns/default",
            "Networks": {"bridge": null, "host": {"IPAddress": ""}}},
    });
    let task = one(&[inspect(2, &host)]);
    assert_eq!((task.mode, task.netns, task.address), (NetworkMode::Host, None, None));
    assert_eq!(task.containers[0].exposed, [8080]);
}

#[test]
fn no_network_stays_none_and_a_network_of_the_user_is_a_bridge() {
    let none = json!({"HostConfig": {"NetworkMode": "none"}, "NetworkSettings": {"Networks": {"bridge": null}}});
    let task = one(&[patched(inspect(2, &none), &no_labels())]);
    assert_eq!((task.mode, task.netns), (NetworkMode::None, None));
    let own = json!({"HostConfig": {"NetworkMode": "shop"}, "NetworkSettings": {"Networks": {"bridge": null,
        "shop": {"IPAddress": "172.20.0.9"}}}});
    let task = one(&[inspect(2, &own)]);
    assert_eq!((task.mode, task.address), (NetworkMode::Bridge, Some("172.20.0.9".parse().unwrap())));
}

#[test]
fn an_awsvpc_task_lives_in_its_pause_containers_namespace() {
    let mut seen = read(&[pause(1), joined(2, 1, "web"), joined(3, 1, "log")]);
    seen.get_mut(&id(1)).unwrap().inner_address = Some("10.0.5.7".parse().unwrap());
    let tasks = assemble(&seen, None);
    let [task] = &tasks[..] else { panic!("{tasks:#?}") };
    assert_eq!((task.id.as_str(), task.mode, task.phase), (TASK, NetworkMode::Awsvpc, Phase::Running));
    assert_eq!(task.netns, Some("/var/run/docker/netns/000000000001".into()));
    assert_eq!(task.address, Some("10.0.5.7".parse().unwrap()));
    let names: Vec<_> = task.containers.iter().map(|container| container.name.as_str()).collect();
    assert_eq!(names, ["web", "log"], "the pause container is not the app");
}

#[test]
fn a_pause_container_alone_comes_before_the_app_and_goes_after_it() {
    let task = one(&[pause(1)]);
    assert_eq!((task.mode, task.phase), (NetworkMode::Awsvpc, Phase::Created));
    let task = one(&[pause(1), patched(joined(2, 1, "web"), &status("created"))]);
    assert_eq!((task.phase, task.containers.len()), (Phase::Created, 1));
    let task = one(&[pause(1), patched(joined(2, 1, "web"), &status("exited"))]);
    assert_eq!((task.phase, task.containers.len()), (Phase::Stopping, 0));
    assert!(tasks(&[patched(pause(1), &status("exited")), patched(joined(2, 1, "web"), &status("exited"))]).is_empty());
}

#[test]
fn a_pause_container_without_ecs_is_known_by_who_joins_it() {
    let bare = |answer: Value| patched(answer, &no_labels());
    let by_name = json!({"HostConfig": {"NetworkMode": "container:net"}});
    let answers = [
        patched(bare(pause(1)), &json!({"Name": "/net"})),
        patched(bare(joined(2, 1, "x")), &json!({"Name": "/app"})),
        patched(bare(joined(3, 1, "x")), &patched(by_name, &json!({"Name": "/side"}))),
    ];
    let task = one(&answers);
    assert_eq!((task.id.as_str(), task.mode, task.family.as_str()), (&id(1)[..32], NetworkMode::Awsvpc, "app"));
    assert_eq!(task.containers.len(), 2);
}

#[test]
fn a_helper_in_the_namespace_of_a_bridged_container_changes_nothing() {
    let owner = patched(inspect(1, &no_labels()), &json!({"Name": "/web"}));
    let helper = patched(joined(2, 1, "x"), &no_labels());
    let task = one(&[owner, helper]);
    assert_eq!((task.mode, task.address), (NetworkMode::Bridge, Some("172.17.0.1".parse().unwrap())));
    assert_eq!((task.family.as_str(), task.containers.len()), ("web", 2));
}

#[test]
fn containers_of_a_bridge_task_have_a_namespace_each() {
    let quiet = json!({"HostConfig": {"PortBindings": null}, "Config": {"Labels": labels("log")},
        "NetworkSettings": {"Ports": {}}});
    let tasks = tasks(&[inspect(2, &quiet), inspect(3, &json!({}))]);
    let ids: Vec<_> = tasks.iter().map(|task| task.id.to_string()).collect();
    assert_eq!(ids, [TASK.to_owned(), format!("{TASK}-{}", &id(2)[..12])], "who publishes bears the task's name");
    assert_eq!(tasks[0].containers[0].name, "web");
    assert_eq!(tasks[1].netns, Some("/var/run/docker/netns/000000000002".into()));
}

#[test]
fn one_dead_container_does_not_stop_a_task_unless_it_was_a_server_that_failed() {
    let other = |code: i64, exposed: &Value| {
        let dead = json!({"State": {"Status": "exited", "Pid": 0, "ExitCode": code}});
        patched(patched(joined(3, 1, "other"), &dead), &json!({"Config": {"ExposedPorts": exposed}}))
    };
    let phase = |dead: Value| one(&[pause(1), joined(2, 1, "web"), dead]).phase;
    assert_eq!(phase(other(0, &json!({"8080/tcp": {}}))), Phase::Running, "a migration that is done");
    assert_eq!(phase(other(1, &json!(null))), Phase::Running, "a helper that failed");
    assert_eq!(phase(other(137, &json!({"9090/tcp": {}}))), Phase::Stopping);
}

#[test]
fn health_is_dockers_own() {
    for (text, wanted) in [
        ("starting", Some(ContainerHealth::Starting)),
        ("healthy", Some(ContainerHealth::Healthy)),
        ("unhealthy", Some(ContainerHealth::Unhealthy)),
        ("none", None),
    ] {
        let health = json!({"State": {"Health": {"Status": text, "FailingStreak": 0, "Log": []}}});
        assert_eq!(one(&[inspect(2, &health)]).containers[0].health, wanted, "{text}");
    }
    assert_eq!(one(&[inspect(2, &json!({}))]).containers[0].health, None);
}

#[test]
fn the_agents_own_container_is_left_out() {
    let seen = read(&[inspect(2, &json!({}))]);
    assert!(assemble(&seen, Some(&id(2))).is_empty());
    assert_eq!(assemble(&seen, Some(&id(3))).len(), 1);
}

#[test]
fn signals_that_end_and_signals_that_do_not() {
    let check = |stop: Option<&str>, signal: &str, wanted: bool| {
        let seen = read(&[inspect(2, &json!({"Config": {"StopSignal": stop}}))]);
        assert_eq!(seen[&id(2)].is_ended_by(signal), wanted, "{stop:?} {signal}");
    };
    check(None, "15", true);
    check(None, "9", true);
    check(None, "1", false);
    check(None, "10", false);
    check(Some("SIGWINCH"), "28", true);
    check(Some("WINCH"), "15", true);
    check(Some("SIGRTMIN+3"), "37", true);
    check(Some("SIGRTMIN+3"), "38", false);
}

#[test]
fn order_does_not_depend_on_the_order_of_news() {
    let mut answers =
        vec![pause(1), joined(2, 1, "web"), joined(3, 1, "log"), patched(inspect(9, &json!({})), &no_labels())];
    let expected = tasks(&answers);
    assert_eq!(expected.len(), 2);
    for turn in 0..answers.len() {
        answers.rotate_left(turn);
        assert_eq!(tasks(&answers), expected);
    }
}
