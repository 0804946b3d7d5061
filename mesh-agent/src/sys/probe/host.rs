//! What the host must offer: free ports, a sane clock, Docker, the ECS agent, secrets that are secret.
//!
//! Must not know what is served on the ports, nor what is in the secrets.
#![expect(unsafe_code, reason = "adjtimex has no safe wrapper")]

use std::{
    fs,
    io::{self, Read as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::libc;

use super::{Finding, Settings, Verdict, parse, read};

/// How long a neighbour may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// More than a neighbour says about itself.
const LONGEST_ANSWER: u64 = 64 * 1024;
/// 2024-01-01T00:00:00Z. A clock before that was never set, and every certificate would seem not valid yet.
const SANE: Duration = Duration::from_secs(1_704_067_200);

/// Whether somebody answers on the admin socket.
pub(super) fn agent_runs(admin_socket: &Path) -> bool {
    UnixStream::connect(admin_socket).is_ok()
}

/// The ports that the agent needs on the host: free, and not given away by the kernel.
pub(super) fn ports(settings: &Settings, running: bool) -> Vec<Finding> {
    let loopback = |port| [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()];
    let tcp = |addr: &SocketAddr| TcpListener::bind(addr).map(drop);
    let udp = |addr: &SocketAddr| UdpSocket::bind(addr).map(drop);
    let wanted = [
        (settings.tunnel_listen.port(), "tcp", "proxy.tunnel_listen", bind(&[settings.tunnel_listen], tcp)),
        (settings.metrics.port(), "tcp", "admin.metrics", bind(&[settings.metrics], tcp)),
        (settings.outbound_port, "tcp", "proxy.outbound_port", bind(&loopback(settings.outbound_port), tcp)),
        (settings.dns_port, "tcp", "dns.port", bind(&loopback(settings.dns_port), tcp)),
        (settings.dns_port, "udp", "dns.port", bind(&loopback(settings.dns_port), udp)),
    ];
    let ephemeral = Ephemeral::read();
    wanted
        .into_iter()
        .map(|(port, protocol, key, bound)| port_finding(port, protocol, key, bound, &ephemeral, running))
        .collect()
}

fn port_finding(
    port: u16,
    protocol: &str,
    key: &str,
    bound: Result<(), (SocketAddr, io::Error)>,
    ephemeral: &Ephemeral,
    running: bool,
) -> Finding {
    let name = format!("port {port}/{protocol}");
    match bound {
        Err((_, error)) if error.kind() == io::ErrorKind::AddrInUse && running => {
            Finding::ok(name, "in use by the running agent")
        }
        Err((addr, error)) if error.kind() == io::ErrorKind::AddrInUse => Finding::fail(
            name,
            format!("{addr} is in use"),
            format!("`ss -lnp sport = :{port}` names the process: stop it, or set `{key}` to a free port"),
        ),
        Err((addr, error)) => {
            Finding::fail(name, format!("cannot listen on {addr}: {error}"), format!("correct `{key}`"))
        }
        Ok(()) if ephemeral.may_take(port) => Finding::warn(
            name,
            "free, but any outgoing connection may be given it",
            format!("sysctl -w net.ipv4.ip_local_reserved_ports={port} (added to what is there)"),
        ),
        Ok(()) => Finding::ok(name, "free"),
    }
}

/// Binds each address and lets go. A family that the host does not have is no fault.
fn bind(addrs: &[SocketAddr], bind: impl Fn(&SocketAddr) -> io::Result<()>) -> Result<(), (SocketAddr, io::Error)> {
    for addr in addrs {
        match bind(addr) {
            Err(error) if addr.is_ipv6() && no_such_family(&error) => {}
            Err(error) => return Err((*addr, error)),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn no_such_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT))
}

/// Ports that the kernel gives to outgoing connections.
struct Ephemeral {
    range: Option<(u16, u16)>,
    reserved: Vec<(u16, u16)>,
}

impl Ephemeral {
    fn read() -> Self {
        let range = read("/proc/sys/net/ipv4/ip_local_port_range").ok();
        let reserved = read("/proc/sys/net/ipv4/ip_local_reserved_ports").ok();
        Self {
            range: range.and_then(|text| parse::port_range(&text)),
            reserved: reserved.and_then(|text| parse::reserved_ports(&text)).unwrap_or_default(),
        }
    }

    fn may_take(&self, port: u16) -> bool {
        let within = |(first, last): &(u16, u16)| (*first..=*last).contains(&port);
        self.range.is_some_and(|range| within(&range)) && !self.reserved.iter().any(within)
    }
}

pub(super) fn clock() -> Finding {
    let name = "clock";
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if now < SANE {
        return Finding::fail(name, "it shows a year before 2024", "set it: `chronyc makestep`, or start chronyd");
    }
    if synchronised() {
        Finding::ok(name, "synchronised")
    } else {
        Finding::warn(
            name,
            "not synchronised",
            "start chronyd or systemd-timesyncd: certificates are refused when the clocks of two hosts differ",
        )
    }
}

fn synchronised() -> bool {
    // SAFETY: every field of `timex` is an integer, for which zero is a value.
    let mut query: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `query` lives across the call; with `modes` zero nothing is changed.
    let state = unsafe { libc::adjtimex(&raw mut query) };
    state != -1 && state != libc::TIME_ERROR
}

pub(super) fn docker(socket: &Path) -> Finding {
    let name = super::DOCKER;
    let remedy = "start it (`systemctl start docker`), or set `docker.socket`";
    let asked = UnixStream::connect(socket).and_then(|stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        ask(stream, "/version")
    });
    let version = asked.and_then(|body| {
        let version = serde_json::from_str::<serde_json::Value>(&body).map_err(io::Error::other)?;
        let text = |key: &str| version[key].as_str().map(str::to_owned);
        let missing = || io::Error::other("the answer names no version");
        Ok((text("Version").ok_or_else(missing)?, text("ApiVersion").ok_or_else(missing)?))
    });
    match version {
        Ok((version, api)) => Finding::ok(name, format!("{version}, API {api}, at {}", socket.display())),
        Err(error) => Finding::fail(name, format!("no answer on {}: {error}", socket.display()), remedy),
    }
}

/// The agent works without it, but then the cluster's name has to be configured.
pub(super) fn ecs_agent(addr: SocketAddr) -> Finding {
    let name = "ECS agent";
    let asked = TcpStream::connect_timeout(&addr, PATIENCE).and_then(|stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        ask(stream, "/v1/metadata")
    });
    let cluster = asked.and_then(|body| {
        let metadata = serde_json::from_str::<serde_json::Value>(&body).map_err(io::Error::other)?;
        metadata["Cluster"].as_str().map(str::to_owned).ok_or_else(|| io::Error::other("the answer names no cluster"))
    });
    match cluster {
        Ok(cluster) => Finding::ok(name, format!("cluster {cluster}")),
        Err(error) => Finding::warn(
            name,
            format!("no answer on {addr}: {error}"),
            "it is normal before ecs.service has started; set `host.cluster`, so that the mesh need not ask it",
        ),
    }
}

/// A file that must be readable by us and not by everybody.
pub(super) fn secret(name: &str, path: &Path, open_to_all: Verdict) -> Finding {
    let looked = fs::File::open(path).and_then(|file| file.metadata());
    let shown = path.display();
    match looked {
        Err(error) => Finding::fail(
            name,
            format!("cannot read {shown}: {error}"),
            "`mesh-agent ca init` makes CA bundle and join token; copy both to every host",
        ),
        Ok(found) if !found.is_file() => Finding::fail(name, format!("{shown} is no file"), "correct the path"),
        Ok(found) if found.len() == 0 => Finding::fail(name, format!("{shown} is empty"), "copy it again"),
        Ok(found) if found.permissions().mode() & 0o007 != 0 => Finding {
            name: name.into(),
            verdict: open_to_all,
            found: format!("{shown} is open to every user (mode {:o})", found.permissions().mode() & 0o777),
            remedy: Some(format!("chmod 600 {shown}")),
        },
        Ok(_) => Finding::ok(name, shown.to_string()),
    }
}

/// The body of an answer with status 200. HTTP/1.0, so that it ends where the connection ends.
fn ask(mut stream: impl io::Read + io::Write, path: &str) -> io::Result<String> {
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(LONGEST_ANSWER).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("the answer is not HTTP"))?;
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(io::Error::other(format!("the answer is `{status}`")));
    }
    Ok(body.to_owned())
}
