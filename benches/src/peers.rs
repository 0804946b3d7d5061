//! What a user could install instead: pairs of proxies that put mutual TLS between two hosts.
//!
//! Each is configured as its manual says, with keep-alive to both sides, as many workers as CPUs, TLS 1.3 only, and
//! no access log; and it sits where it has the shortest way, in the network of the task that it serves. A peer is a
//! file below; it writes configurations and must not know where they run.

mod envoy;
mod haproxy;
mod linkerd;
mod nginx;
mod ztunnel;

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
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
pub const ALL: [Peer; 9] =
    [nginx::L7, nginx::L4, haproxy::L7, haproxy::L4, envoy::L7, envoy::L4, ztunnel::L4, linkerd::L7, linkerd::L4];

/// For a proxy that asks a control plane first, until it says that it is ready.
const LIMIT: Duration = Duration::from_secs(20);

/// Programs that are not in the search path.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    pub envoy: Option<PathBuf>,
    pub ztunnel: Option<PathBuf>,
    pub linkerd: Option<Linkerd>,
}

/// Linkerd's proxy, and what answers it in place of Linkerd's control plane.
#[derive(Clone, Debug)]
pub struct Linkerd {
    pub proxy: PathBuf,
    pub control: PathBuf,
}

/// One of the two proxies of a pair.
struct Half<'a> {
    side: Side,
    lanes: Vec<Lane>,
    own: &'a Leaf,
    /// Who signs for a proxy that asks for its certificate.
    issuer: &'a Leaf,
    /// Who may have issued the other side's certificate.
    root: &'a Path,
    ends: Ends,
    /// Where it may put files.
    dir: &'a Path,
    /// Ten that are free on both sides: those of the caller's lanes first.
    first_port: u16,
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
    control: Option<Control>,
}

/// What a proxy asks before it takes anything, and has to find when it starts.
struct Control {
    /// `{}` stands for the file.
    argv: Vec<String>,
    listens: SocketAddr,
    /// The proxy that asks, and where it then says whether it is ready.
    program: String,
    ready: SocketAddr,
}

/// What each lane serves, in the order of its port.
const SERVED: [u16; 4] = [HTTP, HTTP2, BULK, ECHO];

/// What of the range is on the wire is so far from what is beside the caller.
const WIRE: u16 = 1000;

/// A running pair of proxies.
#[derive(Debug)]
pub struct Running {
    pub peer: Peer,
    caller: Proxy,
    called: Proxy,
    first_port: u16,
}

/// One of the two.
#[derive(Debug)]
struct Proxy {
    process: Process,
    /// Not counted: it has nothing to do once the proxy knows what it asked for.
    control: Option<Process>,
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
            "linkerd" | "linkerd-tcp" if programs.linkerd.is_none() => {
                Some("no package carries its proxy; name a program with --linkerd, or see the figures from elsewhere")
            }
            _ => None,
        }
    }

    /// Whether whoever runs this has named its program, and so wants it or nothing.
    #[must_use]
    pub fn is_named(&self, programs: &Programs) -> bool {
        match self.name {
            "ztunnel" => programs.ztunnel.is_some(),
            "linkerd" | "linkerd-tcp" => programs.linkerd.is_some(),
            _ => false,
        }
    }

    /// Whether it takes the ports and certificates that it is given; else it has its own.
    #[must_use]
    pub fn is_configurable(&self) -> bool {
        self.name != ztunnel::L4.name
    }

    /// Whether its called side lets in who speaks HTTP/1.1 over TLS; else what to ask with, and for which port.
    #[must_use]
    pub fn knocker(&self, programs: &Programs) -> Option<PathBuf> {
        let control = programs.linkerd.as_ref().map(|linkerd| linkerd.control.clone());
        control.filter(|_| self.name == linkerd::L4.name)
    }

    /// Where the client's connections to it go, if they are redirected.
    fn virtual_address(&self) -> Option<Ipv4Addr> {
        match self.name {
            "ztunnel" => Some(ztunnel::VIRTUAL),
            "linkerd" | "linkerd-tcp" => Some(linkerd::VIRTUAL),
            _ => None,
        }
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
        let start = |side: Side| -> Result<Proxy> {
            let lanes = (0..).zip(self.lanes()).map(|(lane, &served)| {
                let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                let wire = SocketAddr::from((far, first_port + WIRE + lane));
                let (listen, to) = match side {
                    Side::Caller => (local(first_port + lane), wire),
                    Side::Called => (wire, local(served)),
                };
                Lane { speaks: self.speaks(served), listen, to, serves: served }
            });
            let (seat, name, own, authority) = match side {
                Side::Caller => (Seat::Client, "caller", &caller.caller, caller),
                Side::Called => (Seat::Far, "called", &called.called, called),
            };
            let dir = topology.cluster.dir().join(format!("{}-{index}-{name}", self.name));
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            let ends = Ends { caller: topology.plain.address(Seat::Client), called: far };
            let Authority { issuer, root, .. } = authority;
            let half = Half { side, lanes: lanes.collect(), own, issuer, root, ends, dir: &dir, first_port };
            let launch = (self.launch)(&half, programs);
            let file = dir.join(launch.file);
            fs::write(&file, launch.text).with_context(|| format!("cannot write {}", file.display()))?;
            for command in &launch.before {
                let command: Vec<&str> = command.iter().map(String::as_str).collect();
                let said = topology.plain.run_beside(&topology.cluster, seat, &command)?;
                ensure!(said.ok(), "{} needs `{}`: {said:?}", self.name, command.join(" "));
            }
            let spawn = |name: &str, argv: &[String]| {
                let argv: Vec<String> = argv.iter().map(|word| word.replace("{}", &file.to_string_lossy())).collect();
                let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
                topology.plain.beside(&topology.cluster, seat, name, &argv)
            };
            let name = format!("{}-{index}-{name}", self.name);
            let Some(control) = launch.control else {
                return Ok(Proxy { process: spawn(&name, &launch.argv)?, control: None });
            };
            let mut answering = spawn(&format!("{name}-control"), &control.argv)?;
            await_control(topology, seat, &mut answering, control.listens)?;
            let mut proxy = Proxy { process: spawn(&name, &launch.argv)?, control: Some(answering) };
            proxy
                .await_ready(topology, seat, control.ready)
                .with_context(|| format!("{name}: `{}`", control.program))?;
            Ok(proxy)
        };
        let (called, caller) = (start(Side::Called)?, start(Side::Caller)?);
        let mut running = Running { peer: self, caller, called, first_port };
        running.await_ready(topology)?;
        Ok(running)
    }
}

/// Until what a proxy will ask can be asked: some wait long before they ask again.
fn await_control(topology: &Topology, seat: Seat, control: &mut Process, at: SocketAddr) -> Result<()> {
    let asked = topology.plain.ask(&topology.cluster, seat, &["probe", "await", &at.to_string()]);
    asked.map(|_| ()).with_context(|| format!("nothing answers the proxy on {at}; its log:\n{}", control.last_words()))
}

impl Proxy {
    /// Until it says that it is ready, which it is when it has its certificate.
    fn await_ready(&mut self, topology: &Topology, seat: Seat, at: SocketAddr) -> Result<()> {
        let url = format!("http://{at}/ready");
        let since = Instant::now();
        let fault = loop {
            let said = topology.plain.run_beside(&topology.cluster, seat, &["curl", "-sSf", "-m", "2", &url])?;
            if said.ok() {
                return Ok(());
            }
            if !self.process.is_alive() {
                let status = self.process.wait(Duration::from_secs(1))?;
                break format!("it has ended with {status}");
            }
            if since.elapsed() > LIMIT {
                break format!("{url} says {:?} after {} s", said.stderr.trim(), LIMIT.as_secs());
            }
            // It tells nobody when it is.
            thread::sleep(Duration::from_millis(50));
        };
        let control = self.control.as_ref().map(Process::last_words).unwrap_or_default();
        Err(does_not_start(&fault, &self.process.last_words(), &control))
    }
}

fn does_not_start(fault: &str, log: &str, control: &str) -> Error {
    let told = |log: &str| if log.trim().is_empty() { "(nothing)".to_owned() } else { log.to_owned() };
    anyhow!(
        "the proxy does not get ready: {fault}. Most likely the program is another one, or a version that wants other \
         settings; name one of those that docs/performance.md says, built for this machine.\nIts log ends with:\n{}\n\
         That of what answers it:\n{}",
        told(log),
        told(control),
    )
}

impl Running {
    fn await_ready(&mut self, topology: &Topology) -> Result<()> {
        let far = topology.plain.address(Seat::Far);
        for lane in (0_u16..).take(self.peer.lanes().len()) {
            let called = if self.peer.is_configurable() { self.first_port + WIRE + lane } else { self.tls() };
            for at in [self.entrance(self.first_port + lane).to_string(), format!("{far}:{called}")] {
                if let Err(error) = topology.plain.ask(&topology.cluster, Seat::Client, &["probe", "await", &at]) {
                    let words = [&self.caller, &self.called].map(|proxy| proxy.process.last_words()).join("\n--\n");
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
        let roots = [self.caller.process.pid()?, self.called.process.pid()?];
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
        match self.peer.name {
            "ztunnel" => ztunnel::HBONE,
            "linkerd-tcp" => self.first_port + linkerd::INBOUND,
            _ => self.lane(),
        }
    }

    /// Which port of the called task that is for, where the one that takes TLS is for all.
    #[must_use]
    pub fn lane(&self) -> u16 {
        self.first_port + WIRE
    }

    /// Where the client finds the calling side's port.
    fn entrance(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.peer.virtual_address().unwrap_or(Ipv4Addr::LOCALHOST), port))
    }
}

/// What brings connections to `address`, which exists only for that, to a proxy's port: those to `ports`, or to all.
fn redirected(address: Ipv4Addr, ports: Option<RangeInclusive<u16>>, to: u16) -> Vec<Vec<String>> {
    let route = format!("ip route replace {address}/32 dev eth0");
    vec![words(&route), redirect("OUTPUT", &format!("-d {address}"), ports, to)]
}

/// A rule of `iptables`.
fn redirect(chain: &str, matching: &str, ports: Option<RangeInclusive<u16>>, to: u16) -> Vec<String> {
    let ports = ports.map(|ports| format!("--dport {}:{} ", ports.start(), ports.end())).unwrap_or_default();
    words(&format!("iptables -w -t nat -A {chain} -p tcp {matching} {ports}-j REDIRECT --to-ports {to}"))
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_that_does_not_start_is_shown_with_what_it_said() {
        let said = does_not_start("it has ended with exit status: 64", "LINKERD2_PROXY_X must be set.", "").to_string();
        for part in ["exit status: 64", "LINKERD2_PROXY_X must be set.", "docs/performance.md", "(nothing)"] {
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn who_has_no_program_is_told_how_to_name_it_and_who_named_one_wants_it() {
        let linkerd = Linkerd { proxy: "proxy".into(), control: "control".into() };
        let named = Programs { linkerd: Some(linkerd), ..Programs::default() };
        for peer in [linkerd::L7, linkerd::L4] {
            assert!(peer.lacks(&Programs::default()).is_some_and(|lack| lack.contains("--linkerd")));
            assert!(!peer.is_named(&Programs::default()));
            assert!(peer.lacks(&named).is_none() && peer.is_named(&named));
        }
        assert!(!nginx::L7.is_named(&named));
    }
}
