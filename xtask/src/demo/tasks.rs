//! The tasks of the demo: ordinary containers of ordinary programs that know nothing of a mesh.
//!
//! It must not know the agent; the file of services it writes is what a registry would say.

use std::{fmt::Write as _, net::SocketAddrV4};

use anyhow::{Context as _, Result};
use mesh_lab::{Cluster, Host, Image, Mode, Task, TaskSpec};

use super::show::Show;

/// Container port of the HTTP servers. Not the port that clients say, which is 80.
pub(super) const HTTP: u16 = 8080;
pub(super) const REDIS: u16 = 6379;

/// A task, where it runs, and the name it gives itself in its answers.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) label: String,
    /// 0 is host 1.
    pub(super) host: usize,
    pub(super) task: Task,
}

impl Placed {
    pub(super) fn on<'a>(&self, cluster: &'a Cluster) -> &'a Host {
        &cluster.hosts()[self.host]
    }

    pub(super) fn at(&self, port: u16) -> Result<SocketAddrV4> {
        self.task.published(port).with_context(|| format!("{} does not publish {port}", self.label))
    }

    /// The sentence that it answers with.
    pub(super) fn answer(&self) -> String {
        answer(&self.task.family, &self.label, self.host)
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Tasks {
    /// Clients on host 1: bridge, host and awsvpc mode.
    pub(super) web: Placed,
    pub(super) host_client: Placed,
    pub(super) vpc_client: Placed,
    /// Host 1 bridge, host 2 bridge, host 2 awsvpc.
    pub(super) worlds: Vec<Placed>,
    /// Host 1, host 2.
    pub(super) caches: Vec<Placed>,
}

impl Tasks {
    pub(super) fn start(cluster: &Cluster, image: &Image, show: &Show) -> Result<Self> {
        let idle = |family: &str| TaskSpec::new(family, image.name(), &["sleep", "2147483647"]);
        let place = |host: usize, label: &str, spec: TaskSpec| -> Result<Placed> {
            let task = cluster.hosts()[host].run_task(&spec)?;
            let ports: Vec<_> = task.ports.iter().map(|port| format!(":{} at {}", port.container, port.at)).collect();
            let mode = format!("{:?}", spec.mode).to_lowercase();
            show.note(&format!("host {}  {label:<12} {mode:<7} {}", host + 1, ports.join(", ")));
            Ok(Placed { label: label.to_owned(), host, task })
        };
        let world = |label: &str, host| http_server("world", label, host, image, HTTP);
        let cache = || {
            let redis = ["redis-server", "--save", "", "--appendonly", "no", "--protected-mode", "no"];
            TaskSpec::new("cache", image.name(), &redis).port(REDIS)
        };
        Ok(Self {
            web: place(0, "web", idle("web"))?,
            host_client: place(0, "client-host", idle("client-host").mode(Mode::Host))?,
            vpc_client: place(0, "client-vpc", idle("client-vpc").mode(Mode::Awsvpc))?,
            worlds: vec![
                place(0, "world-1", world("world-1", 0))?,
                place(1, "world-2", world("world-2", 1))?,
                place(1, "world-3", world("world-3", 1).mode(Mode::Awsvpc))?,
            ],
            caches: vec![place(0, "cache-1", cache())?, place(1, "cache-2", cache())?],
        })
    }

    /// Lets each redis say which one it is.
    pub(super) fn name_the_caches(&self, cluster: &Cluster) -> Result<()> {
        for cache in &self.caches {
            let said = cache.on(cluster).run_in(&cache.task, &["redis-cli", "SET", "who", &cache.answer()])?;
            anyhow::ensure!(said.trim() == "OK", "{} said {said:?}", cache.label);
        }
        Ok(())
    }

    /// What a registry would tell the agent of `host`: the services, and their endpoints on the other hosts.
    pub(super) fn services_file(&self, cluster: &Cluster, host: usize) -> Result<String> {
        let mut text = "# Made by the demo: what a registry would say to this host.\n".to_owned();
        for (name, placed, port, target, protocol, death, tls) in [
            ("world", &self.worlds, 80, HTTP, "http", "open", "permissive"),
            ("cache", &self.caches, REDIS, REDIS, "tcp", "closed", "strict"),
        ] {
            write!(
                text,
                "\n[[service]]\nname = \"{name}\"\ntls = \"{tls}\"\non_agent_death = \"{death}\"\n\
                 ports = [ {{ port = {port}, target = {target}, protocol = \"{protocol}\" }} ]\n"
            )?;
            for each in placed.iter().filter(|each| each.host != host) {
                // An awsvpc task has an address of its own, and the agent listens there too.
                let agent = match each.task.mode {
                    Mode::Awsvpc => each.task.address,
                    Mode::Bridge | Mode::Host => each.on(cluster).address(),
                };
                write!(text, "[[service.endpoint]]\naddress = \"{}\"\nagent = \"{agent}:15008\"\n", each.at(target)?)?;
            }
        }
        Ok(text)
    }
}

/// An nginx that says which task it is.
pub(super) fn http_server(family: &str, label: &str, host: usize, image: &Image, port: u16) -> TaskSpec {
    let temporary =
        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|kind| format!("{kind}_temp_path /tmp/{kind};"));
    let conf = format!(
        "user root; daemon off; error_log stderr; pid /tmp/nginx.pid; events {{}}\n\
         http {{ access_log off; default_type text/plain; {}\n\
         server {{ listen {port}; location / {{ return 200 \"{}\\n\"; }} }} }}",
        temporary.join(" "),
        answer(family, label, host),
    );
    let script = "printf '%s\\n' \"$0\" >/tmp/nginx.conf && exec nginx -c /tmp/nginx.conf";
    TaskSpec::new(family, image.name(), &["sh", "-c", script, &conf]).port(port)
}

fn answer(family: &str, label: &str, host: usize) -> String {
    format!("{family} from {label} on host {}", host + 1)
}
