//! Two agents that know of each other's tasks by Consul alone: no file names an endpoint.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use mesh_lab::Process;
use mesh_tests::{
    consul,
    mesh::{LIMIT, Mesh},
    tier::{Tier, figure, require},
    until::{Checks, until},
};
use nix::sys::signal::Signal;

/// Starts a Consul server on the first host, for both.
pub(super) fn consul(mesh: &Mesh) -> Result<(Process, String)> {
    let host = mesh.host(0);
    host.install(&consul::program().map_err(anyhow::Error::msg)?, "consul")?;
    let (bind, url) = (format!("-bind={}", host.address()), format!("http://{}:8500", host.address()));
    // Its DNS server as a task's resolver: the hooks see port 53.
    let argv = ["consul", "agent", "-dev", &bind, "-client=0.0.0.0", "-node=lab", "-log-level=warn", "-dns-port=53"];
    let process = host.spawn("consul", &argv)?;
    until(LIMIT, "Consul leads", || {
        let said = host.exec(&["curl", "-sS", &format!("{url}/v1/status/leader")])?;
        Ok(if said.stdout.contains("8300") { Ok(()) } else { Err(format!("{said:?}")) })
    })?;
    Ok((process, url))
}

#[test]
fn tasks_find_each_other_by_consul_and_speak_by_tunnel() -> Result<()> {
    if !require(Tier::Consul) || !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let (mut server, url) = consul(&mesh)?;
    for host in [0, 1] {
        let more = format!(
            "[discovery.consul]\naddress = \"{url}\"\n[discovery.consul.registration]\nenabled = true\nttl = \"3s\"\n"
        );
        mesh.configure(host, &more)?;
    }
    let client = mesh.task(0, mesh.idle("client"))?;
    let _here = mesh.task(0, mesh.nginx("world", "one", 8080).label("SERVICE_TAGS", "v1"))?;
    let there = mesh.task(1, mesh.nginx("world", "two", 8080).label("SERVICE_TAGS", "v2"))?;
    mesh.start()?;
    // Port 80, which nobody was told, and 8080.
    for host in [0, 1] {
        mesh.await_endpoints(host, "world", 4)?;
    }

    let mut checks = Checks::default();
    let get = |name: &str| mesh.run(&client, &["curl", "-sS", "--max-time", "5", &format!("http://{name}/")]);
    checks.run("both answer", || {
        let answers: Vec<String> = (0..20).map(|_| get("world")).collect::<Result<_>>()?;
        ensure!(["one", "two"].iter().all(|one| answers.iter().any(|it| it.trim() == *one)), "{answers:?}");
        Ok(())
    });
    for name in ["world.service.consul", "world:8080", "world.service.consul:8080"] {
        checks.run(&format!("{name} is the same service"), || {
            let answer = get(name)?;
            ensure!(["one", "two"].contains(&answer.trim()), "{answer:?}");
            Ok(())
        });
    }
    checks.run("a tag's name is answered by those that bear it", || {
        for (name, expected) in [("v1.world.service.consul", "one"), ("v2.world.service.consul", "two")] {
            let answers: Vec<String> = (0..4).map(|_| get(name)).collect::<Result<_>>()?;
            ensure!(answers.iter().all(|it| it.trim() == expected), "{name}: {answers:?}");
        }
        Ok(())
    });
    checks.run("dig sees Consul's names, and Consul is asked what only it knows", || {
        let dig = |arguments: &str| {
            let argv: Vec<_> = ["dig", "+tries=1", "+time=5"].into_iter().chain(arguments.split(' ')).collect();
            mesh.run(&client, &argv)
        };
        for name in ["world.service.consul", "v2.world.service.consul", "V1.World.Service.Consul"] {
            let said = dig(&format!("+short {name}"))?;
            ensure!(said.starts_with("240.240."), "{name}: {said:?}");
        }
        for name in ["world.service.consul", "_world._tcp.service.consul"] {
            let said = dig(&format!("+short SRV {name}"))?;
            let ports: Vec<_> = ["80", "8080"].map(|port| format!("0 0 {port} world.mesh.")).into();
            ensure!(ports.iter().all(|port| said.contains(port)), "{name}: {said:?}");
        }
        let said = dig("+short SRV _world._v2.service.consul")?;
        ensure!(said.contains("0 0 8080 world--tag-v2.mesh."), "{said:?}");
        let query = r#"{"Name": "anywhere", "Service": {"Service": "world"}}"#;
        mesh.host(0).run(&["curl", "-sS", "--fail", "-d", query, &format!("{url}/v1/query")])?;
        let asked = mesh.host(0).address();
        let said = dig(&format!("+short @{asked} anywhere.query.consul"))?;
        ensure!(said.contains(&mesh.host(1).address().to_string()), "{said:?}");
        let said = dig(&format!("+short @{asked} lab.node.consul"))?;
        ensure!(said.trim() == asked.to_string(), "{said:?}");
        let said = dig(&format!("+short @{asked} world.service.consul"))?;
        ensure!(said.starts_with("240.240."), "the mesh's own, whoever is asked: {said:?}");
        let said = dig(&format!("@{asked} nobody.service.consul"))?;
        ensure!(said.contains("NXDOMAIN") && said.contains("SOA"), "{said}");
        Ok(())
    });
    checks.run("what went to the other host went by a tunnel", || {
        let line = mesh.await_access(1, "a request from the other host", |line| line["direction"] == "inbound")?;
        ensure!(line.to_string().contains("spiffe://demo.mesh/ns/demo/sa/client"), "{line}");
        Ok(())
    });
    checks.run("status shows both", || {
        let status = mesh.document(0, &["status"])?;
        let sources = status["sources"].as_array().context("sources")?;
        let of = |name: &str| sources.iter().find(|it| it["name"].as_str().is_some_and(|it| it.starts_with(name)));
        let (asked, told) = (of("consul http").context("asked")?, of("consul registration").context("told")?);
        ensure!(asked["last_error"].is_null() && told["last_error"].is_null(), "{asked} {told}");
        ensure!(told["state"] == "1 instances of this host", "{told}");
        let metrics = mesh.host(0).run(&["curl", "-sS", "http://127.0.0.1:15020/metrics"])?;
        ensure!(metrics.contains("mesh_source_answer_age_seconds{source=\"consul http"), "{metrics}");
        ensure!(metrics.contains("mesh_registrations{registry=\"consul\"} 1"), "{metrics}");
        Ok(())
    });
    checks.run("`check` asks Consul", || {
        let said = mesh.ctl(0, &["check", "--config", "/etc/ecs-mesh/agent.toml"])?;
        ensure!(said.stdout.contains(&format!("{url} answers")), "{said:?}");
        Ok(())
    });
    checks.done()?;

    // Told to stop: the other host knows before the program has ended.
    let began = Instant::now();
    mesh.host(1).stop_task(&there.task)?;
    mesh.await_endpoints(0, "world", 2)?;
    figure("consul_stop_seen_elsewhere", began.elapsed().as_secs_f64(), "s");
    let answers: Vec<String> = (0..5).map(|_| get("world")).collect::<Result<_>>()?;
    ensure!(answers.iter().all(|it| it.trim() == "one"), "{answers:?}");

    // Without Consul everything stays as it was.
    server.kill();
    until(LIMIT, "the agent notices", || {
        let status = mesh.document(1, &["status"])?;
        let error = status["sources"].to_string();
        Ok(if error.contains("cannot reach Consul") { Ok(()) } else { Err(error) })
    })?;
    ensure!(get("world")?.trim() == "one");
    mesh.await_endpoints(1, "world", 2)?;

    // It comes back with nothing, and is told again.
    let (_server, _url) = consul(&mesh)?;
    until(LIMIT * 2, "the task is registered again", || {
        let found = mesh.host(0).exec(&["curl", "-sS", &format!("{url}/v1/health/service/world?passing=1")])?;
        Ok(if found.stdout.contains("ecs-mesh-identity") { Ok(()) } else { Err(found.stdout) })
    })?;
    mesh.await_endpoints(1, "world", 2)?;
    // An agent that is stopped takes its tasks with it.
    mesh.end(0, Signal::SIGTERM)?;
    let left = mesh.host(0).run(&["curl", "-sS", &format!("{url}/v1/agent/services")])?;
    ensure!(!left.contains("ecs-mesh:"), "{left}");
    mesh.down()
}
