//! Our own subject: an agent on each host of the meshed pair, configured as an operator would.
//!
//! It knows how an agent is installed, configured and asked. It must not know what is measured.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_lab::{Host, Process};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::topology::{BULK, ECHO, FAR, HTTP, HTTP_AS_BYTES, HTTP2, HTTP2_AS_BYTES, NEAR, Seat, Topology};

const TRUST_DOMAIN: &str = "bench.mesh";
const LIMIT: Duration = Duration::from_secs(20);
/// Where tunnels end.
pub const TUNNELS: u16 = 15008;

/// Ports of both services, and what is said of them.
const PORTS: [(u16, &str); 6] =
    [(HTTP, "http"), (HTTP_AS_BYTES, "tcp"), (HTTP2, "http"), (HTTP2_AS_BYTES, "tcp"), (BULK, "tcp"), (ECHO, "tcp")];

/// The two agents.
#[derive(Debug)]
pub struct Agents {
    running: Vec<Process>,
}

impl Agents {
    /// Installs, configures and starts both, and waits until each knows every endpoint.
    ///
    /// # Errors
    /// One is not ready in time.
    pub fn start(topology: &Topology, program: &Path) -> Result<Self> {
        let hosts = &topology.cluster.hosts()[..2];
        for host in hosts {
            host.install(program, "mesh-agent")?;
        }
        let init = ["mesh-agent", "ca", "init", "--trust-domain", TRUST_DOMAIN, "--out", "/etc/ecs-mesh"];
        hosts[0].run(&init)?;
        let ca = hosts[0].dir().join("etc/ecs-mesh");
        mesh_lab::run(Command::new("cp").arg("-a").arg(ca).arg(hosts[1].dir().join("etc")))?;
        let mut running = Vec::new();
        for host in hosts {
            host.write_etc("ecs-mesh/agent.toml", &configuration())?;
            host.write_etc("ecs-mesh/services.toml", &services(topology, host)?)?;
            running.push(launch(host)?);
        }
        for (host, process) in hosts.iter().zip(&running) {
            await_ready(topology, host, process)?;
        }
        Ok(Self { running })
    }

    /// Their processes.
    ///
    /// # Errors
    /// One has ended.
    pub fn pids(&self) -> Result<BTreeSet<u32>> {
        self.running.iter().map(Process::pid).collect()
    }

    /// Ends both, and starts that of the first host alone again, without any traffic in its life; it has `tasks` in all.
    ///
    /// # Errors
    /// It is not ready in time, or has another number of tasks.
    pub fn restart_first(self, topology: &Topology, tasks: usize) -> Result<Self> {
        self.stop()?;
        let host = &topology.cluster.hosts()[0];
        let process = launch(host)?;
        await_ready(topology, host, &process)?;
        let known = ask(host, "status")?["tasks"].as_array().map_or(0, Vec::len);
        ensure!(known == tasks, "the agent knows {known} tasks, not {tasks}");
        Ok(Self { running: vec![process] })
    }

    /// Ends both as `systemctl stop` does.
    ///
    /// # Errors
    /// One does not end well.
    pub fn stop(mut self) -> Result<()> {
        for agent in &self.running {
            agent.signal(Signal::SIGTERM)?;
        }
        for agent in &mut self.running {
            let status = agent.wait(LIMIT)?;
            ensure!(status.success(), "the agent ended with {status}: {}", agent.last_words());
        }
        Ok(())
    }
}

fn launch(host: &Host) -> Result<Process> {
    host.spawn("mesh-agent", &["mesh-agent", "run", "--config", "/etc/ecs-mesh/agent.toml"])
}

/// As the user-data script writes it, but for the access log: the proxies beside it write none either.
fn configuration() -> String {
    format!(
        "[host]\ncluster = \"bench\"\nzone = \"z\"\n\n\
         [identity]\ntrust_domain = \"{TRUST_DOMAIN}\"\nca_bundle = \"/etc/ecs-mesh/ca-bundle.pem\"\n\
         join_token_file = \"/etc/ecs-mesh/join-token\"\n\n[services]\nfile = \"/etc/ecs-mesh/services.toml\"\n\n\
         [log]\naccess = false\n"
    )
}

/// The services that a host's agent has to know: the second host calls nobody.
fn known(topology: &Topology, host: &Host) -> &'static [&'static str] {
    if host.name() == topology.cluster.hosts()[0].name() { &[NEAR, FAR] } else { &[FAR] }
}

/// What one host is told: the ports of its services, and the endpoints that are not its own.
fn services(topology: &Topology, host: &Host) -> Result<String> {
    let pair = &topology.meshed;
    let mut text = String::new();
    for &name in known(topology, host) {
        let seat = if name == NEAR { Seat::Near } else { Seat::Far };
        writeln!(text, "[[service]]\nname = \"{name}\"\nports = [")?;
        for (port, protocol) in PORTS {
            writeln!(text, "  {{ port = {port}, protocol = \"{protocol}\" }},")?;
        }
        writeln!(text, "]")?;
        if pair.host(&topology.cluster, seat).name() != host.name() {
            let address = pair.address(seat);
            for (port, _) in PORTS {
                writeln!(text, "[[service.endpoint]]\naddress = \"{address}:{port}\"\nport = {port}")?;
                writeln!(text, "agent = \"{address}:{TUNNELS}\"")?;
            }
        }
    }
    Ok(text)
}

/// Until the agent is ready, every task is armed, and each service port has its endpoint.
fn await_ready(topology: &Topology, host: &Host, process: &Process) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let ready = ask(host, "status").is_ok_and(|status| {
            let tasks = status["tasks"].as_array();
            status["ready"] == true && tasks.is_some_and(|all| all.iter().all(|task| task["armed"] == true))
        });
        let services = ask(host, "services").unwrap_or_default();
        if ready && known(topology, host).iter().all(|name| endpoints(&services, name) == PORTS.len()) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the agent of host {} is not ready: {services}\n{}", host.name(), process.last_words());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn endpoints(services: &Value, name: &str) -> usize {
    let service = services["services"].as_array().and_then(|all| all.iter().find(|one| one["name"] == name));
    let ports = service.and_then(|service| service["ports"].as_array()).into_iter().flatten();
    ports.map(|port| port["endpoints"].as_array().map_or(0, Vec::len)).sum()
}

fn ask(host: &Host, what: &str) -> Result<Value> {
    let said = host.exec(&["mesh-agent", what, "--json"])?;
    serde_json::from_str(&said.stdout).with_context(|| format!("mesh-agent {what} said {said:?}"))
}
