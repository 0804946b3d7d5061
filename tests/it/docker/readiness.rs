//! Tasks that are not ready yet, or not any more: nobody is sent there, and one that stays ill is stopped.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    mesh::{LIMIT, Mesh, Placed},
    tier::{Tier, figure, require},
    until::{Checks, until},
};
use nix::sys::signal::Signal;

#[test]
fn nobody_is_sent_to_a_task_that_is_not_ready() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    mesh.start()?;
    let client = mesh.task(0, mesh.idle("client"))?;
    let well = mesh.task(0, mesh.nginx("web", "well", 8080))?;
    await_health(&mesh, &well, "healthy")?;
    let mut checks = Checks::default();

    checks.run("a port that opens late is called from then on, and no request fails", || {
        let late = "sleep 2; exec peer serve 8080 late abrupt";
        let placed = mesh.task(0, mesh.spec("web", &["sh", "-c", late]).port(8080))?;
        await_health(&mesh, &placed, "unhealthy")?;
        let script = "for n in $(seq 400); do curl -sS --max-time 5 http://web/ 2>&1; echo; sleep 0.01; done";
        let said = mesh.run(&client, &["sh", "-c", script])?;
        let answers: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
        ensure!(answers.iter().all(|answer| ["well", "late"].contains(answer)), "{said}");
        ensure!(answers.first() == Some(&"well") && answers.contains(&"late"), "{said}");
        mesh.host(0).stop_task(&placed.task)
    });
    let spec = mesh
        .spec("web", &["peer", "serve", "8080", "ill", "abrupt"])
        .port(8080)
        .label("ecs-mesh.ready", "http")
        .label("ecs-mesh.ready.path", "/healthz")
        .label("ecs-mesh.ready.interval", "100ms")
        .label("ecs-mesh.ready.failures", "2")
        .label("ecs-mesh.stop-unhealthy-after", "10s");
    let ill = mesh.task(0, spec)?;
    checks.run("a task that says it is ill is withdrawn, and comes back", || {
        await_health(&mesh, &ill, "healthy")?;
        for health in ["unhealthy", "healthy"] {
            let began = Instant::now();
            mesh.host(0).docker(&["kill", "--signal=USR1", &ill.task.container])?;
            await_health(&mesh, &ill, health)?;
            let status = mesh.document(0, &["status"])?.to_string();
            let reason = "it was ready: GET /healthz was answered";
            ensure!(status.contains(reason) == (health == "unhealthy"), "{health}: {status}");
            figure(&format!("readiness_{health}_known"), began.elapsed().as_secs_f64() * 1e3, "ms");
        }
        Ok(())
    });
    checks.run("a new agent takes nobody out of service", || {
        mesh.end(0, Signal::SIGTERM)?;
        mesh.launch(0)?;
        mesh.await_ready(0)?;
        // Asked as soon as the agent answers at all.
        ensure!(
            health(&mesh, &well)? == "healthy" && health(&mesh, &ill)? == "healthy",
            "{:?}",
            mesh.endpoints(0, "web")
        );
        Ok(())
    });
    checks.run("one that stays ill is stopped while another serves", || {
        let began = Instant::now();
        mesh.host(0).docker(&["kill", "--signal=USR1", &ill.task.container])?;
        mesh.host(0).docker(&["wait", &ill.task.container])?;
        let after = began.elapsed();
        ensure!(after > Duration::from_secs(10), "stopped after {after:?}");
        let log = mesh.log(0)?;
        ensure!(log.contains("a task has been unhealthy for too long"), "{}", mesh.last_words(0));
        mesh.host(0).stop_task(&ill.task)
    });
    mesh.host(0).stop_task(&well.task)?;
    mesh.down()?;
    checks.done()
}

/// What the agent says of the task's endpoint.
fn health(mesh: &Mesh, placed: &Placed) -> Result<String> {
    let at = placed.task.published(8080).context("it is published")?.to_string();
    let endpoints = mesh.endpoints(placed.host, "web")?;
    let found = endpoints.iter().find(|it| it.to_string().contains(&at));
    Ok(found.and_then(|it| it["health"].as_str()).unwrap_or("not listed").to_owned())
}

fn await_health(mesh: &Mesh, placed: &Placed, wanted: &str) -> Result<()> {
    until(LIMIT, &format!("the task is {wanted}"), || {
        let is = health(mesh, placed)?;
        Ok(if is == wanted { Ok(()) } else { Err(is) })
    })
}
