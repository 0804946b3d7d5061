//! The same with a real Consul as the only source: what it costs to follow it, at rest and while one instance moves.
//!
//! Consul runs on the host and is filled before the agent starts. Its own share is what a plain blocking query of this
//! program needs to see the same change. It must not know the bounds that are promised.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, MapData};
use mesh_common::{addr::Addr, maps::Service};
use mesh_core::instance::meta;
use mesh_lab::{Cluster, Host, Image, Process, TaskSpec};
use mesh_worlds::{Size, address, agent, name};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use super::{
    Found, LIMIT, MOVES, REST, TRUST_DOMAIN, median, memory, processor_time, services_map, start, stop, until,
};
use crate::registry;

/// Consul is filled over so many connections.
const LANES: usize = 8;
/// At rest for so long: several of the spans of ten seconds by which Consul counts.
const IDLE: Duration = Duration::from_secs(30);
/// Consul keeps what it counted for so long after the span.
const SPAN: Duration = Duration::from_secs(10);
/// From one change to the next: the agent hands on at once what comes after a quiet moment.
const APART: Duration = Duration::from_millis(300);

/// Starts Consul and `program` on a host of their own and measures. `helper` is a program that asks for a name: `resolve
/// NAME`.
///
/// # Errors
/// The lab cannot be made, or one of them does not do its job.
pub fn measure(program: &Path, consul: &Path, helper: &Path, size: Size) -> Result<Found> {
    let cluster = Cluster::up(1)?;
    let measured = measure_on(&cluster, program, consul, helper, size);
    let down = cluster.down();
    let found = measured?;
    down?;
    Ok(found)
}

/// What the changes are made to, and where they are to arrive.
struct Stage<'a> {
    host: &'a Host,
    url: String,
    map: HashMap<MapData, Addr, Service>,
}

fn measure_on(cluster: &Cluster, program: &Path, consul: &Path, helper: &Path, size: Size) -> Result<Found> {
    let host = cluster.hosts().first().context("a cluster of one has a host")?;
    let helper = helper.to_str().context("the target folder's name is UTF-8")?;
    let image = Image::build(cluster.dir(), "scale/asker", &[(helper, "asker")])?;
    cluster.import(&image)?;
    host.install(program, "mesh-agent")?;
    host.install(consul, "consul")?;
    host.run(&["mesh-agent", "ca", "init", "--trust-domain", TRUST_DOMAIN, "--out", "/etc/ecs-mesh"])?;
    let url = format!("http://{}:8500", host.address());
    host.write_etc("ecs-mesh/agent.toml", &configuration(&url))?;
    let bind = format!("-bind={}", host.address());
    let argv = ["consul", "agent", "-dev", &bind, "-client=0.0.0.0", "-node=lab", "-log-level=warn"];
    let mut server = host.spawn("consul", &argv)?;
    until("Consul leads", || Ok(inside(host, |lane| lane.told("GET", "/v1/status/leader", "")).is_ok()))
        .with_context(|| server.last_words())?;
    let mut found = Found::default();
    let began = Instant::now();
    fill(host, size)?;
    found.add("scale_consul_fill_ms", began.elapsed().as_secs_f64() * 1e3, "ms");
    let client = host.run_task(&TaskSpec::new("asker", image.name(), &["sleep", "2147483647"]))?;

    let server_before = processor_time(&server)?;
    let began = Instant::now();
    let (mut process, ready) = start(host)?;
    found.add("scale_consul_start_ms", ready.as_secs_f64() * 1e3, "ms");
    let stage = Stage { host, url, map: services_map(&process)? };
    for at in (0..size.services).flat_map(|n| (0..size.endpoints).map(move |e| address(n, e))) {
        until("the kernel knows all endpoints", || Ok(stage.map.get(&Addr::from(at), 0).is_ok()))
            .with_context(|| format!("{at} is missing; {}", process.last_words()))?;
    }
    found.add("scale_consul_all_known_ms", began.elapsed().as_secs_f64() * 1e3, "ms");
    found.add("scale_consul_start_cpu_ms", processor_time(&process)?.as_secs_f64() * 1e3, "ms");
    let server_start = (processor_time(&server)? - server_before).as_secs_f64() * 1e3;
    found.add("scale_consul_start_consuls_cpu_ms", server_start, "ms");
    thread::sleep(REST);
    sizes(&mut found, &process, "scale_consul")?;

    let (before, server_before, began) = (processor_time(&process)?, processor_time(&server)?, Instant::now());
    let asked = questions(host, IDLE)?;
    let elapsed = began.elapsed().as_secs_f64();
    let share = |time: Duration| time.as_secs_f64() / elapsed * 100.0;
    found.add("scale_consul_idle_cpu_percent", share(processor_time(&process)? - before), "%");
    found.add("scale_consul_idle_questions_per_s", asked, "1/s");
    found.add("scale_consul_idle_consuls_cpu_percent", share(processor_time(&server)? - server_before), "%");

    // Beyond the services that are followed before anybody has asked for one.
    let used = size.services / 2;
    let ask = |n: usize| -> Result<()> { host.exec_in(&client, &["asker", "resolve", name(n).as_str()]).map(drop) };
    ask(used)?;
    thread::sleep(REST);
    let cpu = processor_time(&process)?;
    stage.moves(&mut found, size, used)?;
    let each = (processor_time(&process)? - cpu).as_secs_f64() * 1e3 / f64::from(2 * MOVES);
    found.add("scale_consul_cpu_per_change_ms", each, "ms");
    // All others are looked at again now, one after the other.
    found.add("scale_consul_swept_questions_per_s", questions(host, SPAN)?, "1/s");
    stage.flips(&mut found, size, size.services * 3 / 4)?;
    stage.first_use(&mut found, size, ask)?;
    thread::sleep(REST);
    sizes(&mut found, &process, "scale_consul_after_changes")?;
    host.stop_task(&client)?;
    stop(&mut process)?;
    server.kill();
    Ok(found)
}

fn sizes(found: &mut Found, process: &Process, prefix: &str) -> Result<()> {
    for (name, key) in [("resident", "VmRSS:"), ("anonymous", "RssAnon:"), ("peak", "VmHWM:")] {
        found.add(&format!("{prefix}_{name}_mb"), memory(process, key)?, "MB");
    }
    Ok(())
}

impl Stage<'_> {
    /// One more instance of a service that a task uses, and one less, again and again.
    fn moves(&self, found: &mut Found, size: Size, n: usize) -> Result<()> {
        let (mut come, mut gone) = (Times::default(), Times::default());
        for _ in 0..MOVES {
            come.add(self.timed(n, size.endpoints + 1, registration(n, size.endpoints, "passing"), |knows| knows)?);
            gone.add(self.timed(n, size.endpoints, deregistration(n, size.endpoints), |knows| !knows)?);
        }
        come.say(found, "scale_consul_used_instance_comes")?;
        gone.say(found, "scale_consul_used_instance_goes")
    }

    /// An instance of a service that nobody uses falls ill, and is well again.
    fn flips(&self, found: &mut Found, size: Size, n: usize) -> Result<()> {
        let (mut ill, mut well) = (Times::default(), Times::default());
        let last = size.endpoints - 1;
        for _ in 0..MOVES {
            ill.add(self.timed(n, last, registration(n, last, "critical"), |knows| !knows)?);
            well.add(self.timed(n, size.endpoints, registration(n, last, "passing"), |knows| knows)?);
        }
        ill.say(found, "scale_consul_unused_instance_falls_ill")?;
        well.say(found, "scale_consul_unused_instance_recovers")
    }

    /// An instance of a service that nobody uses vanishes, and then a task asks for the service. From the question on.
    fn first_use(&self, found: &mut Found, size: Size, ask: impl Fn(usize) -> Result<()>) -> Result<()> {
        let mut took = Vec::new();
        // Those at the end of the list would be looked at last.
        for n in (size.services - usize::from(MOVES)..size.services).rev() {
            let last = size.endpoints - 1;
            let (path, body) = deregistration(n, last);
            inside(self.host, move |lane| lane.told("PUT", &path, &body))?;
            let key = Addr::from(address(n, last));
            thread::sleep(APART);
            ensure!(self.map.get(&key, 0).is_ok(), "a service that nobody uses was looked at out of turn");
            let began = Instant::now();
            ask(n)?;
            until("the kernel forgets the instance", || Ok(self.map.get(&key, 0).is_err()))?;
            took.push(began.elapsed().as_secs_f64() * 1e3);
        }
        found.add("scale_consul_first_use_to_kernel_ms", median(&mut took)?, "ms");
        Ok(())
    }

    /// Makes a change to the service: milliseconds until a plain blocking query sees `count` instances, and until what the
    /// kernel knows of the instance is as it `should` be.
    fn timed(
        &self,
        n: usize,
        count: usize,
        (path, body): (String, String),
        should: impl Fn(bool) -> bool,
    ) -> Result<(f64, f64)> {
        thread::sleep(APART);
        let instance: Value = serde_json::from_str(&body)?;
        let id = instance["Service"]["ID"].as_str().or(instance["ServiceID"].as_str()).unwrap_or_default();
        let e: usize = id.rsplit('-').next().unwrap_or_default().parse().context("an instance has a number")?;
        let key = Addr::from(address(n, e));
        let (url, count) = (self.url.clone(), u32::try_from(count)?);
        let (tell, told) = mpsc::channel();
        let watching = within(self.host, move || {
            Ok(registry::timed(&url, name(n).as_str(), count, &path, &body, |began| {
                // The other side may have given up.
                tell.send(began).ok();
            })?)
        });
        let began: Instant = told.recv_timeout(LIMIT).context("Consul was not told")?;
        until("the kernel knows the change", || Ok(should(self.map.get(&key, 0).is_ok())))?;
        let known = began.elapsed();
        Ok((joined(watching)?, known.as_secs_f64() * 1e3))
    }
}

/// Of the same changes: what Consul needed, and the agent with it.
#[derive(Default)]
struct Times {
    registry: Vec<f64>,
    kernel: Vec<f64>,
}

impl Times {
    fn add(&mut self, (registry, kernel): (f64, f64)) {
        self.registry.push(registry);
        self.kernel.push(kernel);
    }

    fn say(mut self, found: &mut Found, name: &str) -> Result<()> {
        let mut beyond: Vec<f64> = self.kernel.iter().zip(&self.registry).map(|(all, own)| all - own).collect();
        found.add(&format!("{name}_registry_ms"), median(&mut self.registry)?, "ms");
        found.add(&format!("{name}_kernel_ms"), median(&mut self.kernel)?, "ms");
        found.add(&format!("{name}_beyond_ms"), median(&mut beyond)?, "ms");
        found.add(&format!("{name}_kernel_max_ms"), self.kernel.last().copied().unwrap_or_default(), "ms");
        Ok(())
    }
}

/// Registers all instances, as the agents of their hosts would.
fn fill(host: &Host, size: Size) -> Result<()> {
    let lanes: Vec<_> = (0..LANES)
        .map(|lane| {
            within(host, move || {
                let mut to = Lane::to_here()?;
                for n in (lane..size.services).step_by(LANES) {
                    for e in 0..size.endpoints {
                        let (path, body) = registration(n, e, "passing");
                        to.told("PUT", &path, &body)?;
                    }
                }
                Ok(())
            })
        })
        .collect();
    lanes.into_iter().try_for_each(joined)
}

fn id(n: usize, e: usize) -> String {
    format!("{}-{e}", name(n))
}

fn node(n: usize, e: usize) -> String {
    format!("host-{}", address(n, e).ip()).replace('.', "-")
}

/// The e-th instance of the n-th service.
fn registration(n: usize, e: usize, status: &str) -> (String, String) {
    let (at, id) = (address(n, e), id(n, e));
    let meta = json!({
        meta::AGENT: agent(at).to_string(),
        meta::IDENTITY: format!("spiffe://{TRUST_DOMAIN}/ns/scale/sa/{}", name(n)),
        meta::PORTS: "80",
        meta::TARGET: "8080",
        meta::TASK: format!("{n:016x}{e:016x}"),
    });
    let body = json!({
        "Node": node(n, e),
        "Address": at.ip().to_string(),
        "Service": { "ID": id, "Service": name(n).as_str(), "Address": at.ip().to_string(), "Port": at.port(), "Meta": meta },
        "Check": { "CheckID": format!("check:{id}"), "Name": "readiness", "ServiceID": id, "Status": status },
    });
    ("/v1/catalog/register".to_owned(), body.to_string())
}

fn deregistration(n: usize, e: usize) -> (String, String) {
    ("/v1/catalog/deregister".to_owned(), json!({ "Node": node(n, e), "ServiceID": id(n, e) }).to_string())
}

/// How many questions Consul answers in a second, as it counts itself.
fn questions(host: &Host, time: Duration) -> Result<f64> {
    // It tells of spans that are over: the first that is told began before this.
    thread::sleep(2 * SPAN);
    let mut count = 0.0;
    let spans = (time.as_secs() / SPAN.as_secs()).max(1);
    for _ in 0..spans {
        thread::sleep(SPAN);
        let said = inside(host, |lane| lane.told("GET", "/v1/agent/metrics", ""))?;
        let said: Value = serde_json::from_str(&said)?;
        let samples = said["Samples"].as_array().context("Consul counts")?;
        let asked = samples.iter().filter(|sample| {
            // Not the question that is being asked here.
            sample["Name"].as_str().is_some_and(|name| name.contains(".http.GET.") && !name.contains("agent.metrics"))
        });
        count += asked.filter_map(|sample| sample["Count"].as_f64()).sum::<f64>();
    }
    Ok(count / (SPAN.as_secs_f64() * spans as f64))
}

/// Does something in a thread of its own in the host's network.
fn within<T: Send + 'static>(
    host: &Host,
    what: impl FnOnce() -> Result<T> + Send + 'static,
) -> thread::JoinHandle<Result<T>> {
    let path = format!("/proc/{}/ns/net", host.pid());
    thread::spawn(move || {
        let network = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        setns(network, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {path}"))?;
        what()
    })
}

fn joined<T>(thread: thread::JoinHandle<Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_panic| bail!("it panicked"))
}

/// Asks Consul on the host.
fn inside<T: Send + 'static>(host: &Host, what: impl FnOnce(&mut Lane) -> Result<T> + Send + 'static) -> Result<T> {
    joined(within(host, move || what(&mut Lane::to_here()?)))
}

/// A connection to Consul that is kept.
struct Lane(BufReader<TcpStream>);

impl Lane {
    fn to_here() -> Result<Self> {
        let stream = TcpStream::connect("127.0.0.1:8500").context("cannot reach Consul")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// A request that must be taken, and the body of its answer.
    fn told(&mut self, method: &str, path: &str, body: &str) -> Result<String> {
        let request =
            format!("{method} {path} HTTP/1.1\r\nHost: consul\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        self.0.get_mut().write_all(request.as_bytes())?;
        let mut line = || -> Result<String> {
            let mut line = String::new();
            ensure!(self.0.read_line(&mut line)? > 0, "Consul has closed the connection");
            Ok(line.trim_end().to_ascii_lowercase())
        };
        let status = line()?;
        let (mut length, mut chunked) = (0, false);
        loop {
            let field = line()?;
            if field.is_empty() {
                break;
            }
            if let Some(value) = field.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
            chunked |= field.starts_with("transfer-encoding: chunked");
        }
        let mut answer = Vec::new();
        while chunked {
            let mut size = String::new();
            self.0.read_line(&mut size)?;
            let size = u64::from_str_radix(size.trim(), 16)?;
            (&mut self.0).take(size).read_to_end(&mut answer)?;
            self.0.read_line(&mut String::new())?;
            chunked = size > 0;
        }
        (&mut self.0).take(length).read_to_end(&mut answer)?;
        let answer = String::from_utf8(answer)?;
        ensure!(status.contains(" 200 "), "{method} {path}: {status} {answer}");
        Ok(answer)
    }
}

fn configuration(url: &str) -> String {
    format!(
        "[host]\ncluster = \"scale\"\n\n[identity]\ntrust_domain = \"{TRUST_DOMAIN}\"\n\
         ca_bundle = \"/etc/ecs-mesh/ca-bundle.pem\"\njoin_token_file = \"/etc/ecs-mesh/join-token\"\n\n\
         [discovery.consul]\naddress = \"{url}\"\n\n[log]\nformat = \"json\"\naccess = false\n"
    )
}
