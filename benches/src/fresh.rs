//! Two hosts with an agent each and a Consul between them, and what is timed there: a task that starts, stops, falls ill,
//! and a service whose endpoints are all replaced under load.
//!
//! Times are taken by the tasks themselves, by the clock that all have in common. It must not know the bounds that are
//! promised.
#![allow(clippy::print_stdout, reason = "a figure is said when it is known: what comes after it may fail")]

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_lab::{Cluster, Host, Image, Process, Task, TaskSpec};
use nix::sys::signal::Signal;
use serde_json::Value;

const TRUST_DOMAIN: &str = "fresh.mesh";
const LIMIT: Duration = Duration::from_secs(30);
const IMAGE: &str = "fresh/tools";
const PORT: u16 = 8080;

/// The hosts, and a client on the first.
#[derive(Debug)]
pub struct Stage {
    // In the order in which they are to end.
    agents: Vec<Process>,
    consul: Process,
    url: String,
    client: Task,
    cluster: Cluster,
}

/// A server that is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// nginx, stopped by SIGQUIT as its image says.
    Nginx,
    /// Closes its listener and idle connections at SIGTERM, answers what is under way, and ends.
    Abrupt,
}

/// What came of a rolling replacement.
#[derive(Debug, Default)]
pub struct Rolled {
    pub answered: f64,
    pub failed: f64,
    /// Of these, POSTs.
    pub failed_posts: f64,
    /// Requests that a server says it has read on a connection that it had closed already.
    pub unanswered: f64,
    /// Of these, POSTs: each must have failed.
    pub unanswered_posts: f64,
    pub p50: f64,
    pub p99: f64,
    pub longest: f64,
    /// Why some failed.
    pub reasons: Vec<String>,
    /// Requests in a second that were really sent.
    pub rate: f64,
}

impl Kind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Abrupt => "abrupt",
        }
    }

    fn spec(self, answer: &str) -> TaskSpec {
        match self {
            Self::Nginx => nginx("rolled", answer).stop_signal("SIGQUIT"),
            Self::Abrupt => server("rolled", answer, "abrupt"),
        }
    }
}

impl Stage {
    /// Makes the hosts and starts Consul and the agents.
    ///
    /// # Errors
    /// The lab cannot be made here, or something does not start.
    pub fn up(agent: &Path, probe: &Path, consul: &Path) -> Result<Self> {
        let cluster = Cluster::up(2)?;
        let name = probe.to_str().context("the target folder's name is UTF-8")?;
        let image = Image::build(cluster.dir(), IMAGE, &[(name, "probe"), ("/usr/sbin/nginx", "nginx")])?;
        cluster.import(&image)?;
        let [one, two] = cluster.hosts() else { bail!("a cluster of two has two hosts") };
        for host in [one, two] {
            host.install(agent, "mesh-agent")?;
            host.install(probe, "probe")?;
        }
        one.install(consul, "consul")?;
        let url = format!("http://{}:8500", one.address());
        let bind = format!("-bind={}", one.address());
        let argv = ["consul", "agent", "-dev", &bind, "-client=0.0.0.0", "-node=lab", "-log-level=warn"];
        let consul = one.spawn("consul", &argv)?;
        until("Consul leads", || Ok(one.exec(&["probe", "registry", &url, "1"])?.ok()))?;
        one.run(&["mesh-agent", "ca", "init", "--trust-domain", TRUST_DOMAIN, "--out", "/etc/ecs-mesh"])?;
        let from = one.dir().join("etc/ecs-mesh");
        mesh_lab::run(Command::new("cp").arg("-a").arg(from).arg(two.dir().join("etc")))?;
        for host in [one, two] {
            host.write_etc("ecs-mesh/agent.toml", &configuration(&url))?;
        }
        let client = one.run_task(&TaskSpec::new("client", IMAGE, &["sleep", "2147483647"]))?;
        let start =
            |host: &Host| host.spawn("mesh-agent", &["mesh-agent", "run", "--config", "/etc/ecs-mesh/agent.toml"]);
        let agents = vec![start(one)?, start(two)?];
        let stage = Self { agents, consul, url, client, cluster };
        for (host, agent) in [one_of(&stage, 0)?, one_of(&stage, 1)?].into_iter().zip(&stage.agents) {
            until("the agent is ready", || Ok(status(host).is_ok_and(|status| status["ready"] == true)))
                .with_context(|| agent.last_words())?;
        }
        Ok(stage)
    }

    /// Stops the agents and removes everything.
    ///
    /// # Errors
    /// An agent does not end well, or something cannot be removed.
    pub fn down(mut self) -> Result<()> {
        for agent in &mut self.agents {
            agent.signal(Signal::SIGTERM)?;
            let status = agent.wait(LIMIT)?;
            ensure!(status.success(), "an agent ended with {status}: {}", agent.last_words());
        }
        self.consul.kill();
        self.cluster.down()
    }

    /// What Consul needs by itself, in milliseconds: until a registration is seen, and until its end is.
    ///
    /// # Errors
    /// Consul does not answer.
    pub fn registry(&self, count: u32) -> Result<(Vec<f64>, Vec<f64>)> {
        let said = one_of(self, 0)?.run(&["probe", "registry", &self.url, &count.to_string()])?;
        let pair = |line: &str| -> Result<(f64, f64)> {
            let (come, gone) = line.split_once(' ').context("two numbers in a line")?;
            Ok((come.parse()?, gone.parse()?))
        };
        Ok(said.lines().map(pair).collect::<Result<Vec<_>>>()?.into_iter().unzip())
    }

    /// A new service's first task starts on the other host. Milliseconds from its first instruction and from the moment
    /// on which it listens until a request by name is answered, and until Consul shows it.
    ///
    /// # Errors
    /// It is never reached.
    pub fn start(&self, number: u32) -> Result<Started> {
        let name = format!("start-{number}");
        let (one, two) = (one_of(self, 0)?, one_of(self, 1)?);
        let mut asking = one.command_in(&self.client, &["probe", "first", &format!("{name}:80")])?;
        let asking = thread::spawn(move || mesh_lab::output(&mut asking));
        let mut seeing = one.command(&["probe", "seen", &self.url, &name, "1"]);
        let seeing = thread::spawn(move || mesh_lab::output(&mut seeing));
        // Both ask by now.
        thread::sleep(Duration::from_millis(300));
        let task = two.run_task(&server(&name, "started", "abrupt"))?;
        let at = |said: thread::Result<Result<mesh_lab::Output>>| -> Result<f64> {
            let said = joined(said)?;
            said.stdout.trim().parse().with_context(|| format!("{said:?}"))
        };
        let (answered, shown) = (at(asking.join())?, at(seeing.join())?);
        let log = two.docker(&["logs", &task.container])?;
        let (began, listening) = (event(&log, "began")?, event(&log, "listening")?);
        two.stop_task(&task)?;
        Ok(Started {
            from_first_instruction: (answered - began) / 1e6,
            from_listening: (answered - listening) / 1e6,
            shown: (shown - listening) / 1e6,
        })
    }

    /// One of two tasks on the other host is told to stop and goes on serving. Milliseconds from the signal until the
    /// last request that it got.
    ///
    /// # Errors
    /// It gets none, or does not say.
    pub fn stop(&self, number: u32) -> Result<f64> {
        let name = format!("stop-{number}");
        let log = self.under_load(
            &name,
            |_| server(&name, "one", "1000"),
            |two, task| two.docker(&["kill", "--signal=TERM", &task.container]).map(drop),
        )?;
        Ok((event(&log, "last")? - event(&log, "told")?) / 1e6)
    }

    /// One of two tasks on the other host says that it is ill when it is asked, each 100 ms, and goes on serving.
    /// Milliseconds from that moment until the last request that it got.
    ///
    /// # Errors
    /// It gets none, or does not say.
    pub fn fall_ill(&self, number: u32) -> Result<f64> {
        let name = format!("ill-{number}");
        let spec = |answer: &str| {
            server(&name, answer, "0")
                .label("ecs-mesh.ready", "http")
                .label("ecs-mesh.ready.path", mesh_lab::serve::HEALTH)
                .label("ecs-mesh.ready.interval", "100ms")
                .label("ecs-mesh.ready.failures", "1")
        };
        let log = self.under_load(
            &name,
            |answer| spec(answer),
            |two, task| {
                two.docker(&["kill", "--signal=USR1", &task.container])?;
                thread::sleep(Duration::from_millis(1000));
                two.docker(&["kill", "--signal=TERM", &task.container]).map(drop)
            },
        )?;
        Ok((event(&log, "last")? - event(&log, "flipped")?) / 1e6)
    }

    /// Two tasks on the other host under a load of 200 requests a second, of which one is done something to. What it
    /// has said in the end.
    fn under_load(
        &self,
        name: &str,
        spec: impl Fn(&str) -> TaskSpec,
        change: impl FnOnce(&Host, &Task) -> Result<()>,
    ) -> Result<String> {
        let (one, two) = (one_of(self, 0)?, one_of(self, 1)?);
        let stays = two.run_task(&server(name, "stays", "abrupt"))?;
        let goes = two.run_task(&spec("goes"))?;
        self.await_healthy(name, &[&stays, &goes])?;
        let mut load = one.command_in(&self.client, &["probe", "load", &format!("{name}:80"), "200", "3"])?;
        let load = thread::spawn(move || mesh_lab::output(&mut load));
        thread::sleep(Duration::from_millis(700));
        change(two, &goes)?;
        let said = joined(load.join())?;
        ensure!(said.ok(), "{said:?}");
        two.docker(&["wait", &goes.container])?;
        let log = two.docker(&["logs", &goes.container])?;
        two.stop_task(&goes)?;
        two.stop_task(&stays)?;
        Ok(log)
    }

    /// Four endpoints, two on each host, are replaced one by one under `rate` requests a second from the first host.
    ///
    /// # Errors
    /// Something other than a request fails.
    pub fn roll(&self, kind: Kind, rate: u32, seconds: u32) -> Result<Rolled> {
        let one = one_of(self, 0)?;
        let run = |at: usize, answer: &str| -> Result<(usize, Task)> {
            Ok((at, one_of(self, at)?.run_task(&kind.spec(answer))?))
        };
        let mut tasks = (0..4).map(|n| run(n % 2, "old")).collect::<Result<Vec<_>>>()?;
        self.await_healthy("rolled", &tasks.iter().map(|(_, task)| task).collect::<Vec<_>>())?;
        let (rate_text, time) = (rate.to_string(), seconds.to_string());
        let mut load = one.command_in(&self.client, &["probe", "load", "rolled:80", &rate_text, &time])?;
        let began = Instant::now();
        let load = thread::spawn(move || mesh_lab::output(&mut load));
        let (mut unanswered, mut unanswered_posts) = (0.0, 0.0);
        thread::sleep(Duration::from_secs(1));
        for (n, task) in tasks.iter_mut().enumerate() {
            let new = run(n % 2, "new")?;
            self.await_healthy("rolled", &[&new.1])?;
            let (at, old) = std::mem::replace(task, new);
            one_of(self, at)?.docker(&["stop", "--time=20", &old.container])?;
            if kind == Kind::Abrupt {
                let log = one_of(self, at)?.docker(&["logs", &old.container])?;
                unanswered += said(&log, "unanswered")?;
                unanswered_posts += said(&log, "unanswered-posts")?;
            }
            one_of(self, at)?.stop_task(&old)?;
        }
        let replaced = began.elapsed();
        let outcome = joined(load.join())?;
        ensure!(outcome.ok(), "{outcome:?}");
        ensure!(replaced < Duration::from_secs(seconds.into()), "replacing took {replaced:?}, longer than the load");
        for (at, task) in &tasks {
            one_of(self, *at)?.stop_task(task)?;
        }
        let mut lines = outcome.stdout.lines();
        let numbers = lines.next().unwrap_or_default();
        let numbers: Vec<f64> = numbers.split(' ').filter_map(|number| number.parse().ok()).collect();
        let [answered, failed, failed_posts, p50, p99, longest] = numbers[..] else { bail!("{outcome:?}") };
        let reasons = lines.map(str::to_owned).collect();
        Ok(Rolled {
            answered,
            failed,
            failed_posts,
            unanswered,
            unanswered_posts,
            p50,
            p99,
            longest,
            reasons,
            rate: (answered + failed) / f64::from(seconds),
        })
    }

    /// Waits until the first host's agent would send requests to these tasks.
    fn await_healthy(&self, service: &str, tasks: &[&Task]) -> Result<()> {
        let host = one_of(self, 0)?;
        let known = until("the first host knows the new endpoints", || {
            let all: Value = serde_json::from_str(&host.run(&["mesh-agent", "services", "--json"])?)?;
            let services = all["services"].as_array().into_iter().flatten();
            let ports = services.filter(|it| it["name"] == service).flat_map(|it| it["ports"].as_array()).flatten();
            let endpoints: Vec<&Value> = ports.flat_map(|port| port["endpoints"].as_array()).flatten().collect();
            Ok(tasks.iter().all(|task| {
                let at = task.published(PORT).map(|at| at.to_string()).unwrap_or_default();
                endpoints.iter().any(|it| it["health"] == "healthy" && it.to_string().contains(&at))
            }))
        });
        known.with_context(|| {
            let said: Vec<_> = self.agents.iter().map(Process::last_words).collect();
            let listed = host.run(&["mesh-agent", "services", "--json"]).unwrap_or_default();
            format!("{listed}\n{}", said.join("\n\n"))
        })
    }
}

/// How soon a new task was reached.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    pub from_first_instruction: f64,
    pub from_listening: f64,
    /// From listening until Consul shows it.
    pub shown: f64,
}

/// What a thread came to.
fn joined<T>(ended: thread::Result<Result<T>>) -> Result<T> {
    ended.unwrap_or_else(|_panic| bail!("it panicked"))
}

fn one_of(stage: &Stage, index: usize) -> Result<&Host> {
    stage.cluster.hosts().get(index).context("a cluster of two has two hosts")
}

fn server(family: &str, answer: &str, manner: &str) -> TaskSpec {
    TaskSpec::new(family, IMAGE, &["probe", "serve", &PORT.to_string(), answer, manner]).port(PORT)
}

fn nginx(family: &str, answer: &str) -> TaskSpec {
    let temporary =
        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|kind| format!("{kind}_temp_path /tmp/{kind};"));
    let conf = format!(
        "user root; daemon off; worker_processes 2; error_log stderr; pid /tmp/nginx.pid; events {{}}\n\
         http {{ access_log off; default_type text/plain; keepalive_requests 1000000; {}\n\
         server {{ listen {PORT}; location / {{ return 200 \"{answer}\\n\"; }} }} }}",
        temporary.join(" "),
    );
    let script = "printf '%s\\n' \"$0\" >/tmp/nginx.conf && exec nginx -c /tmp/nginx.conf";
    TaskSpec::new(family, IMAGE, &["sh", "-c", script, &conf]).port(PORT)
}

fn status(host: &Host) -> Result<Value> {
    Ok(serde_json::from_str(&host.run(&["mesh-agent", "status", "--json"])?)?)
}

/// When something happened, in nanoseconds, as a server said.
fn event(log: &str, name: &str) -> Result<f64> {
    let at = said(log, name)?;
    ensure!(at > 0.0, "{name} is no time in {log:?}");
    Ok(at)
}

/// A number that a server said.
fn said(log: &str, name: &str) -> Result<f64> {
    let number = log.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
    number.with_context(|| format!("no {name} in {log:?}"))
}

fn configuration(consul: &str) -> String {
    format!(
        "[host]\ncluster = \"demo\"\n\n[identity]\ntrust_domain = \"{TRUST_DOMAIN}\"\n\
         ca_bundle = \"/etc/ecs-mesh/ca-bundle.pem\"\njoin_token_file = \"/etc/ecs-mesh/join-token\"\n\n\
         [discovery.consul]\naddress = \"{consul}\"\n[discovery.consul.registration]\nenabled = true\n\n\
         [log]\nformat = \"json\"\naccess = false\n"
    )
}

fn until(what: &str, mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !is()? {
        if began.elapsed() > LIMIT {
            bail!("not within {LIMIT:?}: {what}");
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
