//! What an agent learns from the ECS API, as moto speaks it.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    aws::{Api, Moto},
    tier::{Tier, require},
};
use serde_json::{Value, json};

use super::running::Running;

/// What stands between two tags, first of all.
fn between(text: &str, tag: &str) -> Result<String> {
    let inner = text.split_once(&format!("<{tag}>")).and_then(|(_, rest)| rest.split_once('<'));
    Ok(inner.with_context(|| format!("<{tag}> in {text}"))?.0.to_owned())
}

/// A cluster with one container instance that says that there is an agent.
struct Cluster {
    moto: Moto,
    network: Value,
}

impl Cluster {
    fn start() -> Result<Self> {
        let moto = Moto::start()?;
        moto.hold_tasks()?;
        let query = |text: &str| moto.query(Api::Ec2, &format!("{text}&Version=2016-11-15"));
        let subnet = between(&query("Action=DescribeSubnets")?, "subnetId")?;
        let group = between(&query("Action=DescribeSecurityGroups")?, "groupId")?;
        let instance = query("Action=RunInstances&ImageId=ami-12c6146b&MinCount=1&MaxCount=1")?;
        let instance = between(&instance, "instanceId")?;
        moto.call(Api::Ecs, "CreateCluster", &json!({ "clusterName": "demo" }))?;
        let document = json!({ "accountId": "123456789012", "instanceId": instance, "region": "eu-central-1" });
        let body = json!({ "cluster": "demo", "instanceIdentityDocument": document.to_string() });
        let made = moto.call(Api::Ecs, "RegisterContainerInstance", &body)?;
        let arn = made["containerInstance"]["containerInstanceArn"].as_str().context("an ARN")?;
        let id = arn.rsplit('/').next().context("an id")?;
        let attribute = |name: &str, value: &str| json!({ "name": name, "value": value, "targetType": "container-instance", "targetId": id });
        let attributes = [attribute("ecs-mesh.address", "10.1.1.1"), attribute("ecs-mesh.tunnel-port", "15008")];
        moto.call(Api::Ecs, "PutAttributes", &json!({ "cluster": "demo", "attributes": attributes }))?;
        let network = json!({ "awsvpcConfiguration": { "subnets": [subnet], "securityGroups": [group] } });
        Ok(Self { moto, network })
    }

    fn define(&self, family: &str, mode: &str, labels: &Value) -> Result<()> {
        let ports = json!([{ "containerPort": 8080, "name": "web", "appProtocol": "http" }]);
        let container =
            json!({ "name": "c", "image": "x", "memory": 10, "portMappings": ports, "dockerLabels": labels });
        let body = json!({ "family": family, "networkMode": mode, "containerDefinitions": [container] });
        self.moto.call(Api::Ecs, "RegisterTaskDefinition", &body).map(drop)
    }

    /// A service; returns the id of its deployment.
    fn service(&self, name: &str, family: &str, awsvpc: bool) -> Result<String> {
        let mut body = json!({
            "cluster": "demo", "serviceName": name, "taskDefinition": family, "desiredCount": 0, "launchType": "EC2",
        });
        if awsvpc {
            body["networkConfiguration"] = self.network.clone();
        }
        let made = self.moto.call(Api::Ecs, "CreateService", &body)?;
        Ok(made["service"]["deployments"][0]["id"].as_str().context("an id")?.to_owned())
    }

    /// A task, as its service would start it; returns ARN and address.
    fn run(&self, service: &str, family: &str, deployment: &str, awsvpc: bool) -> Result<(String, String)> {
        let mut body = json!({
            "cluster": "demo", "taskDefinition": family, "launchType": "EC2", "group": format!("service:{service}"),
            "startedBy": deployment,
        });
        if awsvpc {
            body["networkConfiguration"] = self.network.clone();
        }
        let made = self.moto.call(Api::Ecs, "RunTask", &body)?;
        let task = &made["tasks"][0];
        let details = task["attachments"][0]["details"].as_array();
        let address = details.into_iter().flatten().find(|it| it["name"] == "privateIPv4Address");
        let address = address.and_then(|it| it["value"].as_str()).unwrap_or_default().to_owned();
        Ok((task["taskArn"].as_str().context("an ARN")?.to_owned(), address))
    }
}

#[test]
fn services_tasks_and_their_tunnels_arrive() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let cluster = Cluster::start()?;
    cluster.define("world", "awsvpc", &json!({}))?;
    cluster.define("plain", "host", &json!({ "ecs-mesh.enabled": "false" }))?;
    let deployment = cluster.service("world", "world", true)?;
    cluster.service("plain", "plain", false)?;
    let (task, address) = cluster.run("world", "world", &deployment, true)?;
    cluster.run("plain", "plain", "ecs-svc/0", false)?;
    let running = Running::ecs(&cluster.moto.address(), "")?;
    let by = format!("{address}:8080 by {address}:15008 as spiffe://t/ns/demo/sa/world");
    let world = [format!("80 {by}"), format!("8080 {by}")];
    let world = [world[0].as_str(), world[1].as_str()];
    let plain: &[&str] = &["80 10.1.1.1:8080", "8080 10.1.1.1:8080"];
    running.await_seen(&[("plain", plain), ("world", &world)])?;
    let set = running.set();
    let meta = &set.services["world"].endpoints[0].endpoint.attributes.meta;
    ensure!(meta["ecs-revision"] == "1" && meta["ecs-deployment"] == deployment, "{meta:?}");
    ensure!(meta["ecs-deployment-status"] == "PRIMARY" && meta["ecs-family"] == "world", "{meta:?}");

    // One more, and then the first is told to stop.
    let (_, second) = cluster.run("world", "world", &deployment, true)?;
    let by_second = format!("{second}:8080 by {second}:15008 as spiffe://t/ns/demo/sa/world");
    let count = || running.set().services["world"].endpoints.len();
    mesh_tests::until::until(super::running::LIMIT, "both", || Ok(if count() == 4 { Ok(()) } else { Err(count()) }))?;
    cluster.moto.call(Api::Ecs, "StopTask", &json!({ "cluster": "demo", "task": task }))?;
    let left = [format!("80 {by_second}"), format!("8080 {by_second}")];
    running.await_seen(&[("plain", plain), ("world", &[&left[0], &left[1]])])?;
    cluster.moto.call(Api::Ecs, "DeleteService", &json!({ "cluster": "demo", "service": "plain", "force": true }))?;
    running.await_well()
}

/// A service with A records: ECS registers its tasks without a port.
#[test]
fn the_port_that_cloud_map_does_not_tell_is_the_one_that_ecs_knows() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let cluster = Cluster::start()?;
    cluster.define("world", "awsvpc", &json!({}))?;
    let deployment = cluster.service("world", "world", true)?;
    let (_, address) = cluster.run("world", "world", &deployment, true)?;
    let namespace = cluster.moto.namespace("my.demo", true)?;
    let world = cluster.moto.service(&namespace, "world")?;
    let instance = json!({ "ServiceId": world, "InstanceId": "0a1b", "Attributes": { "AWS_INSTANCE_IPV4": address } });
    cluster.moto.call(Api::CloudMap, "RegisterInstance", &instance)?;

    let cloud_map = Running::cloud_map(&cluster.moto.address(), "namespaces = [\"my.demo\"]")?;
    let assumed = format!("80 {address}:80");
    cloud_map.await_seen(&[("world", &[&assumed])])?;
    ensure!(cloud_map.resolved("world.")? == [format!("80 Auto {address}:80")], "alone, it has the usual port");
    let ecs = Running::ecs(&cluster.moto.address(), "")?;
    let by = format!("{address}:8080 by {address}:15008");
    let known = [80, 8080].map(|port| format!("{port} {by} as spiffe://t/ns/demo/sa/world"));
    ecs.await_seen(&[("world", &[&known[0], &known[1]])])?;
    let expected = [80, 8080].map(|port| format!("{port} Auto {by}"));
    for order in [[&ecs, &cloud_map], [&cloud_map, &ecs]] {
        let served = Running::resolved_by(&order, "world.")?;
        ensure!(served == expected, "{served:?}");
    }
    Ok(())
}

#[test]
fn nothing_is_lost_while_ecs_is_away() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let mut cluster = Cluster::start()?;
    cluster.define("world", "host", &json!({}))?;
    let deployment = cluster.service("world", "world", false)?;
    cluster.run("world", "world", &deployment, false)?;
    let running = Running::ecs(&cluster.moto.address(), "")?;
    let by = "10.1.1.1:8080 by 10.1.1.1:15008 as spiffe://t/ns/demo/sa/world";
    let world = [format!("80 {by}"), format!("8080 {by}")];
    let seen: &[(&str, &[&str])] = &[("world", &[&world[0], &world[1]])];
    running.await_seen(seen)?;
    cluster.moto.kill()?;
    running.await_error("cannot reach the AWS API for ecs:")?;
    running.await_seen(seen)?;
    // Back, with nothing in it: there is not even the cluster.
    cluster.moto.up()?;
    running.await_error("AWS does not know what ecs:")?;
    // Of a cluster that it does not have, moto lists no container instances, where it refuses the rest.
    running.await_failures(4)?;
    running.await_seen(seen)?;
    cluster.moto.call(Api::Ecs, "CreateCluster", &json!({ "clusterName": "demo" }))?;
    running.await_seen(&[])?;
    running.await_well()
}
