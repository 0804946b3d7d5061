//! Changes while tasks run: a new service appears, and the agent dies and comes back.
//!
//! It must not know how the agent does it.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_lab::{Cluster, Image};

use super::{
    agents::{Agents, document},
    clients::{counted, curl},
    show::{Show, ms, until},
    tasks::{Tasks, http_server},
};

/// A task of a service that nobody has heard of starts while another calls it all the time.
///
/// # Errors
/// It is not reached within ten seconds.
pub(super) fn start_fresh(cluster: &Cluster, tasks: &Tasks, image: &Image, show: &mut Show) -> Result<()> {
    show.step("A new service, reached by name from a task that was running before it");
    let web = &tasks.web;
    let host = web.on(cluster);
    show.typed("until curl -sf http://fresh/; do :; done      (in task web, before there is any `fresh`)");
    let script =
        "end=$(($(date +%s) + 20)); until curl -sf --max-time 1 http://fresh/ || [ $(date +%s) -gt $end ]; do :; done";
    let mut looping = host.command_in(&web.task, &["sh", "-c", script])?;
    let mut looping =
        looping.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("cannot start docker exec")?;
    let said = looping.stdout.take().context("the output is piped")?;

    show.typed("docker run … fresh      (on host 1, as the ECS agent does)");
    let task = host.run_task(&http_server("fresh", "fresh-1", web.host, image, 80))?;
    let mut answer = String::new();
    BufReader::new(said).read_line(&mut answer).context("cannot read what the loop says")?;
    let reached = Instant::now();
    looping.wait().context("cannot wait for the loop")?;
    ensure!(answer.starts_with("fresh from fresh-1"), "the running task did not reach the new service: {answer:?}");
    show.block(answer.trim());
    show.proved(&format!(
        "reachable by name {} after `docker run` was asked, {} after it returned; nothing was restarted or configured",
        ms(reached.duration_since(task.asked)),
        ms(reached.saturating_duration_since(task.started)),
    ));
    host.stop_task(&task)
}

/// The agent of host 1 is killed and started again.
///
/// # Errors
/// Tasks notice more than was configured.
pub(super) fn crash_agent(cluster: &Cluster, tasks: &Tasks, agents: &mut Agents, show: &mut Show) -> Result<()> {
    show.step("The agent of host 1 dies: world is configured to fail open, cache to fail closed");
    let web = &tasks.web;
    let host = web.on(cluster);
    let services = document(host, &["services"])?;
    let vip = |name: &str| -> Result<String> {
        let all = services["services"].as_array().context("the agent lists services")?;
        let service = all.iter().find(|each| each["name"] == name);
        let vip = service.and_then(|each| each["vip4"].as_str());
        vip.map(str::to_owned).with_context(|| format!("the agent lists no {name}"))
    };
    let (world, cache) = (vip("world")?, vip("cache")?);

    show.typed("kill -9 <mesh-agent>      (on host 1)");
    agents.crash(0)?;
    let begun = Instant::now();
    show.typed(&format!("curl http://world/      (8 times, in task web, which knows that world is {world})"));
    let answers = curl(cluster, web, &format!("--resolve world:80:{world} http://world/"), 8)?;
    show.block(&counted(&answers));
    let good: usize = tasks.worlds.iter().filter_map(|each| answers.get(&each.answer())).sum();
    ensure!(good == 8, "with the agent dead, {} of 8 new connections failed", 8 - good);
    show.proved(&format!("all 8 new connections answered, the kernel balances alone ({} in all)", ms(begun.elapsed())));

    let begun = Instant::now();
    show.typed("redis-cli -h cache PING      (in task web)");
    let refused = host.exec_in(&web.task, &["timeout", "5", "redis-cli", "-h", &cache, "PING"])?;
    show.block(format!("{}{}", refused.stdout, refused.stderr).trim());
    ensure!(!refused.stdout.contains("PONG"), "cache must not be reached without mutual TLS, but was");
    ensure!(begun.elapsed() < Duration::from_secs(4), "the refusal took {:?}: it should come at once", begun.elapsed());
    show.proved(&format!("cache refused at once ({}), no byte left the host in clear", ms(begun.elapsed())));

    show.typed("mesh-agent run --config /etc/ecs-mesh/agent.toml      (on host 1 again)");
    let begun = Instant::now();
    agents.restart(cluster, 0)?;
    let both = "curl -sf --max-time 2 http://world/ && timeout 2 redis-cli -h cache PING | grep PONG";
    let back = until(Duration::from_secs(20), "the restarted agent serves", || {
        let said = host.exec_in(&web.task, &["sh", "-c", both])?;
        Ok(if said.ok() { Ok(said.stdout) } else { Err(format!("{}{}", said.stdout, said.stderr)) })
    });
    let back =
        back.with_context(|| format!("its log:\n{}", agents.last_words().first().cloned().unwrap_or_default()))?;
    show.block(back.trim());
    show.proved(&format!("world and cache by name again {} after the start", ms(begun.elapsed())));
    Ok(())
}
