//! The play: every step in order, and the curtain.
//!
//! It must not know how a step does what it does; each is one call.

use std::{path::Path, thread};

use anyhow::{Context as _, Result, ensure};
use mesh_lab::{Cluster, Image};

use super::{
    Part,
    agents::Agents,
    clients, faults, plain, proof,
    show::Show,
    tasks::{HTTP, Tasks},
};

/// A text that the requests carry and that nobody on the network should read.
pub(super) const MARKER: &str = "the-merger-is-on-friday";

/// Plays up to `part`, removes everything, and proves it. `false`: something is not as promised, and it has been said.
///
/// # Errors
/// The hosts cannot be made, or something of them is left.
pub(super) fn play(agent: Option<&Path>, part: Part, no_docker: bool, keep: bool) -> Result<bool> {
    let mut show = Show::new();
    show.step("Two ECS hosts on one network");
    let cluster = hosts(no_docker, &show)?;
    let mut agents = None;
    let played = scenes(&cluster, agent, part, &mut agents, &mut show);
    if let Err(error) = &played {
        println!("\nStep {} failed: {error:#}\n", show.number());
        for (host, words) in agents.iter().flat_map(Agents::last_words).enumerate() {
            println!("Last words of the agent of host {}:\n{words}\n", host + 1);
        }
    }
    if keep {
        wait_for_ever(&cluster);
    }
    let down = curtain(cluster, agents, played.is_ok(), &mut show);
    down?;
    if played.is_err() {
        return Ok(false);
    }
    println!(
        "\nAll of it as promised, in {:.0} s (builds and package installations not counted).",
        show.elapsed().as_secs_f32()
    );
    Ok(true)
}

/// Two hosts with dockerd, or with the stand-in where that cannot be; it says loudly which.
fn hosts(no_docker: bool, show: &Show) -> Result<Cluster> {
    let refused = match no_docker {
        true => anyhow::anyhow!("it was not wanted (--no-docker)"),
        false => match Cluster::up(2) {
            Ok(cluster) => return Ok(cluster),
            Err(error) => error,
        },
    };
    show.caution(&format!("NO DOCKER: {refused:#}"));
    show.caution("containers are plain namespaces in ECS-shaped cgroups, with a STAND-IN for Docker's API");
    Cluster::without_docker(2)
}

fn scenes(
    cluster: &Cluster,
    agent: Option<&Path>,
    part: Part,
    agents: &mut Option<Agents>,
    show: &mut Show,
) -> Result<()> {
    for (host, number) in cluster.hosts().iter().zip(1..) {
        show.note(&format!("host {number}  {:<11} cgroup {}", host.address(), host.cgroup().display()));
    }
    for (host, number) in cluster.hosts().iter().zip(1..).filter(|(host, _)| host.has_docker()) {
        let version = host.docker(&["version", "--format={{.Server.Version}}"])?;
        show.proved(&format!("containers on host {number} are run by a REAL dockerd, {version}"));
    }

    show.step("Tasks that know nothing of a mesh");
    let image = Image::tools(cluster.dir())?;
    cluster.import(&image)?;
    let tasks = Tasks::start(cluster, &image, show)?;
    tasks.name_the_caches(cluster)?;
    if part == Part::Lab {
        return Ok(());
    }

    plain::show_mesh_off(cluster, &tasks, show)?;
    if part == Part::Off {
        return Ok(());
    }

    show.step("An agent on each host; the tasks are not touched");
    let agent = agent.context("no agent was built")?;
    let agents = agents.insert(Agents::start(cluster, agent, &tasks, show)?);
    let capture = cluster.capture("mesh-on")?;
    clients::call_world(cluster, &tasks, show)?;
    clients::call_cache(cluster, &tasks, show)?;
    let pcap = capture.stop()?;
    proof::show_identities(agents, show)?;
    proof::show_capture(&pcap, show)?;
    proof::show_commands(cluster, show)?;
    faults::start_fresh(cluster, &tasks, &image, show)?;
    if part == Part::Mesh {
        return Ok(());
    }

    faults::crash_agent(cluster, &tasks, agents, show)?;
    stop_agents(cluster, &tasks, agents, show)
}

/// Agents that are asked to stop take everything along, and the tasks go on.
fn stop_agents(cluster: &Cluster, tasks: &Tasks, agents: &mut Agents, show: &mut Show) -> Result<()> {
    show.step("The agents stop: no trace of them is left on the hosts, and the tasks go on");
    let traces = cluster.traces();
    agents.stop()?;
    let programs = traces.programs_left();
    ensure!(programs.is_empty(), "the agents left BPF programs: {programs:?}");
    for host in cluster.hosts() {
        let pins = host.run(&["find", "/sys/fs/bpf", "-mindepth", "1", "!", "-name", "*.debug"])?;
        ensure!(pins.is_empty(), "the agent of host {} left pins: {pins}", host.name());
    }
    let (web, remote) = (&tasks.web, &tasks.worlds[1]);
    let url = format!("http://{}/", remote.at(HTTP)?);
    let said = web.on(cluster).run_in(&web.task, &["curl", "-sS", "--max-time", "5", &url])?;
    ensure!(said == remote.answer(), "after the agents stopped, {url} answered {said:?}");
    show.proved(&format!("{} BPF programs are gone, no pin is on either bpffs", traces.programs()));
    show.proved("the old way, by address, works as before");
    Ok(())
}

/// Removes everything and looks for what is left.
fn curtain(cluster: Cluster, agents: Option<Agents>, well: bool, show: &mut Show) -> Result<()> {
    if well {
        show.step("Everything is removed");
    }
    let traces = cluster.traces();
    show.note(&format!("there were {traces}"));
    drop(agents);
    cluster.down()?;
    let left = traces.left();
    ensure!(left.is_empty(), "left behind: {}", left.join("; "));
    show.proved("each of them was looked for again, and none is left");
    Ok(())
}

fn wait_for_ever(cluster: &Cluster) -> ! {
    println!("\nThe hosts stay until Ctrl-C. To look around:");
    for (host, number) in cluster.hosts().iter().zip(1..) {
        println!("  host {number}: nsenter -t {} -m -n -u -p -C env PATH=/run/lab/bin:$PATH bash", host.pid());
        println!("          docker -H unix://{}/run/docker.sock ps", host.dir().display());
        println!("          logs in {}", host.dir().display());
    }
    loop {
        thread::park();
    }
}
