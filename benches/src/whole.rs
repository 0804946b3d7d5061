//! A whole agent on a host of the lab, told of many services by file: what it weighs, and how soon the kernel knows.
//!
//! It must not know the bounds that are promised.
#![allow(clippy::print_stdout, reason = "a figure is said when it is known: what comes after it may fail")]

pub mod consul;

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use mesh_common::{addr::Addr, maps::Service};
use mesh_lab::{Cluster, Host, Image, Process, TaskSpec};
use mesh_worlds::{Size, address, agent, name};
use nix::sys::signal::Signal;

const TRUST_DOMAIN: &str = "scale.mesh";
const LIMIT: Duration = Duration::from_secs(120);
/// Time for the agent to come to rest.
const REST: Duration = Duration::from_secs(3);
const IDLE: Duration = Duration::from_secs(10);
const MOVES: u16 = 7;
const HELD: u32 = 1000;
/// Of the kernel's clock for times of processes, on every architecture that there is.
const TICK_MS: u64 = 10;

/// What was measured, by name.
#[derive(Debug, Default)]
pub struct Found {
    figures: Vec<(String, f64)>,
}

impl Found {
    fn add(&mut self, name: &str, value: f64, unit: &str) {
        println!("FIGURE {name} {value:.3} {unit}");
        self.figures.push((name.to_owned(), value));
    }

    /// The value of a figure.
    ///
    /// # Errors
    /// It was not measured.
    pub fn of(&self, name: &str) -> Result<f64> {
        let found = self.figures.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| *value).with_context(|| format!("{name} was not measured"))
    }
}

/// Starts `program` on a host of its own and measures. `helper` is a program that holds connections: `serve PORT` and
/// `open ADDRESS COUNT`.
///
/// # Errors
/// The lab cannot be made, or the agent does not do its job.
pub fn measure(program: &Path, helper: &Path, size: Size) -> Result<Found> {
    let cluster = Cluster::up(1)?;
    let measured = measure_on(&cluster, program, helper, size);
    let down = cluster.down();
    let found = measured?;
    down?;
    Ok(found)
}

fn measure_on(cluster: &Cluster, program: &Path, helper: &Path, size: Size) -> Result<Found> {
    let host = cluster.hosts().first().context("a cluster of one has a host")?;
    let helper = helper.to_str().context("the target folder's name is UTF-8")?;
    let image = Image::build(cluster.dir(), "scale/holder", &[(helper, "holder")])?;
    cluster.import(&image)?;
    host.install(program, "mesh-agent")?;
    host.run(&["mesh-agent", "ca", "init", "--trust-domain", TRUST_DOMAIN, "--out", "/etc/ecs-mesh"])?;
    host.write_etc("ecs-mesh/agent.toml", &configuration())?;
    let mut found = Found::default();

    // An agent that knows nothing, to compare with.
    host.write_etc("ecs-mesh/services.toml", "")?;
    let (mut process, _) = start(host)?;
    thread::sleep(REST);
    found.add("scale_agent_empty_resident_mb", memory(&process, "VmRSS:")?, "MB");
    stop(&mut process)?;

    host.write_etc("ecs-mesh/services.toml", &services(size, None))?;
    let (mut process, ready) = start(host)?;
    found.add("scale_agent_start_ms", ready.as_secs_f64() * 1e3, "ms");
    thread::sleep(REST);
    found.add("scale_agent_resident_mb", memory(&process, "VmRSS:")?, "MB");
    found.add("scale_agent_anonymous_mb", memory(&process, "RssAnon:")?, "MB");
    found.add("scale_agent_peak_mb", memory(&process, "VmHWM:")?, "MB");
    let (before, began) = (processor_time(&process)?, Instant::now());
    thread::sleep(IDLE);
    let share = (processor_time(&process)? - before).as_secs_f64() / began.elapsed().as_secs_f64();
    found.add("scale_agent_idle_cpu_percent", share * 100.0, "%");

    // One endpoint moves, again and again: from the new file's being there to the kernel's knowing it.
    let map = services_map(&process)?;
    let log_before = turns(&process)?.len();
    let mut took = Vec::new();
    for n in 0..MOVES {
        let to = SocketAddr::new([10, 200, 0, 1].into(), 20_000 + n);
        let text = services(size, Some(to));
        let path = host.dir().join("etc/ecs-mesh/services.toml");
        fs::write(path.with_extension("next"), text).context("cannot write the next file of services")?;
        let began = Instant::now();
        fs::rename(path.with_extension("next"), &path).context("cannot replace the file of services")?;
        until("the kernel knows the endpoint", || Ok(map.get(&Addr::from(to), 0).is_ok()))?;
        took.push(began.elapsed().as_secs_f64() * 1e3);
        // The file is looked at again only when the last change has settled.
        thread::sleep(Duration::from_millis(300));
    }
    found.add("scale_agent_file_to_kernel_ms", median(&mut took)?, "ms");
    let mut turns = turns(&process)?.split_off(log_before);
    found.add("scale_agent_turn_ms", median(&mut turns)?, "ms");
    // What the last one left behind is given back a second later.
    thread::sleep(REST);
    found.add("scale_agent_resident_after_changes_mb", memory(&process, "VmRSS:")?, "MB");

    // Connections that are open and silent: two sockets each, from a task to a task.
    let server = host.run_task(&TaskSpec::new("held", image.name(), &["holder", "serve", "9000"]).port(9000))?;
    let client = host.run_task(&TaskSpec::new("holder", image.name(), &["sleep", "2147483647"]))?;
    thread::sleep(REST);
    // Heap, and not the pages of the program that the first of them needs.
    let before = memory(&process, "RssAnon:")?;
    let mut holding = host
        .command_in(&client, &["holder", "open", "held:9000", &HELD.to_string()])?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the client")?;
    let mut said = String::new();
    BufReader::new(holding.stdout.take().context("it has an output")?).read_line(&mut said)?;
    ensure!(said.starts_with("open"), "the client did not open its connections: {said}");
    thread::sleep(REST);
    let per = (memory(&process, "RssAnon:")? - before) * 1e3 / f64::from(HELD);
    found.add("scale_agent_idle_connection_kb", per, "kB");
    drop(holding.stdin.take());
    holding.wait().context("cannot wait for the client")?;
    for task in [&client, &server] {
        host.stop_task(task)?;
    }
    stop(&mut process)?;
    Ok(found)
}

fn configuration() -> String {
    format!(
        "[host]\ncluster = \"scale\"\n\n[identity]\ntrust_domain = \"{TRUST_DOMAIN}\"\n\
         ca_bundle = \"/etc/ecs-mesh/ca-bundle.pem\"\njoin_token_file = \"/etc/ecs-mesh/join-token\"\n\n\
         [services]\nfile = \"/etc/ecs-mesh/services.toml\"\n\n[log]\nlevel = \"debug\"\nformat = \"json\"\naccess = false\n"
    )
}

/// The file of services; with `moved`, that is the address of one endpoint in the middle.
fn services(size: Size, moved: Option<SocketAddr>) -> String {
    let mut text = String::new();
    for n in 0..size.services {
        // Writing to a String cannot fail.
        writeln!(text, "[[service]]\nname = \"{}\"\nports = [ {{ port = 80, target = 8080 }} ]", name(n))
            .unwrap_or_default();
        for e in 0..size.endpoints {
            let moved = moved.filter(|_| (n, e) == (size.services / 2, 0));
            let endpoint = moved.unwrap_or_else(|| address(n, e));
            writeln!(text, "[[service.endpoint]]\naddress = \"{endpoint}\"\nagent = \"{}\"", agent(endpoint))
                .unwrap_or_default();
        }
    }
    text
}

/// Starts the agent; how long until it is ready.
fn start(host: &Host) -> Result<(Process, Duration)> {
    let log = host.dir().join("mesh-agent.log");
    if log.exists() {
        fs::remove_file(&log)?;
    }
    let began = Instant::now();
    let process = host.spawn("mesh-agent", &["mesh-agent", "run", "--config", "/etc/ecs-mesh/agent.toml"])?;
    let ready = until("the agent is ready", || {
        Ok(fs::read_to_string(&log).unwrap_or_default().contains("\"message\":\"ready\""))
    });
    ready.with_context(|| process.last_words())?;
    Ok((process, began.elapsed()))
}

fn stop(process: &mut Process) -> Result<()> {
    process.signal(Signal::SIGTERM)?;
    let status = process.wait(LIMIT)?;
    ensure!(status.success(), "the agent ended with {status}: {}", process.last_words());
    Ok(())
}

fn until(what: &str, mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !is()? {
        if began.elapsed() > LIMIT {
            bail!("not within {LIMIT:?}: {what}");
        }
        thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// A size of the process in megabytes, as the kernel says.
fn memory(process: &Process, key: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid()?)).context("cannot read its status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)).context("the status has the key")?;
    let kib: f64 = line.split_whitespace().next().context("the key has a value")?.parse()?;
    Ok(kib * 1024.0 / 1e6)
}

fn processor_time(process: &Process) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid()?)).context("cannot read its times")?;
    // After the name, which may hold anything: times in user and system mode are the 12th and 13th.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|ticks| ticks.parse::<u64>().ok()).context("the file has times");
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * TICK_MS))
}

/// The map as the hooks see it, by the agent's own pin.
fn services_map(process: &Process) -> Result<HashMap<MapData, Addr, Service>> {
    let pin: PathBuf = format!("/proc/{}/root/sys/fs/bpf/ecs-mesh/maps/SERVICES", process.pid()?).into();
    let data = MapData::from_pin(&pin).with_context(|| format!("cannot open the pinned map {}", pin.display()))?;
    HashMap::try_from(Map::from_map_data(data)?).context("the map is another one")
}

/// What each turn took, in milliseconds, as the agent says of itself.
fn turns(process: &Process) -> Result<Vec<f64>> {
    let log = fs::read_to_string(process.log()).context("cannot read its log")?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    Ok(lines.filter_map(|line| Some(line["took_us"].as_f64()? / 1e3)).collect())
}

fn median(values: &mut [f64]) -> Result<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().context("nothing was measured")
}
