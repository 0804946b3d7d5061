//! What an agent learns from Cloud Map: names, addresses, health, attributes, and what it keeps while it is away.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    aws::{Api, Moto},
    tier::{Tier, figure, require},
};
use serde_json::{Value, json};

use super::running::Running;

fn revision(moto: &Moto, service: &str) -> Result<Value> {
    let body = json!({ "NamespaceName": "my.demo", "ServiceName": service });
    Ok(moto.call(Api::CloudMap, "DiscoverInstancesRevision", &body)?["InstancesRevision"].clone())
}

#[test]
fn health_attributes_and_removal_arrive() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let moto = Moto::start()?;
    let namespace = moto.namespace("my.demo", true)?;
    let server = moto.service(&namespace, "server")?;
    let by_ecs = json!({
        "AVAILABILITY_ZONE": "eu-central-1a", "ECS_CLUSTER_NAME": "demo", "ECS_SERVICE_NAME": "server",
        "ECS_TASK_DEFINITION_FAMILY": "server", "EC2_INSTANCE_ID": "i-1", "REGION": "eu-central-1", "color": "green",
    });
    moto.register(&server, "0a1b", "10.1.1.1", 32768, &by_ecs)?;
    let running = Running::cloud_map(&moto.address(), "namespaces = [\"my.demo\"]")?;
    let one = "* 10.1.1.1:32768";
    running.await_seen(&[("server", &[one])])?;
    let set = running.set();
    let endpoint = &set.services["server"].endpoints[0].endpoint;
    ensure!(endpoint.zone.as_deref() == Some("eu-central-1a"), "{endpoint:?}");
    let meta = &endpoint.attributes.meta;
    ensure!(meta["ECS_TASK_DEFINITION_FAMILY"] == "server" && meta["color"] == "green", "{meta:?}");

    let tunnel = json!({ "ecs-mesh-agent": "10.1.1.2:15008", "ecs-mesh-identity": "spiffe://t/ns/demo/sa/server" });
    moto.register(&server, "in", "10.1.1.2", 8080, &tunnel)?;
    let by = "10.1.1.2:8080 by 10.1.1.2:15008 as spiffe://t/ns/demo/sa/server";
    let other = [format!("8080 {by}"), format!("* {by}")];
    let other = [other[0].as_str(), other[1].as_str()];
    running.await_seen(&[("server", &[one, other[0], other[1]])])?;

    let served = running.resolved("Server.my.demo.")?;
    let expected =
        ["80 Auto 10.1.1.1:32768 10.1.1.2:8080 by 10.1.1.2:15008", "8080 Auto 10.1.1.2:8080 by 10.1.1.2:15008"];
    ensure!(served == expected, "{served:?}");

    // The revision does not move, and yet it is seen.
    let before = revision(&moto, "server")?;
    let mut flips = Vec::new();
    for _ in 0..3 {
        let began = Instant::now();
        moto.set_health(&server, "0a1b", "UNHEALTHY")?;
        running.await_seen(&[("server", &other)])?;
        flips.push(began.elapsed());
        moto.set_health(&server, "0a1b", "HEALTHY")?;
        running.await_seen(&[("server", &[one, other[0], other[1]])])?;
    }
    ensure!(revision(&moto, "server")? == before, "a flip does not move the revision");
    flips.sort();
    figure("cloud_map_health_flip_p50_at_1s", flips[1].as_secs_f64(), "s");

    let empty = moto.service(&namespace, "empty")?;
    running.await_seen(&[("empty", &[]), ("server", &[one, other[0], other[1]])])?;
    moto.deregister(&server, "in")?;
    moto.call(Api::CloudMap, "DeleteService", &json!({ "Id": empty }))?;
    running.await_seen(&[("server", &[one])])?;
    moto.deregister(&server, "0a1b")?;
    running.await_seen(&[("server", &[])])?;
    moto.call(Api::CloudMap, "DeleteService", &json!({ "Id": server }))?;
    running.await_seen(&[])?;
    running.await_well()
}

#[test]
fn nothing_is_lost_while_cloud_map_is_away_or_a_namespace_is_made_anew() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let mut moto = Moto::start()?;
    let namespace = moto.namespace("my.demo", false)?;
    let server = moto.service(&namespace, "server")?;
    moto.register(&server, "a", "10.1.1.1", 80, &json!({}))?;
    let running = Running::cloud_map(&moto.address(), "namespaces = [\"my.demo\"]")?;
    let seen: &[(&str, &[&str])] = &[("server", &["80 10.1.1.1:80"])];
    running.await_seen(seen)?;
    moto.kill()?;
    running.await_error("cannot reach the AWS API for servicediscovery:")?;
    running.await_seen(seen)?;
    // Back, with nothing in it: there is not even the namespace.
    moto.up()?;
    running.await_error("namespace")?;
    running.await_seen(seen)?;
    let namespace = moto.namespace("my.demo", false)?;
    let server = moto.service(&namespace, "server")?;
    moto.register(&server, "b", "10.1.1.2", 80, &json!({}))?;
    running.await_seen(&[("server", &["80 10.1.1.2:80"])])?;
    running.await_well()
}

#[test]
fn only_the_services_that_are_wanted_are_asked_for() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let moto = Moto::start()?;
    let namespace = moto.namespace("my.demo", false)?;
    for name in ["a-one", "a-two", "b"] {
        let id = moto.service(&namespace, name)?;
        moto.register(&id, name, "10.1.1.1", 80, &json!({}))?;
    }
    let running =
        Running::cloud_map(&moto.address(), "namespaces = [\"my.demo\"]\nprefixes = [\"a-\"]\nexclude = [\"a-two\"]")?;
    running.await_seen(&[("a-one", &["80 10.1.1.1:80"])])?;
    running.await_answers(4)?;
    running.await_seen(&[("a-one", &["80 10.1.1.1:80"])])
}

#[test]
fn a_service_of_which_an_instance_cannot_be_used_keeps_the_others() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let moto = Moto::start()?;
    let namespace = moto.namespace("my.demo", false)?;
    let server = moto.service(&namespace, "server")?;
    moto.register(&server, "half", "10.1.1.3", 80, &json!({ "ecs-mesh-agent": "10.1.1.3:15008" }))?;
    moto.register(&server, "bad", "10.1.1.4", 0, &json!({}))?;
    let name = json!({ "ServiceId": server, "InstanceId": "n", "Attributes": { "AWS_INSTANCE_CNAME": "a.example" } });
    moto.call(Api::CloudMap, "RegisterInstance", &name).context("a name")?;
    moto.register(&server, "good", "10.1.1.1", 80, &json!({}))?;
    let running = Running::cloud_map(&moto.address(), "namespaces = [\"my.demo\"]")?;
    running.await_seen(&[("server", &["80 10.1.1.1:80"])])
}
