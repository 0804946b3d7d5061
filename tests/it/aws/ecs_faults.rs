//! What moto's ECS does not do: host ports, Service Connect, two deployments, pages, refusals.
//!
//! The double speaks AWS's protocol, and AWS's own description of the API judges what it was asked and what it said.

use std::time::Instant;

use anyhow::{Result, ensure};
use mesh_tests::{
    aws::{
        Api,
        double::{Double, Said},
    },
    tier::{Tier, figure, require},
};
use serde_json::{Value, json};

use super::running::Running;

const HOST: &str = "arn:aws:ecs:eu-central-1:1:container-instance/demo/1";

fn definition(revision: u32) -> String {
    format!("arn:aws:ecs:eu-central-1:1:task-definition/world:{revision}")
}

fn task(n: u32, revision: u32, desired: &str, health: &str) -> Value {
    json!({
        "taskArn": format!("arn:aws:ecs:eu-central-1:1:task/demo/{n}"), "group": "service:world-svc",
        "taskDefinitionArn": definition(revision), "startedBy": format!("ecs-svc/{revision}"),
        "containerInstanceArn": HOST, "availabilityZone": "eu-central-1a", "launchType": "EC2",
        "lastStatus": "RUNNING", "desiredStatus": desired, "healthStatus": health, "createdAt": 1.79e9,
        "tags": [{ "key": "color", "value": if revision == 1 { "blue" } else { "green" } }],
        "containers": [{ "name": "c", "networkBindings": [
            { "bindIP": "0.0.0.0", "containerPort": 8080, "hostPort": 32768 + n, "protocol": "tcp" },
            { "bindIP": "::", "containerPort": 8080, "hostPort": 32768 + n, "protocol": "tcp" },
            { "bindIP": "0.0.0.0", "containerPort": 53, "hostPort": 53, "protocol": "udp" },
        ] }],
    })
}

fn deployment(revision: u32, status: &str) -> Value {
    json!({
        "id": format!("ecs-svc/{revision}"), "status": status, "taskDefinition": definition(revision),
        "serviceConnectConfiguration": { "enabled": true, "namespace": "my.demo", "services": [{
            "portName": "web", "discoveryName": "world-web",
            "clientAliases": [{ "port": 80, "dnsName": "server.my.demo" }, { "port": 9000 }],
        }] },
    })
}

/// One service with a new deployment and an old one, each with a task; a page for each task.
fn usual(action: &str, request: &Value) -> Said {
    let arns = |name: &str| request[name].as_array().cloned().unwrap_or_default();
    Said::Ok(match action {
        "ListServices" => json!({ "serviceArns": ["arn:aws:ecs:eu-central-1:1:service/demo/world-svc"] }),
        "DescribeServices" => json!({ "services": [{
            "serviceName": "world-svc", "status": "ACTIVE", "createdAt": 1.79e9,
            "deployments": [deployment(2, "PRIMARY"), deployment(1, "ACTIVE")],
        }], "failures": [] }),
        "ListTasks" if request["nextToken"].is_null() => {
            json!({ "taskArns": ["arn:aws:ecs:eu-central-1:1:task/demo/1"], "nextToken": "2" })
        }
        "ListTasks" => json!({ "taskArns": ["arn:aws:ecs:eu-central-1:1:task/demo/2"] }),
        "DescribeTasks" => {
            let tasks = arns("tasks").len();
            let all = [task(1, 1, "RUNNING", "HEALTHY"), task(2, 2, "RUNNING", "HEALTHY")];
            json!({ "tasks": all[..tasks.min(2)], "failures": [] })
        }
        "ListContainerInstances" => json!({ "containerInstanceArns": [HOST] }),
        "DescribeContainerInstances" => json!({ "containerInstances": [{
            "containerInstanceArn": HOST, "ec2InstanceId": "i-1", "status": "ACTIVE", "agentConnected": true,
            "attributes": [
                { "name": "ecs.availability-zone", "value": "eu-central-1a" },
                { "name": "ecs-mesh.address", "value": "10.1.1.1" },
                { "name": "ecs-mesh.tunnel-port", "value": "15008" },
            ],
        }], "failures": [] }),
        _ => {
            let revision =
                request["taskDefinition"].as_str().and_then(|arn| arn.rsplit(':').next()?.parse::<u32>().ok());
            json!({ "taskDefinition": {
                "taskDefinitionArn": request["taskDefinition"], "family": "world", "revision": revision,
                "networkMode": "bridge", "containerDefinitions": [{
                    "name": "c", "healthCheck": { "command": ["CMD", "true"] },
                    "portMappings": [
                        { "containerPort": 8080, "hostPort": 0, "protocol": "tcp", "name": "web", "appProtocol": "grpc" },
                        { "containerPort": 53, "hostPort": 53, "protocol": "udp" },
                    ],
                }],
            } })
        }
    })
}

const BY: &str = "by 10.1.1.1:15008 as spiffe://t/ns/demo/sa/world";

/// What is seen when these host ports serve.
fn await_ports(running: &Running, ports: &[u16]) -> Result<()> {
    let at = |port: u16| -> Vec<String> { ports.iter().map(|host| format!("{port} 10.1.1.1:{host} {BY}")).collect() };
    let (usual, alias, discovery) = (at(80), at(8080), at(9000));
    let usual: Vec<&str> = usual.iter().map(String::as_str).collect();
    let both: Vec<&str> = usual.iter().copied().chain(alias.iter().map(String::as_str)).collect();
    let discovery: Vec<&str> = discovery.iter().map(String::as_str).collect();
    running.await_seen(&[("server", &usual), ("world", &both), ("world-svc", &both), ("world-web", &discovery)])
}

#[test]
fn host_ports_names_of_service_connect_and_deployments_arrive() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::Ecs, usual)?;
    let running = Running::ecs(&double.address(), "")?;
    await_ports(&running, &[32769, 32770])?;
    let set = running.set();
    let port = set.services["server"].ports[0];
    ensure!((port.port, port.target) == (80, Some(8080)), "{port:?}");
    ensure!(port.protocol == Some(mesh_core::model::Protocol::Grpc), "{port:?}");
    let meta: Vec<_> =
        set.services["world"].endpoints[..2].iter().map(|it| it.endpoint.attributes.meta.clone()).collect();
    for (meta, (revision, status, color)) in meta.iter().zip([("1", "ACTIVE", "blue"), ("2", "PRIMARY", "green")]) {
        ensure!(meta["ecs-revision"] == revision && meta["ecs-deployment-status"] == status, "{meta:?}");
        ensure!(meta["color"] == color && meta["ecs-instance"] == "i-1", "{meta:?}");
    }

    let by = "10.1.1.1:32769 by 10.1.1.1:15008 10.1.1.1:32770 by 10.1.1.1:15008";
    let served = running.resolved("server.my.demo")?;
    ensure!(served == [format!("80 Grpc {by}")], "{served:?}");

    // Told to stop, it is still described for a while, and still runs.
    let began = Instant::now();
    double.change(|action, request| match action {
        "DescribeTasks" => Said::Ok(json!({ "tasks": [
            task(1, 1, "STOPPED", "HEALTHY"), task(2, 2, "RUNNING", "HEALTHY"),
        ], "failures": [] })),
        _ => usual(action, request),
    });
    await_ports(&running, &[32770])?;
    figure("ecs_stop_seen_at_1s", began.elapsed().as_secs_f64(), "s");
    // Ill, not yet well, and gone between the two questions: none of them serves.
    for (first, second) in [("UNHEALTHY", "HEALTHY"), ("UNKNOWN", "HEALTHY")] {
        double.change(move |action, request| match action {
            "DescribeTasks" => Said::Ok(json!({ "tasks": [
                task(1, 1, "RUNNING", first), task(2, 2, "RUNNING", second),
            ] })),
            _ => usual(action, request),
        });
        running.await_answers(10)?;
        await_ports(&running, &[32770])?;
    }
    double.change(usual);
    await_ports(&running, &[32769, 32770])?;
    running.await_well()?;
    double.judge()
}

#[test]
fn a_question_is_asked_for_what_is_new_only() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::Ecs, usual)?;
    let running = Running::ecs(&double.address(), "")?;
    await_ports(&running, &[32769, 32770])?;
    running.await_answers(12)?;
    let asked = double.asked();
    let count = |action: &str| asked.iter().filter(|it| it.action == action).count();
    ensure!(count("DescribeTaskDefinition") == 2, "a revision never changes: {}", count("DescribeTaskDefinition"));
    ensure!(
        count("DescribeServices") < count("DescribeTasks"),
        "{} {}",
        count("DescribeServices"),
        count("DescribeTasks")
    );
    Ok(())
}

#[test]
fn whatever_is_wrong_is_named_and_nothing_is_lost() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::Ecs, usual)?;
    let running = Running::ecs(&double.address(), "")?;
    await_ports(&running, &[32769, 32770])?;
    for action in [
        "ListServices",
        "DescribeServices",
        "ListTasks",
        "DescribeTasks",
        "ListContainerInstances",
        "DescribeContainerInstances",
    ] {
        double.change(move |asked, request| {
            if asked == action { Said::Error(400, "AccessDeniedException", "no") } else { usual(asked, request) }
        });
        running.await_error(&format!("the agent's role needs the IAM action ecs:{action}"))?;
        await_ports(&running, &[32769, 32770])?;
        double.change(usual);
        running.await_well()?;
    }
    for (said, expected) in [
        (Said::Error(400, "ThrottlingException", "Rate exceeded"), "AWS says that it is asked too often"),
        (Said::Error(400, "ClusterNotFoundException", "Cluster not found."), "AWS does not know what ecs:"),
        (Said::Error(403, "RequestTimeTooSkewed", "x"), "set this host's clock"),
        (Said::Error(500, "ServerException", "x"), "ServerException: x"),
        (Said::Raw(200, "<html>"), "is not what AWS gives"),
        (Said::Raw(200, "{}"), "is not what AWS gives"),
        (Said::Raw(200, "{\"taskArns\":[\"a\"],\"tasks\":[{}]}"), "is not what AWS gives"),
    ] {
        let said = said.clone();
        double.change(move |_, _| said.clone());
        running.await_error(expected)?;
        await_ports(&running, &[32769, 32770])?;
        double.change(usual);
        running.await_well()?;
    }
    Ok(())
}

/// What the usual answers are, but that there are only these tasks.
fn only(tasks: impl Fn() -> Vec<Value>, action: &str, request: &Value) -> Said {
    match action {
        "DescribeTasks" => Said::Ok(json!({ "tasks": tasks() })),
        _ => usual(action, request),
    }
}

#[test]
fn what_one_question_cannot_tell_does_not_keep_the_rest() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::Ecs, usual)?;
    let running = Running::ecs(&double.address(), "")?;
    await_ports(&running, &[32769, 32770])?;
    let both = || vec![task(1, 1, "RUNNING", "HEALTHY"), task(2, 2, "RUNNING", "HEALTHY")];
    let first = || vec![task(1, 1, "RUNNING", "HEALTHY"), task(2, 2, "STOPPED", "HEALTHY")];
    for (refused, said, expected) in [
        ("ListServices", "AccessDeniedException", "the agent's role needs the IAM action ecs:ListServices"),
        ("DescribeServices", "ThrottlingException", "asked too often (ThrottlingException for ecs:DescribeServices)"),
        ("ListContainerInstances", "ThrottlingException", "asked too often (ThrottlingException for ecs:ListContainer"),
        ("DescribeContainerInstances", "ServerException", "AWS answers ecs:DescribeContainerInstances with ServerExc"),
    ] {
        let refuse = move |action: &str| (action == refused).then_some(Said::Error(400, said, "no"));
        double.change(move |action, request| refuse(action).unwrap_or_else(|| only(both, action, request)));
        running.await_error(expected)?;
        let began = Instant::now();
        double.change(move |action, request| refuse(action).unwrap_or_else(|| only(first, action, request)));
        await_ports(&running, &[32769])?;
        figure("ecs_stop_seen_while_another_question_fails", began.elapsed().as_secs_f64(), "s");
        ensure!(running.error().is_some_and(|error| error.contains(expected)), "{:?}", running.error());
        double.change(usual);
        await_ports(&running, &[32769, 32770])?;
        running.await_well()?;
    }

    // A definition that may not be read: its tasks are left out, and others still go when they stop.
    let third = || {
        let mut third = task(3, 3, "RUNNING", "HEALTHY");
        third["startedBy"] = "ecs-svc/2".into();
        third
    };
    let refuse =
        |action: &str| (action == "DescribeTaskDefinition").then_some(Said::Error(400, "AccessDeniedException", "no"));
    double.change(move |action, request| {
        refuse(action).unwrap_or_else(|| only(|| [both(), vec![third()]].concat(), action, request))
    });
    running.await_error("the agent's role needs the IAM action ecs:DescribeTaskDefinition")?;
    await_ports(&running, &[32769, 32770])?;
    double.change(move |action, request| {
        refuse(action).unwrap_or_else(|| only(|| [first(), vec![third()]].concat(), action, request))
    });
    await_ports(&running, &[32769])?;
    double.change(move |action, request| only(|| [first(), vec![third()]].concat(), action, request));
    await_ports(&running, &[32769, 32771])?;
    running.await_well()
}

/// On a container instance that is not known, a task may have an agent or not: it is nobody's endpoint until that is known.
#[test]
fn a_task_on_an_unknown_host_waits() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::Ecs, usual)?;
    let running = Running::ecs(&double.address(), "")?;
    await_ports(&running, &[32769, 32770])?;
    let elsewhere = || {
        let mut third = task(3, 2, "RUNNING", "HEALTHY");
        third["containerInstanceArn"] = HOST.replace("demo/1", "demo/2").into();
        vec![task(1, 1, "RUNNING", "HEALTHY"), third]
    };
    double.change(move |action, request| match action {
        "DescribeContainerInstances" => Said::Error(400, "AccessDeniedException", "no"),
        _ => only(elsewhere, action, request),
    });
    running.await_error("the agent's role needs the IAM action ecs:DescribeContainerInstances")?;
    await_ports(&running, &[32769])?;
    double.change(move |action, request| match (action, usual(action, request)) {
        ("DescribeContainerInstances", Said::Ok(mut said)) => {
            let mut other = said["containerInstances"][0].clone();
            other["containerInstanceArn"] = HOST.replace("demo/1", "demo/2").into();
            said["containerInstances"].as_array_mut().expect("a list").push(other);
            Said::Ok(said)
        }
        _ => only(elsewhere, action, request),
    });
    await_ports(&running, &[32769, 32771])?;
    running.await_well()
}

/// In bridge mode each container has a namespace, labels and an identity of its own, as its host sees it.
#[test]
fn containers_in_bridge_mode_are_told_apart() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let published = |name: &str, port: u16| {
        json!({ "name": name, "networkBindings": [
        { "bindIP": "0.0.0.0", "containerPort": port, "hostPort": 32000 + port, "protocol": "tcp" },
    ] })
    };
    let defined = |name: &str, port: u16, label: (&str, &str)| {
        json!({
            "name": name, "portMappings": [{ "containerPort": port, "hostPort": 0, "protocol": "tcp" }],
            "dockerLabels": { label.0: label.1 },
        })
    };
    let double = Double::start(Api::Ecs, move |action, request| match (action, usual(action, request)) {
        ("DescribeTasks", Said::Ok(_)) => {
            let mut task = task(1, 1, "RUNNING", "HEALTHY");
            task["containers"] = json!([published("a", 80), published("b", 81), published("c", 82)]);
            Said::Ok(json!({ "tasks": [task] }))
        }
        ("DescribeTaskDefinition", Said::Ok(mut said)) => {
            said["taskDefinition"]["containerDefinitions"] = json!([
                defined("a", 80, ("ecs-mesh.service", "a")),
                defined("b", 81, ("ecs-mesh.service", "b")),
                defined("c", 82, ("ecs-mesh.enabled", "false")),
            ]);
            Said::Ok(said)
        }
        (_, said) => said,
    })?;
    let running = Running::ecs(&double.address(), "")?;
    let by = |service: &str| format!("by 10.1.1.1:15008 as spiffe://t/ns/demo/sa/{service}");
    let (a, b) = (format!("80 10.1.1.1:32080 {}", by("a")), format!("81 10.1.1.1:32081 {}", by("b")));
    let (alias, c) = (format!("80 10.1.1.1:32081 {}", by("b")), "82 10.1.1.1:32082");
    running.await_seen(&[
        ("a", &[&a]),
        ("b", &[&alias, &b]),
        ("world", &["80 10.1.1.1:32082", c]),
        ("world-svc", &[&a, &b, c]),
    ])?;
    running.await_well()?;
    double.judge()
}
