//! Two hosts with a real dockerd and an agent each, for tests that need the whole.
//!
//! It knows how an operator installs, configures and asks an agent. It must not assert what the agent does.

use std::{
    env,
    fmt::Write as _,
    fs,
    path::PathBuf,
    process::Command,
    sync::MutexGuard,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_lab::{Cluster, Host, Image, Mode, Output, Process, Task, TaskSpec};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{stage, until::until};

pub const TRUST_DOMAIN: &str = "demo.mesh";
/// Long for a machine that does other work too.
pub const LIMIT: Duration = Duration::from_secs(20);
const CONFIG: &str = "/etc/ecs-mesh/agent.toml";

/// The hosts, the image of all their containers, and their agents.
#[derive(Debug)]
pub struct Mesh {
    // In the order in which they are to end.
    agents: Vec<Option<Process>>,
    pub image: Image,
    pub cluster: Cluster,
    _turn: MutexGuard<'static, ()>,
}

/// A task, and the host that it runs on.
#[derive(Clone, Debug)]
pub struct Placed {
    pub host: usize,
    pub task: Task,
}

/// A service with one port, as the file of services names it.
#[derive(Clone, Debug)]
pub struct Service<'a> {
    name: &'a str,
    port: u16,
    target: u16,
    protocol: &'a str,
    more: &'a str,
    at: Vec<(&'a Placed, &'a str)>,
}

impl<'a> Service<'a> {
    #[must_use]
    pub fn new(name: &'a str, port: u16, target: u16, protocol: &'a str) -> Self {
        Self { name, port, target, protocol, more: "", at: Vec::new() }
    }

    /// More lines of its section.
    #[must_use]
    pub fn with(mut self, more: &'a str) -> Self {
        self.more = more;
        self
    }

    #[must_use]
    pub fn at(self, placed: &'a Placed) -> Self {
        self.at_with(placed, "")
    }

    /// An endpoint with more lines of its section.
    #[must_use]
    pub fn at_with(mut self, placed: &'a Placed, more: &'a str) -> Self {
        self.at.push((placed, more));
        self
    }
}

impl Mesh {
    /// Two hosts, the CA of the first copied to the second, and the agent installed but not started.
    ///
    /// # Errors
    /// The lab cannot be made.
    pub fn up() -> Result<Self> {
        let turn = stage::turn();
        let cluster = Cluster::up(2)?;
        let image = image(&cluster)?;
        cluster.import(&image)?;
        let program = agent_program()?;
        for host in cluster.hosts() {
            host.install(&program, "mesh-agent")?;
            host.install(&peer_program()?, "peer")?;
        }
        let [one, two] = cluster.hosts() else { anyhow::bail!("a cluster of two has two hosts") };
        make_ca(one)?;
        let from = one.dir().join("etc/ecs-mesh");
        mesh_lab::run(Command::new("cp").arg("-a").arg(from).arg(two.dir().join("etc")))?;
        let mesh = Self { agents: vec![None, None], image, cluster, _turn: turn };
        for index in [0, 1] {
            mesh.configure(index, "")?;
            mesh.write_services(index, "")?;
        }
        Ok(mesh)
    }

    #[must_use]
    pub fn host(&self, index: usize) -> &Host {
        &self.cluster.hosts()[index]
    }

    /// Writes a host's agent.toml, with more lines of TOML.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn configure(&self, host: usize, more: &str) -> Result<()> {
        self.host(host).write_etc("ecs-mesh/agent.toml", &configuration(more))
    }

    /// Writes a host's services.toml as it is.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_services(&self, host: usize, text: &str) -> Result<()> {
        self.host(host).write_etc("ecs-mesh/services.toml", text)
    }

    /// Writes the services.toml of both hosts: each names the endpoints on the other.
    ///
    /// # Errors
    /// It cannot be written, or an endpoint's task does not publish the target.
    pub fn services(&self, services: &[Service<'_>], more: &str) -> Result<()> {
        [0, 1].into_iter().try_for_each(|host| {
            let text = self.services_of(host, services)?;
            self.write_services(host, &format!("{text}\n{more}"))
        })
    }

    /// The text for one host.
    ///
    /// # Errors
    /// An endpoint's task does not publish the target.
    pub fn services_of(&self, host: usize, services: &[Service<'_>]) -> Result<String> {
        let mut text = String::new();
        for Service { name, port, target, protocol, more, at } in services {
            write!(
                text,
                "\n[[service]]\nname = \"{name}\"\n{more}\n\
                 ports = [ {{ port = {port}, target = {target}, protocol = \"{protocol}\" }} ]\n"
            )?;
            for (placed, more) in at.iter().filter(|(placed, _)| placed.host != host) {
                let address = placed.task.published(*target);
                let address = address.with_context(|| format!("a task of {name} does not publish {target}"))?;
                writeln!(text, "[[service.endpoint]]\naddress = \"{address}\"\n{more}")?;
                if !more.contains("agent") {
                    writeln!(text, "agent = \"{}:15008\"", self.agent_of(placed))?;
                }
            }
        }
        // No agent in front of it.
        Ok(text.replace("agent = \"\"\n", ""))
    }

    /// The address at which the tunnels to a task end.
    #[must_use]
    pub fn agent_of(&self, placed: &Placed) -> std::net::Ipv4Addr {
        match placed.task.mode {
            Mode::Awsvpc => placed.task.address,
            Mode::Bridge | Mode::Host => self.host(placed.host).address(),
        }
    }

    /// Starts a task.
    ///
    /// # Errors
    /// Docker refuses.
    pub fn task(&self, host: usize, spec: TaskSpec) -> Result<Placed> {
        Ok(Placed { host, task: self.host(host).run_task(&spec)? })
    }

    /// A task that does nothing, to run clients in.
    #[must_use]
    pub fn idle(&self, family: &str) -> TaskSpec {
        self.spec(family, &["sleep", "2147483647"])
    }

    #[must_use]
    pub fn spec(&self, family: &str, command: &[&str]) -> TaskSpec {
        TaskSpec::new(family, self.image.name(), command)
    }

    /// A role of the program `peer` that listens on `port`.
    #[must_use]
    pub fn peer(&self, family: &str, role: &str, port: u16) -> TaskSpec {
        self.spec(family, &["peer", role, &port.to_string()]).port(port)
    }

    /// An nginx that answers every request with `answer`.
    #[must_use]
    pub fn nginx(&self, family: &str, answer: &str, port: u16) -> TaskSpec {
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path /tmp/{kind}-{port};"));
        let conf = format!(
            "user root; daemon off; error_log stderr; pid /tmp/nginx.pid; events {{}}\n\
             http {{ access_log off; default_type text/plain; {}\n\
             server {{ listen {port}; location / {{ return 200 \"{answer}\\n\"; }} }} }}",
            temporary.join(" "),
        );
        let script = "printf '%s\\n' \"$0\" >/tmp/nginx.conf && exec nginx -c /tmp/nginx.conf";
        self.spec(family, &["sh", "-c", script, &conf]).port(port)
    }

    /// Runs a command in a task to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn exec(&self, placed: &Placed, argv: &[&str]) -> Result<Output> {
        self.host(placed.host).exec_in(&placed.task, argv)
    }

    /// Runs a command in a task, which must succeed; returns its standard output.
    ///
    /// # Errors
    /// It failed.
    pub fn run(&self, placed: &Placed, argv: &[&str]) -> Result<String> {
        self.host(placed.host).run_in(&placed.task, argv)
    }

    /// What the task's program has said so far.
    ///
    /// # Errors
    /// Docker refuses.
    pub fn said(&self, placed: &Placed) -> Result<String> {
        self.host(placed.host).docker(&["logs", &placed.task.container])
    }

    /// Starts the agents of both hosts and waits until they are ready.
    ///
    /// # Errors
    /// One is not ready in time.
    pub fn start(&mut self) -> Result<()> {
        [0, 1].into_iter().try_for_each(|host| self.launch(host))?;
        [0, 1].into_iter().try_for_each(|host| self.await_ready(host))
    }

    /// Starts the agent of one host, and does not wait.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(&mut self, host: usize) -> Result<()> {
        self.launch_as(host, &[])
    }

    /// The same, by way of another program that becomes the agent.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch_as(&mut self, host: usize, wrapper: &[&str]) -> Result<()> {
        let argv = [wrapper, &["mesh-agent", "run", "--config", CONFIG]].concat();
        self.agents[host] = Some(self.cluster.hosts()[host].spawn("mesh-agent", &argv)?);
        Ok(())
    }

    /// The running agent of a host.
    ///
    /// # Errors
    /// There is none.
    pub fn agent(&mut self, host: usize) -> Result<&mut Process> {
        self.agents[host].as_mut().with_context(|| format!("host {host} has no agent"))
    }

    /// Waits until an agent says that it is ready and all its tasks are armed.
    ///
    /// # Errors
    /// It does not within [`LIMIT`].
    pub fn await_ready(&self, host: usize) -> Result<()> {
        let ready = until(LIMIT, "the agent is ready", || {
            let said = self.ctl(host, &["status", "--json"])?;
            let Ok(status) = serde_json::from_str::<Value>(&said.stdout) else { return Ok(Err(said.stderr)) };
            let armed = status["tasks"].as_array().is_some_and(|all| all.iter().all(|task| task["armed"] == true));
            Ok(if status["ready"] == true && armed { Ok(()) } else { Err(said.stdout) })
        });
        ready.with_context(|| format!("log of host {host}: {}", self.last_words(host)))
    }

    /// Waits until the agent of a host lists `count` endpoints of a service.
    ///
    /// # Errors
    /// It does not within [`LIMIT`].
    pub fn await_endpoints(&self, host: usize, service: &str, count: usize) -> Result<()> {
        until(LIMIT, &format!("host {host} lists {count} endpoints of {service}"), || {
            let found = self.endpoints(host, service)?.len();
            Ok(if found == count { Ok(()) } else { Err(format!("{found}: {}", self.last_words(host))) })
        })
    }

    /// The endpoints of a service as the agent of a host lists them.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn endpoints(&self, host: usize, service: &str) -> Result<Vec<Value>> {
        let service = self.service(host, service)?;
        let ports = service["ports"].as_array().into_iter().flatten();
        Ok(ports.flat_map(|port| port["endpoints"].as_array().cloned().unwrap_or_default()).collect())
    }

    /// A service as the agent of a host lists it; `null` where it does not.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn service(&self, host: usize, name: &str) -> Result<Value> {
        let all = self.document(host, &["services"])?;
        let found = all["services"].as_array().and_then(|all| all.iter().find(|one| one["name"] == name).cloned());
        Ok(found.unwrap_or_default())
    }

    /// A command of the CLI.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn ctl(&self, host: usize, arguments: &[&str]) -> Result<Output> {
        self.host(host).exec(&[&["mesh-agent"], arguments].concat())
    }

    /// What the CLI says in JSON.
    ///
    /// # Errors
    /// It says none.
    pub fn document(&self, host: usize, arguments: &[&str]) -> Result<Value> {
        let said = self.ctl(host, &[arguments, &["--json"]].concat())?;
        serde_json::from_str(&said.stdout).with_context(|| format!("mesh-agent {arguments:?} said {said:?}"))
    }

    /// All that the agent of a host has written, in all its lives.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn log(&self, host: usize) -> Result<String> {
        let path = self.host(host).dir().join("mesh-agent.log");
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The lines of the access log of a host.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn access(&self, host: usize) -> Result<Vec<Value>> {
        let log = self.log(host)?;
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(lines.filter(|line| line["direction"].is_string()).collect())
    }

    /// Waits for a line of the access log, and returns it.
    ///
    /// # Errors
    /// None comes.
    pub fn await_access(&self, host: usize, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        until(LIMIT, &format!("host {host} logs {what}"), || {
            let lines = self.access(host)?;
            Ok(lines.iter().rfind(|line| is_it(line)).cloned().ok_or_else(|| format!("{:?}", lines.last())))
        })
    }

    /// The end of the agent's log without access lines.
    #[must_use]
    pub fn last_words(&self, host: usize) -> String {
        let log = self.log(host).unwrap_or_default();
        let lines: Vec<&str> =
            log.lines().filter(|line| !line.starts_with('{') || line.contains("\"level\"")).collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// Ends an agent with a signal and returns how it ended.
    ///
    /// # Errors
    /// It does not end.
    pub fn end(&mut self, host: usize, signal: Signal) -> Result<std::process::ExitStatus> {
        let agent = self.agent(host)?;
        agent.signal(signal)?;
        let status = agent.wait(LIMIT)?;
        self.agents[host] = None;
        Ok(status)
    }

    /// Resident memory of an agent in bytes: now, and the most it ever had.
    ///
    /// # Errors
    /// It does not run.
    pub fn memory(&mut self, host: usize) -> Result<(u64, u64)> {
        let pid = self.agent(host)?.pid()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("cannot read the agent's status")?;
        let of = |key: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).context("the status has the key")?;
            let kib = line.split_whitespace().next().context("the key has a value")?;
            Ok(kib.parse::<u64>()? << 10)
        };
        Ok((of("VmRSS:")?, of("VmHWM:")?))
    }

    /// Stops the agents as `systemctl stop` does, and removes everything; nothing may be left.
    ///
    /// # Errors
    /// Something does not end well, or is left.
    pub fn down(mut self) -> Result<()> {
        for host in [0, 1] {
            if self.agents[host].is_some() {
                let status = self.end(host, Signal::SIGTERM)?;
                ensure!(status.success(), "the agent ended with {status}: {}", self.last_words(host));
            }
        }
        let traces = self.cluster.traces();
        let Self { cluster, .. } = self;
        cluster.down()?;
        let left = traces.left_after(LIMIT / 4);
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    }
}

/// Makes a certificate authority on a host.
///
/// # Errors
/// The agent's command fails.
pub fn make_ca(host: &Host) -> Result<()> {
    host.run(&["mesh-agent", "ca", "init", "--trust-domain", TRUST_DOMAIN, "--out", "/etc/ecs-mesh"]).map(drop)
}

/// What the user-data script writes, and `more`.
#[must_use]
pub fn configuration(more: &str) -> String {
    format!(
        "[host]\ncluster = \"demo\"\nzone = \"z\"\n\n\
         [identity]\ntrust_domain = \"{TRUST_DOMAIN}\"\nca_bundle = \"/etc/ecs-mesh/ca-bundle.pem\"\n\
         join_token_file = \"/etc/ecs-mesh/join-token\"\n\n[services]\nfile = \"/etc/ecs-mesh/services.toml\"\n{more}\n"
    )
}

/// Where the agent is: as `cargo xtask test` says, else beside this test.
///
/// # Errors
/// There is none: it was not built.
pub fn agent_program() -> Result<PathBuf> {
    if let Some(path) = env::var_os("MESH_AGENT") {
        return Ok(path.into());
    }
    let test = env::current_exe().context("this program has no path")?;
    let path = test.ancestors().nth(2).context("cargo puts tests into a folder")?.join("mesh-agent");
    ensure!(path.exists(), "there is no {}: run `cargo build -p mesh-agent`, or `cargo xtask test`", path.display());
    Ok(path)
}

/// Cargo builds the programs of a package before its tests, and puts them there.
fn peer_program() -> Result<PathBuf> {
    let test = env::current_exe().context("this program has no path")?;
    Ok(test.ancestors().nth(2).context("cargo puts tests into a folder")?.join("peer"))
}

fn image(cluster: &Cluster) -> Result<Image> {
    let peer = peer_program()?;
    let peer = peer.to_str().context("the target folder's name is UTF-8")?;
    let programs = [
        ("/usr/bin/curl", "curl"),
        ("/usr/bin/dig", "dig"),
        ("/usr/bin/h2load", "h2load"),
        ("/usr/bin/nghttp", "nghttp"),
        ("/usr/bin/mariadb", "mariadb"),
        ("/usr/bin/redis-cli", "redis-cli"),
        ("/usr/bin/redis-check-rdb", "redis-server"),
        ("/usr/sbin/mariadbd", "mariadbd"),
        ("/usr/sbin/nghttpd", "nghttpd"),
        ("/usr/sbin/nginx", "nginx"),
        (peer, "peer"),
    ];
    Image::build(cluster.dir(), "tests/tools", &programs)
}

/// Time that something took, and its result.
pub fn timed<T>(what: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    (what(), began.elapsed())
}
