//! All endpoints of a service are replaced one by one, as ECS does in a deployment, while requests come: none fails.
//!
//! `cargo xtask bench freshness` does the same for longer, and times it.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_lab::TaskSpec;
use mesh_tests::{
    mesh::{Mesh, Placed},
    tier::{Tier, figure, require},
    until::until,
};

use super::two_hosts::consul;

const LIMIT: Duration = Duration::from_secs(20);
const RATE: u32 = 300;
const SECONDS: u32 = 12;

#[test]
fn replacing_all_endpoints_under_load_fails_no_request() -> Result<()> {
    if !require(Tier::Consul) || !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let (_server, url) = consul(&mesh)?;
    for host in [0, 1] {
        let more =
            format!("[discovery.consul]\naddress = \"{url}\"\n[discovery.consul.registration]\nenabled = true\n");
        mesh.configure(host, &more)?;
    }
    let client = mesh.task(0, mesh.idle("client"))?;
    mesh.start()?;
    // The one closes its listener at once and finishes what is under way; the other is told to by SIGQUIT.
    roll(&mesh, &client, "abrupt", |mesh| {
        mesh.spec("abrupt", &["peer", "serve", "8080", "well", "abrupt"]).port(8080)
    })?;
    roll(&mesh, &client, "nginx", |mesh| mesh.nginx("nginx", "well", 8080).stop_signal("SIGQUIT"))?;
    mesh.down()
}

fn roll(mesh: &Mesh, client: &Placed, name: &str, spec: impl Fn(&Mesh) -> TaskSpec) -> Result<()> {
    let run = |host: usize| -> Result<Placed> {
        let placed = mesh.task(host, spec(mesh))?;
        await_ready(mesh, name, &placed)?;
        Ok(placed)
    };
    let mut endpoints = [run(0)?, run(1)?, run(1)?];
    let (to, rate, seconds) = (format!("{name}:80"), RATE.to_string(), SECONDS.to_string());
    let mut load = mesh.host(0).command_in(&client.task, &["peer", "load", &to, &rate, &seconds])?;
    let load = thread::spawn(move || mesh_lab::output(&mut load));
    for endpoint in &mut endpoints {
        let new = run(endpoint.host)?;
        let old = std::mem::replace(endpoint, new);
        ensure!(!load.is_finished(), "the load ended before everything was replaced");
        mesh.host(old.host).docker(&["stop", "--time=10", &old.task.container])?;
        mesh.host(old.host).stop_task(&old.task)?;
    }
    ensure!(!load.is_finished(), "the load ended before everything was replaced");
    let said = load.join().unwrap_or_else(|_panic| anyhow::bail!("it panicked"))?;
    let numbers = said.stdout.lines().next().unwrap_or_default();
    let numbers: Vec<f64> = numbers.split(' ').filter_map(|number| number.parse().ok()).collect();
    let [answered, failed, posts, _, p99, longest] = numbers[..] else { anyhow::bail!("{said:?}") };
    figure(&format!("rolling_{name}_requests"), answered, "requests");
    figure(&format!("rolling_{name}_p99"), p99, "ms");
    figure(&format!("rolling_{name}_max"), longest, "ms");
    ensure!(answered + failed >= f64::from(RATE * SECONDS) * 0.9, "too few requests: {said:?}");
    // Of a POST the server may have done what it asks for, so it is not sent again (docs/discovery.md).
    ensure!(failed == posts, "requests failed: {}", said.stdout);
    figure(&format!("rolling_{name}_failed_posts"), posts, "requests");
    ensure!(posts <= 3.0, "more than a chance encounter: {}", said.stdout);
    for endpoint in endpoints {
        mesh.host(endpoint.host).stop_task(&endpoint.task)?;
    }
    Ok(())
}

/// Waits until the client's agent would send requests there.
fn await_ready(mesh: &Mesh, name: &str, placed: &Placed) -> Result<()> {
    let at = placed.task.published(8080).context("it is published")?.to_string();
    until(LIMIT, &format!("host 0 lists {at} of {name} as healthy"), || {
        let endpoints = mesh.endpoints(0, name)?;
        let found = endpoints.iter().any(|it| it["health"] == "healthy" && it.to_string().contains(&at));
        Ok(if found { Ok(()) } else { Err(format!("{endpoints:?}")) })
    })
}
