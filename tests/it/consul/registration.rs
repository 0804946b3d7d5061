//! What Consul learns of this host's tasks, and that it is neither more nor less.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use mesh_agent::discovery::{Registrar, consul::registrar};
use mesh_core::task::{ContainerHealth, Phase, Task};
use mesh_tests::{
    consul::Server,
    tier::{Tier, figure, require},
    until::until,
};
use serde_json::{Value, json};

use crate::registering::{Host, LIMIT, task};

fn start(address: &str, more: &str, tasks: &[Task]) -> Result<Host> {
    let lines = format!(
        "[discovery.consul]\naddress = \"{address}\"\n{more}\n\
         [discovery.consul.registration]\nenabled = true\nttl = \"3s\"\n"
    );
    Host::start(&lines, tasks, |config, tunnel| {
        let consul = Arc::new(config.discovery.consul.clone().context("configured")?);
        let registration = consul.registration.clone().context("enabled")?;
        Ok(Registrar::Consul(registrar::Registrar::new(&consul, registration, tunnel)?))
    })
}

/// `id status` of the instances of a service, by their own check.
fn instances(server: &Server, name: &str) -> Result<Vec<String>> {
    let one = |it: &Value| {
        let id = it["Service"]["ID"].as_str().unwrap_or_default();
        let own = it["Checks"].as_array().into_iter().flatten().find(|check| check["ServiceID"] == id);
        format!("{id} {}", own.and_then(|check| check["Status"].as_str()).unwrap_or("none"))
    };
    let mut all: Vec<String> = server.instances(name)?.iter().map(one).collect();
    all.sort();
    Ok(all)
}

fn await_instances(server: &Server, name: &str, expected: &[&str]) -> Result<()> {
    until(LIMIT, &format!("{name}: {expected:?}"), || {
        let found = instances(server, name)?;
        Ok(if found == expected { Ok(()) } else { Err(format!("{found:?}")) })
    })
}

const ONE: &str = "ecs-mesh:10.90.1.10:32768:t1 passing";
const TWO: &str = "ecs-mesh:10.90.1.10:32769:t2 passing";

#[test]
fn tasks_come_change_and_go() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let server = Server::start()?;
    let (one, mut two) = (task("t1", "world", 32768), task("t2", "world", 32769));
    let host = start(&server.address(), "", std::slice::from_ref(&one))?;
    await_instances(&server, "world", &[ONE])?;
    let service = &server.instances("world")?[0]["Service"];
    assert_eq!((&service["Address"], &service["Port"]), (&json!("10.90.1.10"), &json!(32768)));
    assert_eq!(service["Meta"]["ecs-mesh-agent"], "10.90.1.10:15008");
    assert_eq!(service["Meta"]["ecs-mesh-identity"], "spiffe://t/ns/demo/sa/world");

    // Not ready yet: nobody shall see it.
    two.containers[0].health = Some(ContainerHealth::Starting);
    host.show(&[one.clone(), two.clone()]);
    std::thread::sleep(Duration::from_secs(1));
    await_instances(&server, "world", &[ONE])?;
    // Ready, ill, starting again: what its check says.
    for (health, status) in [
        (ContainerHealth::Healthy, "passing"),
        (ContainerHealth::Starting, "critical"),
        (ContainerHealth::Healthy, "passing"),
        (ContainerHealth::Unhealthy, "critical"),
    ] {
        two.containers[0].health = Some(health);
        host.show(&[one.clone(), two.clone()]);
        await_instances(&server, "world", &[ONE, &TWO.replace("passing", status)])?;
    }
    // It stays so for longer than its time to live: somebody speaks for it.
    std::thread::sleep(Duration::from_secs(5));
    await_instances(&server, "world", &[ONE, &TWO.replace("passing", "critical")])?;

    // Told to stop: away before it has ended.
    let began = Instant::now();
    host.show(&[Task { phase: Phase::Stopping, ..one }, two.clone()]);
    await_instances(&server, "world", &[&TWO.replace("passing", "critical")])?;
    figure("consul_withdrawn", began.elapsed().as_secs_f64() * 1e3, "ms");

    // Other labels, another name.
    two.labels.insert("SERVICE_NAME".into(), "planet".into());
    host.show(&[two]);
    await_instances(&server, "planet", &[&TWO.replace("passing", "critical")])?;
    await_instances(&server, "world", &[])?;
    host.leave()?;
    await_instances(&server, "planet", &[])
}

#[test]
fn what_a_crash_left_goes_and_what_consul_lost_returns() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let mut server = Server::start()?;
    let leftover =
        |id: &str, owner: &str| json!({ "ID": id, "Name": "old", "Port": 1, "Meta": { "ecs-mesh-owner": owner } });
    for (id, owner) in [("gone", "ecs-mesh@10.90.1.10"), ("neighbour", "ecs-mesh@10.90.1.11"), ("manual", "")] {
        server.tell("/v1/agent/service/register", &leftover(id, owner))?;
    }
    let one = task("t1", "world", 32768);
    let host = start(&server.address(), "", std::slice::from_ref(&one))?;
    await_instances(&server, "world", &[ONE])?;
    await_instances(&server, "old", &["manual none", "neighbour none"])?;

    // Removed by somebody else.
    server.tell("/v1/agent/service/deregister/ecs-mesh:10.90.1.10:32768:t1", &json!({}))?;
    await_instances(&server, "world", &[])?;
    await_instances(&server, "world", &[ONE])?;
    // Only its check.
    server.tell("/v1/agent/check/deregister/service:ecs-mesh:10.90.1.10:32768:t1", &json!({}))?;
    await_instances(&server, "world", &[ONE])?;

    server.kill()?;
    host.await_error("cannot reach Consul")?;
    server.up()?;
    let began = Instant::now();
    await_instances(&server, "world", &[ONE])?;
    figure("consul_registered_again", began.elapsed().as_secs_f64(), "s");
    host.await_well()?;
    // The agent is gone, and nobody speaks for the task: Consul takes it for dead.
    drop(host);
    await_instances(&server, "world", &[&ONE.replace("passing", "critical")])
}

#[test]
fn a_token_that_may_not_write_is_named_with_the_rule() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let mut server = Server::start_with(super::discovery::ACL, &[])?;
    server.token = Some("root-token".into());
    let file = server.folder().join("token");
    std::fs::write(&file, "no-such-token")?;
    let more = format!("token_file = \"{}\"", file.display());
    let host = start(&server.address(), &more, &[task("t1", "world", 32768)])?;
    host.await_error("the token needs the ACL rule service_prefix")?;
    std::fs::write(&file, "root-token")?;
    await_instances(&server, "world", &[ONE])
}
