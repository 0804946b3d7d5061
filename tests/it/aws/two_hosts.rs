//! Two agents that know of each other's tasks by Cloud Map alone: no file names an endpoint.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use mesh_lab::{Host, Process};
use mesh_tests::{
    aws::{self, Api, REGION},
    mesh::{LIMIT, Mesh},
    tier::{Tier, figure, require},
    until::{Checks, until},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const PORT: u16 = 5000;

/// One call to the moto of the first host.
fn call(host: &Host, api: Api, action: &str, body: &Value) -> Result<Value> {
    let (url, body) = (format!("http://{}:{PORT}/", host.address()), body.to_string());
    let headers = api.headers(action).map(|(key, value)| format!("{key}: {value}"));
    let mut argv = vec!["curl", "-sS", "--fail-with-body", "-d", &body, &url];
    argv.extend(headers.iter().flat_map(|header| ["-H", header]));
    let said = host.run(&argv).with_context(|| format!("{action} {body}"))?;
    Ok(serde_json::from_str(&said).unwrap_or(Value::Null))
}

/// Starts moto on the first host, for both, with a service in the namespace `my.demo`.
fn moto(mesh: &Mesh, service: &str) -> Result<Process> {
    let host = mesh.host(0);
    let path = format!("PYTHONPATH={}", aws::place().map_err(anyhow::Error::msg)?.display());
    let port = PORT.to_string();
    let argv = ["env", &path, "python3", "-m", "moto.server", "-H", "0.0.0.0", "-p", &port];
    let process = host.spawn("moto", &argv)?;
    until(LIMIT, "moto answers", || {
        Ok(call(host, Api::CloudMap, "ListNamespaces", &json!({})).map(drop).map_err(|error| format!("{error:#}")))
    })?;
    call(host, Api::CloudMap, "CreateHttpNamespace", &json!({ "Name": "my.demo" }))?;
    let listed = call(host, Api::CloudMap, "ListNamespaces", &json!({}))?;
    let body = json!({
        "Name": service, "NamespaceId": listed["Namespaces"][0]["Id"],
        "HealthCheckCustomConfig": { "FailureThreshold": 1 },
    });
    call(host, Api::CloudMap, "CreateService", &body)?;
    Ok(process)
}

/// Ids of what is registered.
fn registered(host: &Host, service: &str) -> Result<Vec<String>> {
    let body = json!({ "NamespaceName": "my.demo", "ServiceName": service, "HealthStatus": "ALL" });
    let said = call(host, Api::CloudMap, "DiscoverInstances", &body)?;
    let id = |it: &Value| it["InstanceId"].as_str().unwrap_or_default().to_owned();
    Ok(said["Instances"].as_array().into_iter().flatten().map(id).collect())
}

#[test]
fn tasks_find_each_other_by_cloud_map_and_speak_by_tunnel() -> Result<()> {
    if !require(Tier::Aws) || !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let mut server = moto(&mesh, "world")?;
    for host in [0, 1] {
        let more = format!(
            "[discovery.cloud_map]\nnamespaces = [\"my.demo\"]\nregion = \"{REGION}\"\n\
             endpoint = \"http://{}:{PORT}\"\ninterval = \"1s\"\nidle_interval = \"1s\"\nlist_interval = \"1s\"\n\
             [discovery.cloud_map.registration]\nenabled = true\ninterval = \"1s\"\n",
            mesh.host(0).address()
        );
        mesh.configure(host, &more)?;
    }
    let client = mesh.task(0, mesh.idle("client").label("ecs-mesh.register", "false"))?;
    let _one = mesh.task(1, mesh.nginx("world", "one", 8080))?;
    let two = mesh.task(1, mesh.nginx("world", "two", 8080))?;
    mesh.start()?;
    // Port 80, which nobody was told, and 8080, of each.
    mesh.await_endpoints(0, "world", 4)?;

    let get =
        |mesh: &Mesh, name: &str| mesh.run(&client, &["curl", "-sS", "--max-time", "5", &format!("http://{name}/")]);
    let mut checks = Checks::default();
    checks.run("both answer, by every name", || {
        for name in ["world", "world.my.demo", "world:8080"] {
            let answers: Vec<String> = (0..20).map(|_| get(&mesh, name)).collect::<Result<_>>()?;
            ensure!(["one", "two"].iter().all(|one| answers.iter().any(|it| it.trim() == *one)), "{name}: {answers:?}");
        }
        Ok(())
    });
    checks.run("it went by a tunnel", || {
        let line = mesh.await_access(1, "a request from the other host", |line| line["direction"] == "inbound")?;
        ensure!(line.to_string().contains("spiffe://demo.mesh/ns/demo/sa/client"), "{line}");
        Ok(())
    });
    checks.run("status and metrics show it", || {
        let status = mesh.document(1, &["status"])?;
        let sources = status["sources"].as_array().context("sources")?;
        let told = sources.iter().find(|it| it["name"] == "cloud_map registration").context("told")?;
        ensure!(told["last_error"].is_null() && told["state"] == "2 instances of this host", "{told}");
        let metrics = mesh.host(1).run(&["curl", "-sS", "http://127.0.0.1:15020/metrics"])?;
        for line in
            ["mesh_registrations{registry=\"cloud_map\"} 2", "mesh_local_ports{service=\"world\",ready=\"true\"} 2"]
        {
            ensure!(metrics.lines().any(|it| it == line), "{line} is not in {metrics}");
        }
        Ok(())
    });
    checks.done()?;

    // Told to stop: the other host knows before the program has ended.
    let began = Instant::now();
    mesh.host(1).stop_task(&two.task)?;
    mesh.await_endpoints(0, "world", 2)?;
    figure("cloud_map_stop_seen_elsewhere", began.elapsed().as_secs_f64(), "s");
    let answers: Vec<String> = (0..5).map(|_| get(&mesh, "world")).collect::<Result<_>>()?;
    ensure!(answers.iter().all(|it| it.trim() == "one"), "{answers:?}");

    // An agent that is killed leaves it there, and the next one goes on with it; one that is stopped takes it along.
    mesh.end(1, Signal::SIGKILL)?;
    let before = registered(mesh.host(0), "world")?;
    ensure!(before.len() == 1, "{before:?}");
    mesh.launch(1)?;
    mesh.await_ready(1)?;
    ensure!(get(&mesh, "world")?.trim() == "one");
    ensure!(registered(mesh.host(0), "world")? == before);
    mesh.end(1, Signal::SIGTERM)?;
    let left = registered(mesh.host(0), "world")?;
    ensure!(left.is_empty(), "{left:?}");
    server.kill();
    mesh.down()
}
