//! Bad input and faults: garbage, port clashes, wrong files, missing rights, a killed agent, an absent Docker. The mesh
//! says what is wrong, attaches nothing it cannot serve, and comes back by itself.

use std::{thread, time::Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    mesh::{LIMIT, Mesh, Placed, Service, configuration},
    tier::{Tier, figure, require},
    until::{Checks, until},
};
use nix::sys::signal::Signal;

const PINS: &str = "/sys/fs/bpf/ecs-mesh";

#[test]
fn a_start_that_cannot_succeed_says_why_and_attaches_nothing() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let mut checks = Checks::default();
    checks.run("a malformed configuration names every fault and ends with 2", || {
        let faulty = configuration("[dns]\nttl = \"soon\"\nsufixes = []\n[proxy]\noutbound_port = 99999\n[nonsense]\n");
        mesh.host(0).write_etc("ecs-mesh/agent.toml", &faulty)?;
        let said = start(&mesh, &[])?;
        ensure!(said.code == Some(2), "{said:?}");
        for fault in ["dns.ttl", "dns.sufixes", "suffixes", "proxy.outbound_port", "nonsense"] {
            ensure!(said.stderr.contains(fault), "{fault} is not named: {}", said.stderr);
        }
        mesh.configure(0, "")?;
        nothing_is_attached(&mesh)
    });
    for port in ["15008", "15020"] {
        checks.run(&format!("a taken port {port} is named"), || {
            let _taker = mesh.host(0).spawn("taker", &["peer", "hangs", port])?;
            until(LIMIT, "the port is taken", || {
                let listening = mesh.host(0).run(&["ss", "-Hltn"])?;
                Ok(if listening.contains(&format!(":{port} ")) { Ok(()) } else { Err(listening) })
            })?;
            let said = start(&mesh, &[])?;
            ensure!(said.code == Some(1) && said.stderr.contains(port), "{said:?}");
            nothing_is_attached(&mesh)
        });
    }
    for (lacks, drop) in [("CAP_NET_ADMIN", "-net_admin"), ("CAP_SYS_ADMIN", "-sys_admin")] {
        checks.run(&format!("without {lacks} it says so"), || {
            let bounding = format!("--bounding-set={drop}");
            let said = start(&mesh, &["setpriv", &format!("--inh-caps={drop}"), &bounding])?;
            ensure!(said.code == Some(1), "{said:?}");
            ensure!(said.stderr.contains(lacks), "{lacks} is not named: {}", said.stderr);
            nothing_is_attached(&mesh)
        });
    }
    checks.run("without the files of the CA it says so", || {
        mesh.host(0).run(&["mv", "/etc/ecs-mesh/join-token", "/etc/ecs-mesh/elsewhere"])?;
        let said = start(&mesh, &[])?;
        ensure!(said.code != Some(0) && said.stderr.contains("join-token"), "{said:?}");
        nothing_is_attached(&mesh)?;
        mesh.host(0).run(&["mv", "/etc/ecs-mesh/elsewhere", "/etc/ecs-mesh/join-token"]).map(drop)
    });
    checks.run("a second agent of one host is refused, the first goes on", || {
        mesh.launch(0)?;
        mesh.await_ready(0)?;
        ensure!(nothing_is_attached(&mesh).is_err(), "this check would not see a program that is left");
        let said = start(&mesh, &[])?;
        ensure!(said.code == Some(1), "{said:?}");
        mesh.await_ready(0)
    });
    mesh.down()?;
    checks.done()
}

#[test]
fn a_running_mesh_survives_faults() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let client = mesh.task(0, mesh.idle("client"))?;
    let world = mesh.task(1, mesh.nginx("world", "world", 8080))?;
    mesh.services(&[Service::new("world", 80, 8080, "http").at(&world)], "")?;
    mesh.start()?;
    mesh.await_endpoints(0, "world", 1)?;
    let mut checks = Checks::default();
    checks.run("garbage on any listener ends that connection only", || {
        served(&mesh, &client)?;
        for to in ["127.0.0.1 15001", "127.0.0.1 15053", "world 80", "10.90.1.10 15008", "10.90.1.11 15008"] {
            let script = format!("for n in 1 2 3; do head -c 70000 /dev/urandom | timeout 5 nc -w 1 {to} >/dev/null 2>&1; done; true");
            mesh.run(&client, &["sh", "-c", &script])?;
            let script = format!("head -c 900 /dev/urandom | timeout 2 nc -u -w 1 {to} >/dev/null 2>&1; true");
            mesh.run(&client, &["sh", "-c", &script])?;
        }
        let script = "head -c 70000 /dev/urandom | timeout 5 busybox nc -w 1 127.0.0.1 15020 >/dev/null 2>&1; \
            head -c 70000 /dev/urandom | timeout 5 busybox nc -w 1 local:/run/ecs-mesh/admin.sock >/dev/null 2>&1; true";
        mesh.host(0).run(&["sh", "-c", script])?;
        served(&mesh, &client)?;
        [0, 1].into_iter().try_for_each(|host| mesh.await_ready(host))?;
        ensure!(!mesh.log(0)?.contains("panicked") && !mesh.log(1)?.contains("panicked"), "an agent panicked");
        Ok(())
    });
    checks.run("a killed agent's tasks stay connected, and the next agent takes over at once", || {
        let began = Instant::now();
        mesh.end(0, Signal::SIGKILL)?;
        ensure!(!pins(&mesh)?.is_empty(), "the killed agent should have left its programs");
        let direct = world.task.published(8080).context("published")?;
        let said = mesh.run(&client, &["curl", "-sS", "--max-time", "5", &format!("http://{direct}/")])?;
        ensure!(said.trim() == "world", "{said:?}");
        let down = began.elapsed();
        let began = Instant::now();
        mesh.launch(0)?;
        until(LIMIT, "names are served again", || {
            let said = mesh.exec(&client, &["curl", "-sS", "--max-time", "2", "http://world/"])?;
            Ok(if said.stdout.trim() == "world" { Ok(()) } else { Err(format!("{said:?}; {}", mesh.last_words(0))) })
        })?;
        figure("restart_until_served", began.elapsed().as_secs_f64() * 1000.0, "ms");
        figure("killed_and_away", down.as_secs_f64() * 1000.0, "ms");
        mesh.await_ready(0)?;
        ensure!(mesh.log(0)?.contains("\"adopted\":true"), "{}", mesh.last_words(0));
        (0..10).try_for_each(|_| served(&mesh, &client))
    });
    checks.run("docker away for some seconds changes nothing, and tasks of afterwards are enrolled", || {
        // Only the daemon is stopped; its containers go on, as on a host whose docker.service restarts.
        let pid = mesh.host(0).run(&["sh", "-c", "pidof dockerd"])?;
        mesh.host(0).run(&["kill", "-STOP", &pid])?;
        let began = Instant::now();
        let direct = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(std::time::Duration::from_secs(3));
                mesh.host(0).run(&["kill", "-CONT", &pid]).map(drop)
            });
            // `docker exec` needs the daemon, so this waits for it.
            mesh.run(&client, &["curl", "-sS", "--max-time", "5", "http://world/"])
        })?;
        ensure!(direct.trim() == "world" && began.elapsed().as_secs() >= 2, "{direct:?}");
        let late = mesh.task(0, mesh.spec("late", &["curl", "-sS", "--max-time", "10", "http://world/"]))?;
        mesh.host(0).docker(&["wait", &late.task.container])?;
        let said = mesh.said(&late)?;
        ensure!(said.trim() == "world", "{said:?}");
        mesh.host(0).stop_task(&late.task)
    });
    checks.run("an asked-for stop leaves no trace, and running tasks work without the mesh", || {
        mesh.end(0, Signal::SIGTERM)?;
        nothing_is_attached(&mesh)?;
        let sockets = mesh.host(0).run(&["sh", "-c", "ls /run/ecs-mesh 2>/dev/null || true"])?;
        ensure!(!sockets.contains("admin.sock"), "{sockets}");
        let listeners = mesh.run(&client, &["netstat", "-ltnu"])?;
        ensure!(!listeners.contains(":15001") && !listeners.contains(":15053"), "{listeners}");
        let on_host = mesh.host(0).run(&["ss", "-Hltn"])?;
        ensure!(!on_host.contains(":15008") && !on_host.contains(":15020"), "{on_host}");
        let direct = world.task.published(8080).context("published")?;
        let said = mesh.run(&client, &["curl", "-sS", "--max-time", "5", &format!("http://{direct}/")])?;
        ensure!(said.trim() == "world", "{said:?}");
        let name = mesh.exec(&client, &["dig", "+tries=1", "+time=3", "elsewhere.example"])?;
        ensure!(name.stdout.contains("10.90.0.9"), "{name:?}");
        Ok(())
    });
    mesh.down()?;
    checks.done()
}

fn served(mesh: &Mesh, client: &Placed) -> Result<()> {
    let said = mesh.exec(client, &["curl", "-sS", "--max-time", "5", "http://world/"])?;
    ensure!(said.stdout.trim() == "world", "{said:?}");
    Ok(())
}

/// Runs an agent on host 1 that is expected to end by itself.
/// An agent that finds another one waits for its drain and ten seconds more.
fn start(mesh: &Mesh, wrapper: &[&str]) -> Result<mesh_lab::Output> {
    let run = ["timeout", "--signal=KILL", "40", "mesh-agent", "run", "--config", "/etc/ecs-mesh/agent.toml"];
    mesh.host(0).exec(&[wrapper, &run].concat())
}

fn pins(mesh: &Mesh) -> Result<String> {
    mesh.host(0).run(&["sh", "-c", &format!("ls -R {PINS} 2>/dev/null || true")])
}

fn nothing_is_attached(mesh: &Mesh) -> Result<()> {
    let pins = pins(mesh)?;
    ensure!(pins.is_empty(), "pins are left: {pins}");
    let attached = mesh.host(0).run(&["bpftool", "cgroup", "tree", "/sys/fs/cgroup"])?;
    let programs = attached.lines().filter(|line| line.contains("mesh") || line.contains("connect4")).count();
    ensure!(programs == 0, "programs are attached: {attached}");
    Ok(())
}
