//! AWS Cloud Map as a source of services: `[discovery.cloud_map]`.
//!
//! Must not know what Cloud Map answers.

use std::{collections::BTreeSet, time::Duration};

use super::{
    aws::{Aws, aws, endpoint},
    check::{first_repeated, not_empty},
};
use crate::{aws::rota::Intervals, document::Section};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudMap {
    /// Their names. The services of the first one bear the bare name. There is at least one.
    pub namespaces: Vec<String>,
    /// Its control plane, of which lists are had and which tasks are registered with.
    pub aws: Aws,
    /// Base address of its data plane, of which instances are had.
    pub data_endpoint: Option<String>,
    pub health: Health,
    /// Only services whose name begins with one of these; empty: all.
    pub prefixes: Vec<String>,
    /// Never these.
    pub exclude: BTreeSet<String>,
    /// Port of instances that name none.
    pub default_port: u16,
    /// How often the instances of a service are asked for.
    pub intervals: Intervals,
    /// How often the lists of services are.
    pub list_interval: Duration,
    /// Most questions in a second, of each plane.
    pub rate: u32,
    /// `None`: tasks of this host are not registered.
    pub registration: Option<Registration>,
}

/// How tasks of this host are registered, with the first namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Tags of every instance.
    pub tags: Vec<String>,
    /// How often what is registered is compared with what should be.
    pub interval: Duration,
    /// Most requests in a second, besides those of asking.
    pub rate: u32,
}

/// Which instances may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// All but those that are said to be ill.
    Healthy,
    /// The same, and all where every one is said to be ill.
    HealthyOrElseAll,
}

impl CloudMap {
    /// Whether a service of this name is to be known.
    pub fn wants(&self, name: &str) -> bool {
        !self.exclude.contains(name)
            && (self.prefixes.is_empty() || self.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str())))
    }
}

const HEALTH: &[(&str, Health)] = &[("healthy", Health::Healthy), ("healthy_or_else_all", Health::HealthyOrElseAll)];
const HOUR: Duration = Duration::from_secs(3600);

pub(super) fn cloud_map(s: &mut Section<'_>, configured: bool) -> Option<CloudMap> {
    let enabled = s.boolean("enabled").unwrap_or(configured);
    let namespaces = s.list("namespaces", namespace).unwrap_or_default();
    if enabled && namespaces.is_empty() {
        s.fault("namespaces", "names none", "name at least one namespace, such as `my.demo`");
    }
    if let Some(twice) = first_repeated(&namespaces) {
        let problem = format!("`{twice}` is there twice");
        s.fault("namespaces", problem, "remove one of them");
    }
    let second = Duration::from_secs(1);
    let intervals = Intervals {
        used: s.duration("interval", second, HOUR).unwrap_or(5 * second),
        idle: s.duration("idle_interval", second, HOUR).unwrap_or(60 * second),
    };
    if intervals.idle < intervals.used {
        s.fault("idle_interval", "is shorter than `interval`", "make it at least as long");
    }
    let cloud_map = CloudMap {
        namespaces,
        aws: aws(s),
        data_endpoint: endpoint(s, "data_endpoint"),
        health: s.choice("health", HEALTH).unwrap_or(Health::Healthy),
        prefixes: s.list("prefixes", not_empty).unwrap_or_default(),
        exclude: s.list("exclude", not_empty).unwrap_or_default().into_iter().collect(),
        default_port: s.port("default_port").unwrap_or(80),
        intervals,
        list_interval: s.duration("list_interval", second, HOUR).unwrap_or(30 * second),
        rate: s.number("rate", 1, 500).unwrap_or(10),
        registration: s.section("registration", registration),
    };
    let is_of_vpc = |endpoint: &String| endpoint.contains(".vpce.");
    if cloud_map.aws.endpoint.as_ref().is_some_and(is_of_vpc) && cloud_map.data_endpoint.is_none() {
        let remedy = "name the one of `data-servicediscovery` in `data_endpoint`; with private DNS, name neither";
        s.fault("endpoint", "is one VPC endpoint of Cloud Map, which has two", remedy);
    }
    enabled.then_some(cloud_map)
}

fn registration(s: &mut Section<'_>) -> Option<Registration> {
    let enabled = s.boolean("enabled").unwrap_or(false);
    let second = Duration::from_secs(1);
    let registration = Registration {
        tags: s.list("tags", not_empty).unwrap_or_default(),
        interval: s.duration("interval", second, HOUR).unwrap_or(60 * second),
        rate: s.number("rate", 1, 500).unwrap_or(5),
    };
    enabled.then_some(registration)
}

fn namespace(text: &str) -> Result<String, (String, String)> {
    if (1..=253).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err((format!("`{}` is no namespace", text.escape_debug()), "write its name, such as `my.demo`".into()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config;

    const REQUIRED: &str = "[identity]\ntrust_domain = \"example.mesh\"\nca_bundle = \"/etc/ecs-mesh/ca-bundle.pem\"\n\
        join_token_file = \"/etc/ecs-mesh/join-token\"\n";

    pub(in crate::config) fn parse(text: &str) -> Result<config::discovery::Discovery, Vec<String>> {
        let parsed = config::parse(&format!("{REQUIRED}{text}\n"));
        parsed.map(|config| config.discovery).map_err(|faults| faults.iter().map(ToString::to_string).collect())
    }

    /// The configuration with these lines in `[discovery.cloud_map]`, and the namespace `my.demo` if they name none.
    pub(crate) fn cloud_map(lines: &str) -> CloudMap {
        let usual = if lines.contains("namespaces") { "" } else { "namespaces = [\"my.demo\"]\n" };
        parse(&format!("[discovery.cloud_map]\n{usual}{lines}")).expect("parses").cloud_map.expect("configured")
    }

    /// The configuration with these lines in `[discovery.cloud_map.registration]`.
    pub(crate) fn registration(lines: &str) -> Registration {
        let found = cloud_map(&format!("[discovery.cloud_map.registration]\nenabled = true\n{lines}"));
        found.registration.expect("enabled")
    }

    #[test]
    fn registering_is_off_unless_wanted() {
        assert_eq!(cloud_map("").registration, None);
        assert_eq!(cloud_map("[discovery.cloud_map.registration]\ntags = [\"a\"]").registration, None);
        assert_eq!((registration("").interval, registration("").rate), (Duration::from_secs(60), 5));
    }

    #[test]
    fn a_namespace_is_enough() {
        assert_eq!(parse("").expect("parses").cloud_map, None);
        let found = cloud_map("");
        assert_eq!((found.namespaces, found.rate), (vec!["my.demo".to_owned()], 10));
    }

    #[test]
    fn faults_name_the_key_and_a_remedy() {
        for (lines, expected) in [
            ("", "discovery.cloud_map.namespaces: names none"),
            ("namespaces = [\"a b\"]", "discovery.cloud_map.namespaces[0]: `a b` is no namespace"),
            ("namespaces = [\"a\", \"a\"]", "discovery.cloud_map.namespaces: `a` is there twice"),
            ("namespaces = [\"a\"]\nregion = \"Frankfurt\"", "discovery.cloud_map.region: `Frankfurt` is no region"),
            ("namespaces = [\"a\"]\nendpoint = \"aws\"", "discovery.cloud_map.endpoint: `aws` is no address"),
            (
                "namespaces = [\"a\"]\ndata_endpoint = \"vpce-1\"",
                "discovery.cloud_map.data_endpoint: `vpce-1` is no address",
            ),
            (
                "namespaces = [\"a\"]\nendpoint = \"https://vpce-1.servicediscovery.eu-central-1.vpce.amazonaws.com\"",
                "discovery.cloud_map.endpoint: is one VPC endpoint of Cloud Map, which has two",
            ),
            ("namespaces = [\"a\"]\nrate = 0", "discovery.cloud_map.rate"),
            ("namespaces = [\"a\"]\nidle_interval = \"2s\"", "discovery.cloud_map.idle_interval: is shorter"),
            ("namespaces = [\"a\"]\nhealth = \"passing\"", "discovery.cloud_map.health: `passing` is not known"),
        ] {
            let found = parse(&format!("[discovery.cloud_map]\n{lines}")).expect_err(lines);
            let mut found = found.iter().filter(|fault| !lines.is_empty() || fault.contains("namespaces"));
            assert!(found.next().is_some_and(|fault| fault.starts_with(expected)), "{lines}");
        }
    }
}
