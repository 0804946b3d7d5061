//! Ordinary clients in ordinary tasks: curl and redis-cli, by name.
//!
//! It must not know the agent beyond the kernel's own count of direct connections, which it reads to prove the short way.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_lab::Cluster;

use super::{
    agents::document,
    play::MARKER,
    show::{Show, ms},
    tasks::{Placed, Tasks},
};

/// `curl http://world/` from a task of each network mode.
///
/// # Errors
/// A request fails, or an endpoint never answers.
pub(super) fn call_world(cluster: &Cluster, tasks: &Tasks, show: &mut Show) -> Result<()> {
    show.step("The mesh is on: http://world/ from unmodified tasks of every network mode");
    let mut total: BTreeMap<String, usize> = BTreeMap::new();
    for (client, count) in [(&tasks.web, 12), (&tasks.host_client, 6), (&tasks.vpc_client, 6)] {
        show.typed(&format!("curl http://world/      ({count} times, in task {})", client.label));
        let begun = Instant::now();
        let answers = curl(cluster, client, "http://world/", count)?;
        let each = begun.elapsed() / u32::try_from(count)?;
        show.block(&counted(&answers));
        let known: usize = tasks.worlds.iter().filter_map(|world| answers.get(&world.answer())).sum();
        ensure!(known == count, "{} of {count} requests were not answered by `world`", count - known);
        show.proved(&format!("every request was answered ({} per curl)", ms(each)));
        for (answer, times) in answers {
            *total.entry(answer).or_default() += times;
        }
    }
    // Over all clients: the agent measures for all tasks of its host, and may spare the later ones a slow endpoint.
    for world in &tasks.worlds {
        ensure!(total.contains_key(&world.answer()), "{} never answered anybody: {total:?}", world.label);
    }
    show.proved(&format!("all {} endpoints, on both hosts, took part", tasks.worlds.len()));
    Ok(())
}

/// `redis-cli -h cache` on the host that has one, then without it.
///
/// # Errors
/// A command fails, or another redis answers than should.
pub(super) fn call_cache(cluster: &Cluster, tasks: &Tasks, show: &mut Show) -> Result<()> {
    show.step("A TCP service: cache:6379, directly on one host, through the mesh to the other");
    let host = tasks.web.on(cluster);
    let direct = || -> Result<u64> {
        document(host, &["status"])?["kernel"]["direct"].as_u64().context("the status counts direct connections")
    };
    let before = direct()?;
    let who = redis(cluster, tasks, show)?;
    ensure!(who == tasks.caches[0].answer(), "the cache of this host should answer, but {who:?} did");
    let went = direct()? - before;
    ensure!(went > 0, "the kernel took no connection to the cache of this host directly");
    show.proved(&format!(
        "the redis of this host answered; the kernel connected {went} times directly, no proxy between"
    ));

    show.note("stopping cache-1 on host 1 …");
    host.stop_task(&tasks.caches[0].task)?;
    let begun = Instant::now();
    let who = redis(cluster, tasks, show)?;
    ensure!(who == tasks.caches[1].answer(), "the cache of host 2 should answer, but {who:?} did");
    show.proved(&format!(
        "the redis of host 2 answered at once ({} for the session), through mutual TLS",
        ms(begun.elapsed())
    ));
    Ok(())
}

/// Counts what `count` new curls were answered; each carries the marker in a header.
pub(super) fn curl(cluster: &Cluster, client: &Placed, url: &str, count: usize) -> Result<BTreeMap<String, usize>> {
    // Fresh processes and connections, as an application of short-lived workers makes them.
    let script = format!(
        "for n in $(seq {count}); do curl -sS --max-time 5 -H 'X-Secret: {MARKER}' {url} 2>&1 || echo \"(curl ended with $?)\"; done"
    );
    let said = client.on(cluster).run_in(&client.task, &["sh", "-c", &script])?;
    let mut answers = BTreeMap::new();
    for line in said.lines() {
        *answers.entry(line.to_owned()).or_default() += 1;
    }
    Ok(answers)
}

/// Answers and how often each came, one per line.
pub(super) fn counted(answers: &BTreeMap<String, usize>) -> String {
    let lines = answers.iter().map(|(answer, times)| format!("{times:>2} × {answer}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// One session that writes, reads back, and asks who it is talking to.
fn redis(cluster: &Cluster, tasks: &Tasks, show: &Show) -> Result<String> {
    let commands = format!("SET greeting {MARKER}\\nGET greeting\\nGET who\\n");
    show.typed("redis-cli -h cache      (SET greeting …, GET greeting, GET who; in task web)");
    let script = format!("printf '{commands}' | timeout 10 redis-cli -h cache");
    let said = tasks.web.on(cluster).run_in(&tasks.web.task, &["sh", "-c", &script])?;
    show.block(&said);
    let lines: Vec<&str> = said.lines().collect();
    let [ok, greeting, who] = lines[..] else { anyhow::bail!("redis-cli said {said:?}") };
    ensure!(ok == "OK" && greeting == MARKER, "redis gave back another text: {said:?}");
    Ok(who.to_owned())
}
