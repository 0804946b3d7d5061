//! Where services are learnt from besides this host's own tasks: `[discovery]`.
//!
//! Must not know what a registry answers.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use super::{
    check::{first_repeated, not_empty},
    cloud_map::{CloudMap, cloud_map},
    ecs::{Ecs, ecs},
};
use crate::document::Section;

#[derive(Clone, Debug, PartialEq)]
pub struct Discovery {
    /// In order of precedence; every source that is configured is in it once.
    pub order: Vec<SourceName>,
    /// `None`: Consul is not asked.
    pub consul: Option<Consul>,
    /// `None`: the ECS API is not asked.
    pub ecs: Option<Ecs>,
    /// `None`: Cloud Map is not asked.
    pub cloud_map: Option<CloudMap>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourceName {
    File,
    Consul,
    Ecs,
    CloudMap,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consul {
    /// `http://` or `https://`, host and port; without a final `/`.
    pub address: String,
    /// The first one is the one whose services bear the bare name. Empty: only that of the agent at `address`.
    pub datacenters: Vec<String>,
    pub namespace: Option<String>,
    /// File with the ACL token; read again whenever it changes.
    pub token_file: Option<PathBuf>,
    pub tls: Tls,
    pub health: Health,
    /// Only services that bear all of these.
    pub tags: BTreeSet<String>,
    /// Only services whose name begins with one of these; empty: all.
    pub prefixes: Vec<String>,
    /// Never these.
    pub exclude: BTreeSet<String>,
    pub tag_names: TagNames,
    /// How long a blocking query may block.
    pub wait: Duration,
    /// Most blocking queries at a time.
    pub watches: usize,
    /// Whether any server may answer, not the leader only.
    pub stale: bool,
    /// `None`: tasks of this host are not registered.
    pub registration: Option<Registration>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// Certificates of the authorities that Consul's certificate may come from; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// Certificate and key by which the agent shows itself.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// Which instances may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Passing,
    /// Also those with a check in the state `warning`.
    Warning,
}

/// For which tags there is a name `<tag>.<service>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TagNames {
    All,
    These(BTreeSet<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// An instance whose agent says nothing for so long is critical.
    pub ttl: Duration,
    /// And after so long it is removed.
    pub deregister_after: Duration,
    /// Tags of every instance.
    pub tags: Vec<String>,
}

impl Consul {
    /// Whether a service of this name and with these tags is to be known.
    pub fn wants(&self, name: &str, tags: &BTreeSet<String>) -> bool {
        !self.exclude.contains(name)
            && (self.prefixes.is_empty() || self.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str())))
            && self.tags.is_subset(tags)
    }
}

/// In the default order of precedence. The ECS API comes before Cloud Map, because it knows who is in the mesh of those
/// that ECS registers with Cloud Map.
const SOURCES: &[(&str, SourceName)] = &[
    ("file", SourceName::File),
    ("consul", SourceName::Consul),
    ("ecs", SourceName::Ecs),
    ("cloud_map", SourceName::CloudMap),
];
const HEALTH: &[(&str, Health)] = &[("passing", Health::Passing), ("warning", Health::Warning)];

pub(super) fn discovery(s: &mut Section<'_>) -> Discovery {
    let source = |text: &str| {
        let found = SOURCES.iter().find(|(word, _)| *word == text).map(|(_, source)| *source);
        found.ok_or_else(|| {
            (
                format!("`{}` is no source", text.escape_debug()),
                "use \"file\", \"consul\", \"ecs\" or \"cloud_map\"".into(),
            )
        })
    };
    let mut order = s.list("order", source).unwrap_or_default();
    if first_repeated(&order).is_some() {
        s.fault("order", "names a source twice", "remove one of them");
    }
    // Those that are not named come after those that are.
    for (_, source) in SOURCES {
        if !order.contains(source) {
            order.push(*source);
        }
    }
    let configured = s.has("consul");
    let consul = s.section("consul", |s| consul(s, configured));
    let configured = s.has("ecs");
    let ecs = s.section("ecs", |s| ecs(s, configured));
    let configured = s.has("cloud_map");
    let cloud_map = s.section("cloud_map", |s| cloud_map(s, configured));
    Discovery { order, consul, ecs, cloud_map }
}

fn consul(s: &mut Section<'_>, configured: bool) -> Option<Consul> {
    let enabled = s.boolean("enabled").unwrap_or(configured);
    let address = s.text("address").unwrap_or_else(|| "http://127.0.0.1:8500".into());
    let address = base(s, &address);
    let datacenters = s.list("datacenters", datacenter).unwrap_or_default();
    if let Some(twice) = first_repeated(&datacenters) {
        let problem = format!("`{twice}` is there twice");
        s.fault("datacenters", problem, "remove one of them");
    }
    let tag_names = s.list("tag_names", not_empty).unwrap_or_else(|| vec!["*".into()]);
    let tag_names = match tag_names.iter().any(|tag| tag == "*") {
        true => TagNames::All,
        false => TagNames::These(tag_names.into_iter().collect()),
    };
    let watches = s.number("watches", 1, 10_000).unwrap_or(100);
    let health = s.choice("health", HEALTH).unwrap_or(Health::Passing);
    let tls = s.section("tls", tls);
    if (tls.ca_file.is_some() || tls.client.is_some()) && address.starts_with("http://") {
        s.fault(
            "tls",
            "is of no use with an address that begins with http://",
            "write https://, or remove the section",
        );
    }
    let consul = Consul {
        address,
        datacenters,
        namespace: s.text("namespace"),
        token_file: s.path("token_file"),
        tls,
        health,
        tags: s.list("tags", not_empty).unwrap_or_default().into_iter().collect(),
        prefixes: s.list("prefixes", not_empty).unwrap_or_default(),
        exclude: s.list("exclude", not_empty).unwrap_or_else(|| vec!["consul".into()]).into_iter().collect(),
        tag_names,
        wait: s.duration("wait", Duration::from_secs(1), Duration::from_secs(600)).unwrap_or(Duration::from_secs(300)),
        watches: usize::try_from(watches).unwrap_or(usize::MAX),
        stale: s.boolean("stale").unwrap_or(true),
        registration: s.section("registration", registration),
    };
    enabled.then_some(consul)
}

/// The base address: scheme, host and port, nothing behind.
fn base(s: &mut Section<'_>, text: &str) -> String {
    let trimmed = text.trim_end_matches('/');
    let rest = trimmed.strip_prefix("http://").or_else(|| trimmed.strip_prefix("https://"));
    let host =
        rest.map(|rest| rest.rsplit_once(':').filter(|(_, port)| !port.contains(']')).map_or(rest, |(host, _)| host));
    let valid = match (rest, host) {
        (Some(rest), Some(host)) => {
            let port = rest.strip_prefix(host).unwrap_or_default();
            !host.is_empty()
                && host
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'[' | b']' | b':'))
                && (port.is_empty() || port[1..].parse::<u16>().is_ok_and(|port| port != 0))
        }
        _ => false,
    };
    if !valid {
        let problem = format!("`{}` is no address of a Consul agent", text.escape_debug());
        s.fault("address", problem, "write it like `http://127.0.0.1:8500` or `https://consul.example.com:8501`");
    }
    trimmed.to_owned()
}

fn datacenter(text: &str) -> Result<String, (String, String)> {
    let valid = (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'));
    if valid {
        Ok(text.to_owned())
    } else {
        Err((format!("`{}` is no datacenter", text.escape_debug()), "use a-z, 0-9, - and _, such as `dc1`".into()))
    }
}

fn tls(s: &mut Section<'_>) -> Tls {
    let (cert, key) = (s.path("cert_file"), s.path("key_file"));
    if cert.is_some() != key.is_some() {
        let missing = if cert.is_some() { "key_file" } else { "cert_file" };
        s.fault(missing, "is missing", "a client certificate needs both files; give both, or neither");
    }
    Tls { ca_file: s.path("ca_file"), client: cert.zip(key) }
}

fn registration(s: &mut Section<'_>) -> Option<Registration> {
    let enabled = s.boolean("enabled").unwrap_or(false);
    let (minute, hour) = (Duration::from_secs(60), Duration::from_secs(3600));
    let registration = Registration {
        ttl: s.duration("ttl", Duration::from_secs(3), 10 * minute).unwrap_or(minute / 2),
        // Consul's own minimum is a minute.
        deregister_after: s.duration("deregister_after", minute, 24 * hour).unwrap_or(10 * minute),
        tags: s.list("tags", not_empty).unwrap_or_default(),
    };
    if registration.deregister_after <= registration.ttl {
        s.fault("deregister_after", "is not longer than `ttl`", "make it several times as long");
    }
    enabled.then_some(registration)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config;

    const REQUIRED: &str = "[identity]\ntrust_domain = \"example.mesh\"\nca_bundle = \"/etc/ecs-mesh/ca-bundle.pem\"\n\
        join_token_file = \"/etc/ecs-mesh/join-token\"\n";

    fn parse(text: &str) -> Result<Discovery, Vec<String>> {
        let parsed = config::parse(&format!("{REQUIRED}{text}\n"));
        parsed.map(|config| config.discovery).map_err(|faults| faults.iter().map(ToString::to_string).collect())
    }

    /// The configuration with these lines in `[discovery.consul]`.
    pub(crate) fn consul(lines: &str) -> Consul {
        parse(&format!("[discovery.consul]\n{lines}")).expect("parses").consul.expect("configured")
    }

    #[test]
    fn a_section_is_enough_to_ask_consul() {
        assert_eq!(parse("").expect("parses").consul, None);
        assert_eq!(parse("[discovery.consul]\nenabled = false").expect("parses").consul, None);
        assert_eq!(consul("").address, "http://127.0.0.1:8500");
        assert_eq!(consul("").registration, None);
        assert!(consul("[discovery.consul.registration]\nenabled = true").registration.is_some());
        assert_eq!(consul("address = \"https://[::1]:8501/\"").address, "https://[::1]:8501");
    }

    #[test]
    fn precedence_is_declared() {
        use SourceName::{CloudMap, Consul, Ecs, File};
        assert_eq!(parse("").expect("parses").order, [File, Consul, Ecs, CloudMap]);
        let order = "[discovery]\norder = [\"cloud_map\", \"consul\"]";
        assert_eq!(parse(order).expect("parses").order, [CloudMap, Consul, File, Ecs]);
    }

    #[test]
    fn filters() {
        let tags = |list: &[&str]| list.iter().map(|tag| (*tag).to_owned()).collect::<BTreeSet<_>>();
        let all = consul("");
        assert!(all.wants("web", &tags(&[])) && !all.wants("consul", &tags(&[])));
        let some = consul("prefixes = [\"a-\", \"b\"]\ntags = [\"x\", \"y\"]\nexclude = [\"bad\"]");
        assert!(some.wants("a-web", &tags(&["y", "x", "z"])));
        for (name, list) in [("web", &["x", "y"][..]), ("a-web", &["x"]), ("bad", &["x", "y"])] {
            assert!(!some.wants(name, &tags(list)), "{name}");
        }
    }

    #[test]
    fn faults_name_the_key_and_a_remedy() {
        for (lines, expected) in [
            (
                "order = [\"dns\"]",
                "discovery.order[0]: `dns` is no source; use \"file\", \"consul\", \"ecs\" or \"cloud_map\"",
            ),
            ("order = [\"file\", \"file\"]", "discovery.order: names a source twice"),
            (
                "[discovery.consul]\naddress = \"127.0.0.1:8500\"",
                "discovery.consul.address: `127.0.0.1:8500` is no address",
            ),
            ("[discovery.consul]\naddress = \"http://a/b\"", "discovery.consul.address"),
            ("[discovery.consul]\naddress = \"http://:8500\"", "discovery.consul.address"),
            ("[discovery.consul]\naddress = \"http://a:0\"", "discovery.consul.address"),
            ("[discovery.consul]\ndatacenters = [\"a\", \"a\"]", "discovery.consul.datacenters: `a` is there twice"),
            ("[discovery.consul]\ndatacenters = [\"A.b\"]", "discovery.consul.datacenters[0]"),
            ("[discovery.consul]\nwait = \"11m\"", "discovery.consul.wait: 11m is out of range"),
            ("[discovery.consul]\nhealth = \"critical\"", "discovery.consul.health: `critical` is not known"),
            ("[discovery.consul]\ntoken_file = \"token\"", "discovery.consul.token_file"),
            (
                "[discovery.consul]\ntoken = \"secret\"",
                "discovery.consul.token: is not known; did you mean `token_file`?",
            ),
            ("[discovery.consul]\nwatches = 0", "discovery.consul.watches"),
            ("[discovery.consul.tls]\nca_file = \"/ca.pem\"", "discovery.consul.tls: is of no use"),
            (
                "[discovery.consul]\naddress = \"https://a\"\n[discovery.consul.tls]\ncert_file = \"/c.pem\"",
                "discovery.consul.tls.key_file: is missing",
            ),
            (
                "[discovery.consul.registration]\nttl = \"5m\"\nderegister_after = \"2m\"",
                "discovery.consul.registration.deregister_after: is not longer",
            ),
        ] {
            let found = parse(&format!("[discovery]\n{lines}")).expect_err(lines);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{lines}: {found:?}");
        }
    }
}
