//! From the document to the checked configuration. Every default and every rule is here, and nowhere else.
//!
//! Must not know where the document lies.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::{Ipv4Net, Ipv6Net};

use super::{Admin, Config, Dns, Docker, Enrol, Host, Identity, Kernel, Log, LogFormat, Proxy, VipRanges, discovery};
use crate::{
    document::Section,
    model::{OnAgentDeath, TlsMode},
    readiness,
};

pub(crate) const TLS_WORDS: &[(&str, TlsMode)] = &[("strict", TlsMode::Strict), ("permissive", TlsMode::Permissive)];
pub(crate) const DEATH_WORDS: &[(&str, OnAgentDeath)] =
    &[("open", OnAgentDeath::Open), ("closed", OnAgentDeath::Closed)];
const LEVELS: &[(&str, &str)] =
    &[("error", "error"), ("warn", "warn"), ("info", "info"), ("debug", "debug"), ("trace", "trace")];

/// The first port of Linux's default range for outgoing connections and docker's dynamic host ports.
const DYNAMIC_PORTS: u16 = 32_768;
/// ssh and docker on an ECS host (`ECS_RESERVED_PORTS`).
const RESERVED_PORTS: [u16; 3] = [22, 2375, 2376];
const HOUR: Duration = Duration::from_secs(3600);

pub(super) fn config(root: &mut Section<'_>) -> Option<Config> {
    let host = root.section("host", host);
    let enrol = root.section("enrol", enrol);
    let readiness = root.section("readiness", readiness::settings::readiness);
    let docker = root.section("docker", |s| Docker { socket: path(s, "socket", "/var/run/docker.sock") });
    let kernel = root.section("kernel", kernel);
    let proxy = root.section("proxy", proxy);
    let vip = root.section("vip", |s| vip(s, host.address));
    let dns = root.section("dns", |s| dns(s, &vip));
    let identity = root.section("identity", identity);
    let services_file = root.section("services", |s| s.path("file"));
    let discovery = root.section("discovery", discovery::discovery);
    let admin = root.section("admin", admin);
    let log = root.section("log", log);
    ports(root, &proxy, &dns, &admin);
    let identity = identity?;
    Some(Config {
        host,
        enrol,
        readiness,
        docker,
        kernel,
        proxy,
        dns,
        vip,
        identity,
        services_file,
        discovery,
        admin,
        log,
    })
}

fn path(s: &mut Section<'_>, key: &'static str, default: &str) -> PathBuf {
    s.path(key).unwrap_or_else(|| default.into())
}

fn socket(s: &mut Section<'_>, key: &'static str, ip: Ipv4Addr, port: u16) -> SocketAddr {
    let default = SocketAddr::from((ip, port));
    s.parsed(key, &default.to_string()).unwrap_or(default)
}

fn host(s: &mut Section<'_>) -> Host {
    let address: Option<IpAddr> = s.parsed("address", "10.0.1.20");
    if let Some(ip) = address.filter(|ip| ip.is_unspecified() || ip.is_multicast()) {
        s.fault("address", format!("other hosts cannot reach {ip}"), "use the host's own address, or leave it out");
    }
    let zone = s.text("zone");
    if zone.as_ref().is_some_and(String::is_empty) {
        s.fault("zone", "is empty", "name the zone, or leave it out");
    }
    Host {
        cluster: s.parsed("cluster", "production"),
        address: address.map(|ip| ip.to_canonical()),
        zone,
        state_dir: path(s, "state_dir", "/var/lib/ecs-mesh"),
        ecs_agent: socket(s, "ecs_agent", Ipv4Addr::LOCALHOST, 51_678),
    }
}

fn enrol(s: &mut Section<'_>) -> Enrol {
    Enrol {
        default: s.boolean("default").unwrap_or(true),
        exclude: s.list("exclude", not_empty).unwrap_or_default(),
        tls: s.choice("tls", TLS_WORDS).unwrap_or(TlsMode::Strict),
        on_agent_death: s.choice("on_agent_death", DEATH_WORDS).unwrap_or(OnAgentDeath::Open),
    }
}

/// A list item that says something.
pub(crate) fn not_empty(text: &str) -> Result<String, (String, String)> {
    if text.trim().is_empty() { Err(("is empty".into(), "remove it".into())) } else { Ok(text.to_owned()) }
}

fn kernel(s: &mut Section<'_>) -> Kernel {
    // Below half a second a busy host would be taken for a hung agent; a minute of refused connections helps nobody.
    let limit = s.duration("heartbeat_limit", Duration::from_millis(500), Duration::from_secs(60));
    Kernel {
        cgroup_root: s.path("cgroup_root"),
        pin_dir: path(s, "pin_dir", "/sys/fs/bpf/ecs-mesh"),
        heartbeat_limit: limit.unwrap_or(Duration::from_secs(3)),
    }
}

fn proxy(s: &mut Section<'_>) -> Proxy {
    let (min, max) = (Duration::from_millis(10), Duration::from_secs(300));
    Proxy {
        outbound_port: s.port("outbound_port").unwrap_or(15_001),
        tunnel_listen: socket(s, "tunnel_listen", Ipv4Addr::UNSPECIFIED, 15_008),
        connect_timeout: s.duration("connect_timeout", min, max).unwrap_or(Duration::from_secs(5)),
        drain: s.duration("drain", Duration::ZERO, HOUR).unwrap_or(Duration::from_secs(5)),
        threads: s.number("threads", 1, 1024),
    }
}

fn dns(s: &mut Section<'_>, vip: &VipRanges) -> Dns {
    let ttl = s.duration("ttl", Duration::ZERO, HOUR).unwrap_or(Duration::from_secs(5));
    if ttl.subsec_nanos() != 0 {
        s.fault("ttl", "DNS knows whole seconds only", "write it like `5s`");
    }
    let suffixes = s.list("suffixes", suffix).unwrap_or_else(|| vec!["mesh".into(), "service.consul".into()]);
    if suffixes.is_empty() {
        s.fault("suffixes", "is empty", "name at least one, such as `mesh`: answers need a full name");
    }
    if let Some(twice) = first_repeated(&suffixes) {
        let problem = format!("`{twice}` is there twice");
        s.fault("suffixes", problem, "remove one of them");
    }
    let (min, max) = (Duration::from_millis(10), Duration::from_secs(60));
    Dns {
        port: s.port("port").unwrap_or(15_053),
        ttl,
        suffixes,
        datacenters: Vec::new(),
        vip: vip.clone(),
        search: s.list("search", suffix),
        ipv6: s.boolean("ipv6").unwrap_or(false),
        upstream_timeout: s.duration("upstream_timeout", min, max).unwrap_or(Duration::from_secs(5)),
    }
}

/// A domain name, in lower case and without dots at its ends.
fn suffix(text: &str) -> Result<String, (String, String)> {
    let name = text.trim_matches('.').to_ascii_lowercase();
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // 64 octets are kept for the service's own label and its dot.
    if name.len() <= 189 && name.split('.').all(label) {
        Ok(name)
    } else {
        Err((
            format!("`{}` is not a domain name", text.escape_debug()),
            "write it like `mesh` or `service.consul`".into(),
        ))
    }
}

pub(super) fn first_repeated<T: PartialEq>(items: &[T]) -> Option<&T> {
    items.iter().enumerate().find(|(n, item)| items[..*n].contains(item)).map(|(_, item)| item)
}

/// Networks that mean something to every host; a virtual address must not lie there.
const TAKEN_V4: [(&str, &str); 4] = [
    ("0.0.0.0/8", "this network"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local: metadata and credentials"),
    ("224.0.0.0/4", "multicast"),
];
const TAKEN_V6: [(&str, &str); 5] = [
    ("::/96", "loopback and unspecified"),
    ("::ffff:0.0.0.0/96", "IPv4 in IPv6"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
    ("fd00:ec2::/32", "EC2's metadata, DNS and time"),
];

fn vip(s: &mut Section<'_>, host: Option<IpAddr>) -> VipRanges {
    let default = "v4 and v6 of [vip] have defaults that parse";
    let mut v4: Ipv4Net = "240.240.0.0/16".parse().expect(default);
    let mut v6: Ipv6Net = "fd65:6373:6d65:7368::/96".parse().expect(default);
    if let Some(given) = s.parsed::<Ipv4Net>("v4", "240.240.0.0/16") {
        v4 = given.trunc();
        if given != v4 {
            s.fault("v4", format!("{given} has bits set behind its prefix"), format!("write {v4}"));
        }
        if !(8..=28).contains(&v4.prefix_len()) {
            s.fault(
                "v4",
                format!("{v4} is no useful size"),
                "use a prefix of /8 to /28; one service takes one address",
            );
        }
        for (net, what) in TAKEN_V4 {
            let taken: Ipv4Net = net.parse().expect("a literal");
            if taken.contains(&v4) || v4.contains(&taken) {
                s.fault("v4", format!("{v4} overlaps {taken} ({what})"), "use a range that nothing else uses");
            }
        }
    }
    if let Some(given) = s.parsed::<Ipv6Net>("v6", "fd65:6373:6d65:7368::/96") {
        v6 = given.trunc();
        if given != v6 {
            s.fault("v6", format!("{given} has bits set behind its prefix"), format!("write {v6}"));
        }
        for (net, what) in TAKEN_V6 {
            let taken: Ipv6Net = net.parse().expect("a literal");
            if taken.contains(&v6) || v6.contains(&taken) {
                s.fault("v6", format!("{v6} overlaps {taken} ({what})"), "use a range that nothing else uses");
            }
        }
    }
    if 128 - v6.prefix_len() < 32 - v4.prefix_len() {
        let remedy = format!("use a prefix of /{} or shorter", 96 + v4.prefix_len());
        s.fault("v6", format!("{v6} has fewer addresses than {v4}"), remedy);
    }
    let own = match host {
        Some(IpAddr::V4(ip)) => v4.contains(&ip).then_some("v4"),
        Some(IpAddr::V6(ip)) => v6.contains(&ip).then_some("v6"),
        None => None,
    };
    if let Some(key) = own {
        s.fault(key, "contains host.address", "use a range that nothing else uses");
    }
    VipRanges { v4, v6 }
}

fn identity(s: &mut Section<'_>) -> Option<Identity> {
    let required = [
        ("trust_domain", "name it, such as `example.mesh`; the same on all hosts"),
        ("ca_bundle", "make one with `mesh-agent ca init` and give its path"),
        ("join_token_file", "give the path of the file with the token that opens the CA bundle"),
    ];
    for (key, remedy) in required {
        s.require(key, remedy);
    }
    let (trust_domain, ca_bundle) = (s.parsed("trust_domain", "example.mesh"), s.path("ca_bundle"));
    let join_token_file = s.path("join_token_file");
    let leaf_ttl = s.duration("leaf_ttl", Duration::from_secs(10), 24 * HOUR).unwrap_or(24 * HOUR);
    Some(Identity { trust_domain: trust_domain?, ca_bundle: ca_bundle?, join_token_file: join_token_file?, leaf_ttl })
}

fn admin(s: &mut Section<'_>) -> Admin {
    let metrics = socket(s, "metrics", Ipv4Addr::LOCALHOST, 15_020);
    if !metrics.ip().to_canonical().is_loopback() {
        let problem = format!("{metrics} can be reached from elsewhere, and nothing there asks who calls");
        s.fault("metrics", problem, "use a loopback address, and let a collector on this host scrape it");
    }
    Admin { socket: path(s, "socket", "/run/ecs-mesh/admin.sock"), metrics }
}

fn log(s: &mut Section<'_>) -> Log {
    let formats = &[("json", LogFormat::Json), ("text", LogFormat::Text)];
    Log {
        level: s.choice("level", LEVELS).unwrap_or("info").to_owned(),
        format: s.choice("format", formats).unwrap_or(LogFormat::Json),
        access: s.boolean("access").unwrap_or(true),
    }
}

/// In the host's namespace all four are listened on, so all four differ.
fn ports(root: &mut Section<'_>, proxy: &Proxy, dns: &Dns, admin: &Admin) {
    let ports = [
        ("proxy.outbound_port", proxy.outbound_port),
        ("proxy.tunnel_listen", proxy.tunnel_listen.port()),
        ("dns.port", dns.port),
        ("admin.metrics", admin.metrics.port()),
    ];
    for (n, (key, port)) in ports.into_iter().enumerate() {
        if let Some((other, _)) = ports[..n].iter().find(|(_, earlier)| *earlier == port) {
            root.fault(key, format!("port {port} is also that of {other}"), "give each its own port");
        }
        if port == 0 {
            root.fault(key, "port 0 is no port", "use 1 to 32767");
        }
        if port >= DYNAMIC_PORTS {
            let problem = format!(
                "port {port} lies in the range from which Linux and docker take ports as they need them \
                 (net.ipv4.ip_local_port_range), so another process could have it first"
            );
            root.fault(key, problem, "use a port below 32768");
        }
        if RESERVED_PORTS.contains(&port) {
            root.fault(key, format!("port {port} belongs to ssh or docker"), "use another port");
        }
    }
}
