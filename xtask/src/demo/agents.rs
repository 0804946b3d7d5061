//! One agent per host, installed and configured as the user-data script does it.
//!
//! It must not know what the tasks are.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_lab::{Cluster, Host, Output, Process};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{
    show::{Show, ms, until},
    tasks::Tasks,
};

pub(super) const TRUST_DOMAIN: &str = "demo.mesh";
const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// The agents, in the order of the hosts.
#[derive(Debug)]
pub(super) struct Agents {
    running: Vec<Process>,
}

impl Agents {
    /// Makes a CA on host 1, copies it to host 2, writes the configuration and starts both agents.
    pub(super) fn start(cluster: &Cluster, program: &std::path::Path, tasks: &Tasks, show: &Show) -> Result<Self> {
        for host in cluster.hosts() {
            host.install(program, "mesh-agent")?;
        }
        let [first, others @ ..] = cluster.hosts() else { anyhow::bail!("a cluster has hosts") };
        let init = ["mesh-agent", "ca", "init", "--trust-domain", TRUST_DOMAIN, "--out", "/etc/ecs-mesh"];
        show.typed(&format!("{}      (once, on host 1)", init.join(" ")));
        show.block(&first.run(&init)?);
        for other in others {
            let (from, to) = (first.dir().join("etc/ecs-mesh"), other.dir().join("etc"));
            mesh_lab::run(Command::new("cp").arg("-a").arg(from).arg(to)).context("cannot copy the CA to host 2")?;
        }
        show.note("both files copied to host 2; the join token opens the CA bundle there");
        let mut agents = Self { running: Vec::new() };
        let begun = Instant::now();
        for (index, host) in cluster.hosts().iter().enumerate() {
            host.write_etc("ecs-mesh/services.toml", &tasks.services_file(cluster, index)?)?;
            host.write_etc("ecs-mesh/agent.toml", &configuration(&format!("eu-west-1{}", host.name())))?;
            agents.running.push(launch(host)?);
        }
        show.typed("mesh-agent run --config /etc/ecs-mesh/agent.toml      (on each host)");
        for host in cluster.hosts() {
            await_ready(host, &agents)?;
        }
        show.proved(&format!("both agents are ready after {}", ms(begun.elapsed())));
        Ok(agents)
    }

    /// Ends the agent of a host without warning.
    pub(super) fn crash(&mut self, host: usize) -> Result<()> {
        self.running[host].signal(Signal::SIGKILL)?;
        self.running[host].wait(STOP_LIMIT).map(drop)
    }

    /// Starts it again.
    pub(super) fn restart(&mut self, cluster: &Cluster, host: usize) -> Result<()> {
        self.running[host] = launch(&cluster.hosts()[host])?;
        Ok(())
    }

    /// Ends all as `systemctl stop` does; each must end well.
    pub(super) fn stop(&mut self) -> Result<()> {
        for agent in &self.running {
            agent.signal(Signal::SIGTERM)?;
        }
        for agent in &mut self.running {
            let status = agent.wait(STOP_LIMIT)?;
            ensure!(status.success(), "the agent ended with {status} when asked to stop: {}", agent.last_words());
        }
        Ok(())
    }

    /// What the agent of a host has written so far.
    pub(super) fn log(&self, host: usize) -> Result<String> {
        let path = self.running[host].log();
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The last lines of each agent's log, for error messages.
    pub(super) fn last_words(&self) -> Vec<String> {
        let logs = self.running.iter().map(|agent| fs::read_to_string(agent.log()).unwrap_or_default());
        // Access lines have no level; there are many.
        let last = |log: String| {
            let lines: Vec<&str> =
                log.lines().filter(|line| !line.starts_with('{') || line.contains("\"level\"")).collect();
            lines[lines.len().saturating_sub(12)..].join("\n")
        };
        logs.map(last).collect()
    }
}

/// A command of the CLI on a host.
pub(super) fn ctl(host: &Host, arguments: &[&str]) -> Result<Output> {
    host.exec(&[&["mesh-agent"], arguments].concat())
}

/// A document of the CLI on a host.
pub(super) fn document(host: &Host, arguments: &[&str]) -> Result<Value> {
    let said = ctl(host, &[arguments, &["--json"]].concat())?;
    serde_json::from_str(&said.stdout).with_context(|| format!("mesh-agent {arguments:?} said {said:?}"))
}

fn launch(host: &Host) -> Result<Process> {
    host.spawn("mesh-agent", &["mesh-agent", "run", "--config", "/etc/ecs-mesh/agent.toml"])
}

/// Waits until the agent says that it is ready and every task that it enrolled is armed.
pub(super) fn await_ready(host: &Host, agents: &Agents) -> Result<()> {
    let waited = until(START_LIMIT, &format!("the agent of host {} is ready", host.name()), || {
        let said = ctl(host, &["status", "--json"])?;
        let Ok(status) = serde_json::from_str::<Value>(&said.stdout) else { return Ok(Err(said.stderr)) };
        let tasks = status["tasks"].as_array();
        let armed = tasks.is_some_and(|all| !all.is_empty() && all.iter().all(|task| task["armed"] == true));
        Ok(if status["ready"] == true && armed { Ok(()) } else { Err(said.stdout) })
    });
    waited.with_context(|| format!("logs:\n{}", agents.last_words().join("\n--\n")))
}

/// What `deploy/user-data.sh` writes, in the same words.
fn configuration(zone: &str) -> String {
    format!(
        r#"# Written by the instance's user data.
[host]
cluster = "demo"
zone = "{zone}"

[identity]
trust_domain = "{TRUST_DOMAIN}"
ca_bundle = "/etc/ecs-mesh/ca-bundle.pem"
join_token_file = "/etc/ecs-mesh/join-token"

[services]
file = "/etc/ecs-mesh/services.toml"
"#
    )
}
