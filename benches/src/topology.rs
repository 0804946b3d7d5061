//! Four hosts on one network: two with agents and two without, each pair with the same tasks.
//!
//! Agents and their kernel programs never see a packet of the pair without them, so both can be measured in turn on
//! the same wire. Across hosts, tasks have an interface of their own on that wire (awsvpc mode), so the way from client
//! to server without a mesh is one hop, and a proxy beside a task is reached over loopback. On one host they are behind
//! its bridge, because there the mesh may connect them directly. It must not know any proxy.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
};

use anyhow::{Context as _, Result};
use mesh_lab::{Cluster, Host, Image, Mode, Process, Task, TaskSpec};

/// What the servers serve, and where.
pub const HTTP: u16 = 8080;
/// The same server, as a port that the mesh is told nothing of but bytes.
pub const HTTP_AS_BYTES: u16 = 8081;
/// HTTP/2 in clear, likewise.
pub const HTTP2: u16 = 8082;
pub const HTTP2_AS_BYTES: u16 = 8083;
/// iperf3.
pub const BULK: u16 = 5201;
/// Every byte comes back.
pub const ECHO: u16 = 9000;

/// Every answer but the large one.
pub const SMALL_ANSWER: usize = 100;
/// Of `/large`.
pub const LARGE_ANSWER: usize = 10_000_000;

/// Every port of a server.
const SERVED: [u16; 6] = [HTTP, HTTP_AS_BYTES, HTTP2, HTTP2_AS_BYTES, BULK, ECHO];

/// The family of tasks, which is the name of their service too.
pub const NEAR: &str = "near";
pub const FAR: &str = "far";

const IMAGE: &str = "benches/tools";

/// The hosts and what runs on them.
#[derive(Debug)]
pub struct Topology {
    pub cluster: Cluster,
    /// Hosts 0 and 1, which get agents.
    pub meshed: Pair,
    /// Hosts 2 and 3, where nothing of ours runs.
    pub plain: Pair,
}

/// Two hosts: two clients and a server on the first, a server on the second.
#[derive(Debug)]
pub struct Pair {
    /// Where in the cluster the first of them is.
    first: usize,
    client: Task,
    neighbour: Task,
    near: Task,
    /// Of the near server on its host's bridge.
    near_address: Ipv4Addr,
    far: Task,
}

/// Which task of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// Calls the far server.
    Client,
    /// Calls the near server.
    Neighbour,
    Near,
    Far,
}

impl Topology {
    /// Makes the hosts and starts the tasks. `probe` is this crate's own program of that name.
    ///
    /// # Errors
    /// The lab cannot be made here, or a program is not installed.
    pub fn up(probe: &Path) -> Result<Self> {
        let cluster = Cluster::without_docker(4)?;
        let probe = probe.to_str().context("the target folder's name is UTF-8")?;
        let programs = [
            ("/usr/bin/curl", "curl"),
            ("/usr/bin/h2load", "h2load"),
            ("/usr/bin/iperf3", "iperf3"),
            ("/usr/sbin/nghttpd", "nghttpd"),
            ("/usr/bin/wrk", "wrk"),
            ("/usr/sbin/nginx", "nginx"),
            (probe, "probe"),
        ];
        let image = Image::build(cluster.dir(), IMAGE, &programs)?;
        cluster.import(&image)?;
        let meshed = Pair::up(&cluster, 0, image.name())?;
        let plain = Pair::up(&cluster, 2, image.name())?;
        Ok(Self { cluster, meshed, plain })
    }

    /// Starts tasks that do nothing on the first host until it has `count` in all.
    ///
    /// # Errors
    /// One cannot be started.
    pub fn crowd(&self, count: usize) -> Result<()> {
        // Client, neighbour and near server are there already.
        for number in 3..count {
            let spec = TaskSpec::new(&format!("idle-{number}"), IMAGE, &["sleep", "2147483647"]);
            self.cluster.hosts()[0].run_task(&spec)?;
        }
        Ok(())
    }

    /// Removes everything.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn down(self) -> Result<()> {
        self.cluster.down()
    }
}

impl Pair {
    fn up(cluster: &Cluster, first: usize, image: &str) -> Result<Self> {
        let hosts = cluster.hosts();
        let start = |host: usize, family: &str, mode: Mode, command: &[&str]| {
            let mut spec = TaskSpec::new(family, image, command).mode(mode);
            if [NEAR, FAR].contains(&family) {
                spec = SERVED.into_iter().fold(spec, TaskSpec::port);
            }
            hosts[host].run_task(&spec)
        };
        let configuration = server_configuration();
        let serve = ["sh", "-c", SERVER, &configuration];
        let idle = ["sleep", "2147483647"];
        let near = start(first, NEAR, Mode::Bridge, &serve)?;
        let said = hosts[first].run_in(&near, &["ip", "-4", "-o", "addr", "show", "dev", "eth0"])?;
        let pair = Self {
            first,
            client: start(first, "client", Mode::Awsvpc, &idle)?,
            neighbour: start(first, "neighbour", Mode::Bridge, &idle)?,
            near,
            near_address: address_in(&said).with_context(|| format!("no address in {said:?}"))?,
            far: start(first + 1, FAR, Mode::Awsvpc, &serve)?,
        };
        pair.await_servers(cluster)?;
        Ok(pair)
    }

    /// Until each port of both servers accepts.
    fn await_servers(&self, cluster: &Cluster) -> Result<()> {
        for (client, server) in [(Seat::Neighbour, Seat::Near), (Seat::Client, Seat::Far)] {
            for port in SERVED {
                let at = SocketAddrV4::new(self.address(server), port).to_string();
                self.ask(cluster, client, &["probe", "await", &at]).context("a server does not start")?;
            }
        }
        Ok(())
    }

    #[must_use]
    pub fn task(&self, seat: Seat) -> &Task {
        match seat {
            Seat::Client => &self.client,
            Seat::Neighbour => &self.neighbour,
            Seat::Near => &self.near,
            Seat::Far => &self.far,
        }
    }

    #[must_use]
    pub fn host<'a>(&self, cluster: &'a Cluster, seat: Seat) -> &'a Host {
        match seat {
            Seat::Client | Seat::Neighbour | Seat::Near => &cluster.hosts()[self.first],
            Seat::Far => &cluster.hosts()[self.first + 1],
        }
    }

    /// Where a server is reached without any mesh by its client.
    #[must_use]
    pub fn address(&self, server: Seat) -> Ipv4Addr {
        if server == Seat::Near { self.near_address } else { self.task(server).address }
    }

    /// Runs a command in a client's container; it must succeed. Returns its standard output.
    ///
    /// # Errors
    /// It failed.
    pub fn ask(&self, cluster: &Cluster, client: Seat, argv: &[&str]) -> Result<String> {
        self.host(cluster, client).run_in(self.task(client), argv)
    }

    /// Starts a program of the machine beside a task, in its network: as a sidecar.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn beside(&self, cluster: &Cluster, seat: Seat, name: &str, argv: &[&str]) -> Result<Process> {
        let pause = self.task(seat).pause.as_deref().context("a task in awsvpc mode has a pause container")?;
        let network = format!("--net=/run/docker/netns/{}", &pause[..12]);
        self.host(cluster, seat).spawn(name, &[&["nsenter", &network, "--"], argv].concat())
    }

    /// Runs a program of the machine beside a task to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run_beside(&self, cluster: &Cluster, seat: Seat, argv: &[&str]) -> Result<mesh_lab::Output> {
        let pause = self.task(seat).pause.as_deref().context("a task in awsvpc mode has a pause container")?;
        let network = format!("--net=/run/docker/netns/{}", &pause[..12]);
        self.host(cluster, seat).exec(&[&["nsenter", &network, "--"], argv].concat())
    }
}

/// In a line of `ip -o addr`.
fn address_in(line: &str) -> Option<Ipv4Addr> {
    line.split_whitespace().find_map(|word| word.split_once('/')?.0.parse().ok())
}

/// `$0` is nginx's configuration. HTTP/2 is nghttpd's: it answers a call when it has all of it, as gRPC servers do; nginx's
/// own early answer is followed by a reset of the stream, which nginx as a proxy takes for a fault.
const SERVER: &str = "printf '%s\\n' \"$0\" >/tmp/nginx.conf
mkdir -p /tmp/www/bench.Hello && head -c 10000000 /dev/zero | tr '\\0' x >/tmp/www/large
head -c 100 /tmp/www/large >/tmp/www/bench.Hello/Say
nghttpd --no-tls -n 2 -d /tmp/www 8082 >/dev/null 2>&1 &
nghttpd --no-tls -n 2 -d /tmp/www 8083 >/dev/null 2>&1 &
iperf3 -s -p 5201 >/dev/null 2>&1 &
probe echo 9000 &
exec nginx -e stderr -c /tmp/nginx.conf";

/// Answers at once, whatever is asked; the marker is what no wire of a mesh may show.
fn server_configuration() -> String {
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path /tmp/{kind};"))
        .join(" ");
    let answer = "a".repeat(SMALL_ANSWER);
    format!(
        "user root; daemon off; worker_processes auto; worker_rlimit_nofile 8192; error_log stderr; pid /tmp/nginx.pid;
events {{ worker_connections 4096; }}
http {{
    access_log off; sendfile on; tcp_nopush on; {temporary}
    keepalive_requests 1000000000; keepalive_timeout 1h;
    server {{
        listen {HTTP} backlog=4096; listen {HTTP_AS_BYTES} backlog=4096;
        root /tmp/www;
        location / {{ default_type text/plain; return 200 \"{answer}\"; }}
        location = /large {{ default_type application/octet-stream; }}
        location = /marker {{ default_type text/plain; return 200 \"{MARKER_ANSWER}\"; }}
    }}
}}"
    )
}

/// Texts that are looked for on the wire: one that the client sends, one that the server answers.
pub const MARKER_QUESTION: &str = "marker-question-7c1f9e52";
pub const MARKER_ANSWER: &str = "marker-answer-b83d60a4";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_in_what_ip_says() {
        let said = "7: eth0    inet 172.17.0.4/16 scope global eth0\n";
        assert_eq!(address_in(said), Some(Ipv4Addr::new(172, 17, 0, 4)));
        assert_eq!(address_in("7: eth0"), None);
    }
}
