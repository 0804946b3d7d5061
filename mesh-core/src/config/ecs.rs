//! The ECS API as a source of services: `[discovery.ecs]`.
//!
//! Must not know what ECS answers.

use std::{collections::BTreeSet, time::Duration};

use super::{
    aws::{Aws, aws},
    check::{first_repeated, not_empty},
};
use crate::{document::Section, id::ClusterName};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ecs {
    /// The services of the first one bear the bare name. Empty: this host's own cluster.
    pub clusters: Vec<ClusterName>,
    pub aws: Aws,
    /// Only services whose name begins with one of these; empty: all.
    pub prefixes: Vec<String>,
    /// Never these.
    pub exclude: BTreeSet<String>,
    /// How often tasks are asked for.
    pub interval: Duration,
    /// How often services and container instances are.
    pub slow_interval: Duration,
    /// Most questions in a second.
    pub rate: u32,
}

impl Ecs {
    /// Whether a service of this name is to be known.
    pub fn wants(&self, name: &str) -> bool {
        !self.exclude.contains(name)
            && (self.prefixes.is_empty() || self.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str())))
    }
}

pub(super) fn ecs(s: &mut Section<'_>, configured: bool) -> Option<Ecs> {
    let enabled = s.boolean("enabled").unwrap_or(configured);
    let cluster =
        |text: &str| text.parse::<ClusterName>().map_err(|error| (error.to_string(), "name a cluster".into()));
    let clusters = s.list("clusters", cluster).unwrap_or_default();
    if let Some(twice) = first_repeated(&clusters) {
        let problem = format!("`{twice}` is there twice");
        s.fault("clusters", problem, "remove one of them");
    }
    let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
    let ecs = Ecs {
        clusters,
        aws: aws(s),
        prefixes: s.list("prefixes", not_empty).unwrap_or_default(),
        exclude: s.list("exclude", not_empty).unwrap_or_default().into_iter().collect(),
        interval: s.duration("interval", second, hour).unwrap_or(10 * second),
        slow_interval: s.duration("slow_interval", second, hour).unwrap_or(60 * second),
        rate: s.number("rate", 1, 20).unwrap_or(1),
    };
    if ecs.slow_interval < ecs.interval {
        s.fault("slow_interval", "is shorter than `interval`", "make it at least as long");
    }
    enabled.then_some(ecs)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::cloud_map::tests::parse;

    /// The configuration with these lines in `[discovery.ecs]`.
    pub(crate) fn ecs(lines: &str) -> Ecs {
        parse(&format!("[discovery.ecs]\n{lines}")).expect("parses").ecs.expect("configured")
    }

    #[test]
    fn a_section_is_enough() {
        assert_eq!(parse("").expect("parses").ecs, None);
        let found = ecs("");
        assert!(found.clusters.is_empty() && found.wants("any"));
        assert!(!ecs("prefixes = [\"a\"]").wants("b") && !ecs("exclude = [\"b\"]").wants("b"));
    }

    #[test]
    fn faults_name_the_key_and_a_remedy() {
        for (lines, expected) in [
            ("clusters = [\"a/b\"]", "discovery.ecs.clusters[0]: cluster name `a/b` is not valid"),
            ("clusters = [\"a\", \"a\"]", "discovery.ecs.clusters: `a` is there twice"),
            ("slow_interval = \"5s\"", "discovery.ecs.slow_interval: is shorter"),
            ("rate = 21", "discovery.ecs.rate"),
        ] {
            let found = parse(&format!("[discovery.ecs]\n{lines}")).expect_err(lines);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{lines}: {found:?}");
        }
    }
}
