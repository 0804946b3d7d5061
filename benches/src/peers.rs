//! What a user could install instead: pairs of proxies that put mutual TLS between two hosts.
//!
//! Each is configured as its manual says, with keep-alive to both sides, as many workers as CPUs, TLS 1.3 only, and
//! no access log; and it sits where it has the shortest way, in the network of the task that it serves. A peer is a
//! file below; it writes configurations and must not know where they run.

mod envoy;
mod haproxy;
mod nginx;
mod ztunnel;

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_lab::Process;

use crate::{
    certificates::{Authority, Leaf},
    load::Target,
    topology::{BULK, ECHO, HTTP, HTTP2, Seat, Topology},
    usage,
};

/// What a peer understands of what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Bytes.
    L4,
    /// HTTP requests.
    L7,
}

/// A product in one of its modes.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub name: &'static str,
    pub layer: Layer,
    /// Writes the configuration of one of the two proxies.
    launch: fn(&Half<'_>, &Programs) -> Launch,
}

/// Every peer that there is.
pub const ALL: [Peer; 7] = [nginx::L7, nginx::L4, haproxy::L7, haproxy::L4, envoy::L7, envoy::L4, ztunnel::L4];

/// Programs that are not in the search path.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    pub envoy: Option<PathBuf>,
    pub ztunnel: Option<PathBuf>,
}

/// One of the two proxies of a pair.
struct Half<'a> {
    side: Side,
    lanes: Vec<Lane>,
    own: &'a Leaf,
    /// Who may have issued the other side's certificate.
    root: &'a Path,
    ends: Ends,
    /// Where it may put files.
    dir: &'a Path,
}

/// The addresses of the two tasks on the wire.
#[derive(Clone, Copy, Debug)]
struct Ends {
    caller: Ipv4Addr,
    called: Ipv4Addr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Plain in, TLS out.
    Caller,
    /// TLS in, plain out.
    Called,
}

/// A port and where it leads.
#[derive(Clone, Copy, Debug)]
struct Lane {
    speaks: Speaks,
    listen: SocketAddr,
    to: SocketAddr,
    /// The server's port at its end.
    serves: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaks {
    Http1,
    Http2,
    Bytes,
}

/// A configuration file and the command that reads it.
struct Launch {
    file: &'static str,
    text: String,
    /// `{}` stands for the file.
    argv: Vec<String>,
    /// What has to be done in the task's network before.
    before: Vec<Vec<String>>,
}

/// What each lane serves, in the order of its port.
const SERVED: [u16; 4] = [HTTP, HTTP2, BULK, ECHO];

/// A running pair of proxies.
#[derive(Debug)]
pub struct Running {
    pub peer: Peer,
    caller: Process,
    called: Process,
    first_port: u16,
}

impl Peer {
    fn lanes(&self) -> &'static [u16] {
        match self.layer {
            Layer::L7 => &SERVED[..2],
            Layer::L4 => &SERVED,
        }
    }

    fn speaks(&self, served: u16) -> Speaks {
        match (self.layer, served) {
            (Layer::L4, _) => Speaks::Bytes,
            (Layer::L7, HTTP2) => Speaks::Http2,
            (Layer::L7, _) => Speaks::Http1,
        }
    }

    /// Why it cannot be measured: its program is no Debian package, and was not named.
    #[must_use]
    pub fn lacks(&self, programs: &Programs) -> Option<&'static str> {
        match self.name {
            "envoy" | "envoy-tcp" if programs.envoy.is_none() => Some("MESH_ENVOY names no program"),
            "ztunnel" if programs.ztunnel.is_none() => {
                Some("no package carries it; name a program with --ztunnel, or see the figures from elsewhere")
            }
            _ => None,
        }
    }

    /// Whether it takes the ports and certificates that it is given; else it has its own.
    #[must_use]
    pub fn is_configurable(&self) -> bool {
        self.name != ztunnel::L4.name
    }

    /// Starts both proxies beside client and far server of the pair without agents, and waits until they accept.
    /// `index` keeps the ports of peers apart. The caller shows the certificate of `caller`, the called that of `called`.
    ///
    /// # Errors
    /// A proxy does not start.
    pub fn start(
        self,
        topology: &Topology,
        programs: &Programs,
        index: u16,
        caller: &Authority,
        called: &Authority,
    ) -> Result<Running> {
        let first_port = 21_000 + index * 10;
        let far = topology.plain.address(Seat::Far);
        let start = |side: Side| -> Result<Process> {
            let lanes = (0..).zip(self.lanes()).map(|(lane, &served)| {
                let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                let wire = SocketAddr::from((far, first_port + 1000 + lane));
                let (listen, to) = match side {
                    Side::Caller => (local(first_port + lane), wire),
                    Side::Called => (wire, local(served)),
                };
                Lane { speaks: self.speaks(served), listen, to, serves: served }
            });
            let (seat, name, own, root) = match side {
                Side::Caller => (Seat::Client, "caller", &caller.caller, &caller.root),
                Side::Called => (Seat::Far, "called", &called.called, &called.root),
            };
            let dir = topology.cluster.dir().join(format!("{}-{index}-{name}", self.name));
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            let ends = Ends { caller: topology.plain.address(Seat::Client), called: far };
            let half = Half { side, lanes: lanes.collect(), own, root, ends, dir: &dir };
            let launch = (self.launch)(&half, programs);
            let file = dir.join(launch.file);
            fs::write(&file, launch.text).with_context(|| format!("cannot write {}", file.display()))?;
            for command in &launch.before {
                let command: Vec<&str> = command.iter().map(String::as_str).collect();
                let said = topology.plain.run_beside(&topology.cluster, seat, &command)?;
                ensure!(said.ok(), "{} needs `{}`: {said:?}", self.name, command.join(" "));
            }
            let argv: Vec<String> =
                launch.argv.iter().map(|word| word.replace("{}", &file.to_string_lossy())).collect();
            let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
            topology.plain.beside(&topology.cluster, seat, &format!("{}-{index}-{name}", self.name), &argv)
        };
        let (called, caller) = (start(Side::Called)?, start(Side::Caller)?);
        let mut running = Running { peer: self, caller, called, first_port };
        running.await_ready(topology)?;
        Ok(running)
    }
}

impl Running {
    fn await_ready(&mut self, topology: &Topology) -> Result<()> {
        let far = topology.plain.address(Seat::Far);
        for lane in (0_u16..).take(self.peer.lanes().len()) {
            let called = if self.peer.is_configurable() { self.tls() + lane } else { self.tls() };
            for at in [self.entrance(self.first_port + lane).to_string(), format!("{far}:{called}")] {
                if let Err(error) = topology.plain.ask(&topology.cluster, Seat::Client, &["probe", "await", &at]) {
                    let words = [self.caller.last_words(), self.called.last_words()].join("\n--\n");
                    bail!("{} does not listen on {at}: {error:#}\n{words}", self.peer.name);
                }
            }
        }
        Ok(())
    }

    /// All its processes.
    ///
    /// # Errors
    /// A proxy has ended.
    pub fn pids(&self) -> Result<BTreeSet<u32>> {
        let roots = [self.caller.pid()?, self.called.pid()?];
        Ok(roots.into_iter().flat_map(usage::tree).collect())
    }

    /// Where the client finds it.
    #[must_use]
    pub fn target(&self) -> Target {
        let port = |served: u16| (0_u16..).zip(SERVED).find(|(_, each)| *each == served).map_or(0, |(lane, _)| lane);
        let at = |served: u16| self.entrance(self.first_port + port(served)).to_string();
        let bytes = self.peer.layer == Layer::L4;
        Target {
            http: at(HTTP),
            http2: at(HTTP2),
            bulk: bytes.then(|| (self.entrance(0).ip().to_string(), self.first_port + port(BULK))),
            echo: bytes.then(|| at(ECHO)),
        }
    }

    /// Where its TLS is, for the HTTP lane.
    #[must_use]
    pub fn tls(&self) -> u16 {
        if self.peer.is_configurable() { self.first_port + 1000 } else { ztunnel::HBONE }
    }

    /// Where the client finds the calling side's port.
    fn entrance(&self, port: u16) -> SocketAddr {
        if self.peer.is_configurable() {
            SocketAddr::from((Ipv4Addr::LOCALHOST, port))
        } else {
            ztunnel::entrance(port)
        }
    }
}
