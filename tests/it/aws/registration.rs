//! What Cloud Map learns of this host's tasks, and that it is neither more nor less.

use std::{sync::Arc, time::Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::discovery::{Registrar, cloud_map::registrar};
use mesh_core::task::{ContainerHealth, Phase, Task};
use mesh_tests::{
    aws::{Api, Moto, REGION},
    tier::{Tier, figure, require},
    until::until,
};
use serde_json::{Value, json};

use super::running::Running;
use crate::registering::{Host, LIMIT, task};

/// An agent that registers its tasks in the namespace `my.demo`, and looks whether they are there every second.
pub(super) fn start(address: &str, more: &str, tasks: &[Task]) -> Result<Host> {
    let lines = format!(
        "[discovery.cloud_map]\nnamespaces = [\"my.demo\"]\nregion = \"{REGION}\"\nendpoint = \"{address}\"\n\
         [discovery.cloud_map.registration]\nenabled = true\ninterval = \"1s\"\n{more}\n"
    );
    Host::start(&lines, tasks, |config, tunnel| {
        let cloud_map = Arc::new(config.discovery.cloud_map.clone().context("configured")?);
        let registration = cloud_map.registration.clone().context("enabled")?;
        Ok(Registrar::CloudMap(registrar::Registrar::new(&cloud_map, registration, tunnel)))
    })
}

/// `id health` of the instances of a service, as everybody sees them.
fn instances(moto: &Moto, name: &str) -> Result<Vec<String>> {
    let body = json!({ "NamespaceName": "my.demo", "ServiceName": name, "HealthStatus": "ALL" });
    let said = moto.call(Api::CloudMap, "DiscoverInstances", &body)?;
    let text = |it: &Value, key: &str| it[key].as_str().unwrap_or_default().to_owned();
    let one = |it: &Value| format!("{} {}", text(it, "InstanceId"), text(it, "HealthStatus"));
    let mut all: Vec<String> = said["Instances"].as_array().into_iter().flatten().map(one).collect();
    all.sort();
    Ok(all)
}

fn await_instances(moto: &Moto, name: &str, expected: &[&str]) -> Result<()> {
    until(LIMIT, &format!("{name}: {expected:?}"), || {
        let found = instances(moto, name)?;
        Ok(if found == expected { Ok(()) } else { Err(format!("{found:?}")) })
    })
}

/// A service without a health check.
fn without_health(moto: &Moto, namespace: &str, name: &str) -> Result<String> {
    let made = moto.call(Api::CloudMap, "CreateService", &json!({ "Name": name, "NamespaceId": namespace }))?;
    Ok(made["Service"]["Id"].as_str().context("an id")?.to_owned())
}

fn with_health(task: &Task, health: ContainerHealth) -> Task {
    let mut task = task.clone();
    task.containers[0].health = Some(health);
    task
}

const ONE: &str = "ecs-mesh:10.90.1.10:32768:t1 HEALTHY";
const ONE_ILL: &str = "ecs-mesh:10.90.1.10:32768:t1 UNHEALTHY";
const TWO: &str = "ecs-mesh:10.90.1.10:32769:t2 HEALTHY";

#[test]
fn tasks_come_fall_ill_and_go() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let moto = Moto::start()?;
    let namespace = moto.namespace("my.demo", true)?;
    moto.service(&namespace, "world")?;
    without_health(&moto, &namespace, "plain")?;
    let (one, two) = (task("t1", "world", 32768), task("t2", "plain", 32769));
    let starting = with_health(&one, ContainerHealth::Starting);
    let host = start(&moto.address(), "", &[starting, two.clone()])?;
    await_instances(&moto, "plain", &[TWO])?;
    ensure!(instances(&moto, "world")?.is_empty(), "what was never ready is nobody's to see");

    // Ready: another host reaches it by a tunnel.
    let began = Instant::now();
    host.show(&[with_health(&one, ContainerHealth::Healthy), two.clone()]);
    await_instances(&moto, "world", &[ONE])?;
    figure("cloud_map_registered", began.elapsed().as_secs_f64() * 1e3, "ms");
    host.await_well()?;
    let other = Running::cloud_map(&moto.address(), "namespaces = [\"my.demo\"]")?;
    let by = |port: &str, host: u16, name: &str| {
        format!("{port} 10.90.1.10:{host} by 10.90.1.10:15008 as spiffe://t/ns/demo/sa/{name}")
    };
    let world = ["80", "8080"].map(|port| by(port, 32768, "world"));
    let plain = ["80", "8080"].map(|port| by(port, 32769, "plain"));
    let (world, plain) = ([world[0].as_str(), world[1].as_str()], [plain[0].as_str(), plain[1].as_str()]);
    other.await_seen(&[("plain", &plain), ("world", &world)])?;

    // Ill: told where that can be told, taken back where it cannot.
    let began = Instant::now();
    let ill = [&one, &two].map(|task| with_health(task, ContainerHealth::Unhealthy));
    host.show(&ill);
    await_instances(&moto, "world", &[ONE_ILL])?;
    figure("cloud_map_told_ill", began.elapsed().as_secs_f64() * 1e3, "ms");
    await_instances(&moto, "plain", &[])?;
    other.await_seen(&[("plain", &[]), ("world", &[])])?;
    host.show(&[one.clone(), two.clone()]);
    await_instances(&moto, "world", &[ONE])?;
    await_instances(&moto, "plain", &[TWO])?;

    // Told to stop: away before it has ended.
    let began = Instant::now();
    host.show(&[Task { phase: Phase::Stopping, ..one.clone() }, two.clone()]);
    await_instances(&moto, "world", &[])?;
    figure("cloud_map_withdrawn", began.elapsed().as_secs_f64() * 1e3, "ms");

    // Another name.
    let mut renamed = two;
    renamed.labels.insert("SERVICE_NAME".into(), "world".into());
    host.show(&[renamed]);
    await_instances(&moto, "world", &[TWO])?;
    await_instances(&moto, "plain", &[])?;
    host.leave()?;
    ensure!(instances(&moto, "world")?.is_empty(), "an agent that stops takes its tasks with it");
    Ok(())
}

#[test]
fn what_a_crash_left_goes_what_others_have_stays_and_what_was_lost_returns() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let mut moto = Moto::start()?;
    let namespace = moto.namespace("my.demo", false)?;
    let world = moto.service(&namespace, "world")?;
    let old = moto.service(&namespace, "old")?;
    let owned = |owner: &str| json!({ "ecs-mesh-owner": owner });
    moto.register(&old, "neighbour", "10.90.1.11", 80, &owned("ecs-mesh@10.90.1.11"))?;
    moto.register(&old, "by-ecs", "10.90.1.10", 80, &json!({ "ECS_SERVICE_NAME": "old" }))?;
    moto.register(&old, "gone", "10.90.1.10", 81, &owned("ecs-mesh@10.90.1.10"))?;
    let one = task("t1", "world", 32768);
    let host = start(&moto.address(), "", std::slice::from_ref(&one))?;
    await_instances(&moto, "world", &[ONE])?;
    await_instances(&moto, "old", &["by-ecs HEALTHY", "neighbour HEALTHY"])?;
    // Removed by somebody else.
    moto.deregister(&world, "ecs-mesh:10.90.1.10:32768:t1")?;
    await_instances(&moto, "world", &[])?;
    await_instances(&moto, "world", &[ONE])?;
    // A crash, and an agent that finds what the one before has left.
    drop(host);
    await_instances(&moto, "world", &[ONE])?;
    let host = start(&moto.address(), "", &[])?;
    await_instances(&moto, "world", &[])?;

    host.show(std::slice::from_ref(&one));
    await_instances(&moto, "world", &[ONE])?;
    moto.kill()?;
    host.await_error("cannot reach the AWS API for servicediscovery:")?;
    moto.up()?;
    host.await_error("there is no Cloud Map namespace my.demo")?;
    let namespace = moto.namespace("my.demo", false)?;
    host.await_error(
        "the namespace my.demo has no service `world`: create it, with `aws servicediscovery create-service",
    )?;
    host.await_error(&format!("--name world --namespace-id {namespace} --health-check-custom-config"))?;
    moto.service(&namespace, "world")?;
    await_instances(&moto, "world", &[ONE])?;
    host.await_well()?;
    host.leave()?;
    ensure!(instances(&moto, "world")?.is_empty());
    Ok(())
}
