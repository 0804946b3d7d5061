//! Names as types: services, tasks, clusters, identities. Parsed once, then trusted.
//!
//! Must not know where a name comes from or what it is resolved to.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

/// A name that is not what it has to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} `{given}` is not valid: {rule}")]
pub struct InvalidName {
    pub what: &'static str,
    /// As given, cut after 80 characters and with control characters escaped: it ends in logs.
    pub given: String,
    pub rule: &'static str,
}

/// A service name: one lower-case DNS label (RFC 1123), 1 to 63 octets of `a-z`, `0-9` and inner `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName(Arc<str>);

/// The last segment of an ECS task ARN, or the container id of a container that ECS did not start.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(Arc<str>);

/// The short name of an ECS cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterName(Arc<str>);

/// A SPIFFE trust domain: `a-z`, `0-9`, `.`, `-`, `_`, at most 255 octets.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// A SPIFFE ID. Ours have the form `spiffe://<trust-domain>/ns/<cluster>/sa/<service>`, which Istio parses too;
/// any valid path is accepted from a peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// Where the path starts in `uri`; the trust domain ends there.
    domain_end: u16,
}

const SCHEME: &str = "spiffe://";
/// SPIFFE-ID, section 2.3: implementations must support up to 2048 bytes.
const MAX_URI: usize = 2048;

const SERVICE_RULE: &str = "use 1 to 63 of a-z, 0-9 and -, with no - at either end";
const TASK_RULE: &str = "use 1 to 128 of a-z, A-Z, 0-9, -, _ and .";
const CLUSTER_RULE: &str = "use 1 to 255 of a-z, A-Z, 0-9, - and _";
const DOMAIN_RULE: &str = "use 1 to 255 of a-z, 0-9, ., - and _";
const SPIFFE_RULE: &str = "write spiffe://<trust-domain>/<path> with at most 2048 octets, a trust domain of a-z, 0-9, ., -, _, \
     and path segments of a-z, A-Z, 0-9, ., -, _ that are neither empty nor . nor ..";

fn invalid(what: &'static str, given: &str, rule: &'static str) -> InvalidName {
    InvalidName { what, given: given.chars().take(80).flat_map(char::escape_debug).collect(), rule }
}

macro_rules! name {
    ($name:ident, $what:literal, $rule:ident, $valid:expr) => {
        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) { Ok(Self(text.into())) } else { Err(invalid($what, text, $rule)) }
            }
        }

        /// Equality, order and hash are those of the text.
        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(ServiceName, "service name", SERVICE_RULE, |text| {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
});

name!(TaskId, "task id", TASK_RULE, |text| {
    (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !matches!(text, "." | "..")
});

name!(ClusterName, "cluster name", CLUSTER_RULE, |text| {
    (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
});

name!(TrustDomain, "trust domain", DOMAIN_RULE, is_trust_domain);

fn is_trust_domain(text: &str) -> bool {
    (1..=255).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'))
}

fn is_path_segment(text: &str) -> bool {
    !matches!(text, "" | "." | "..")
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

impl ServiceName {
    /// The service name nearest to `text`: lower case, every other octet a `-`, cut to 63 octets. `None` when nothing
    /// is left of it. Task families are named more freely than DNS labels.
    pub fn sanitised(text: &str) -> Option<Self> {
        let label: String = text
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
            .skip_while(|c| *c == '-')
            .take(63)
            .collect();
        label.trim_end_matches('-').parse().ok()
    }
}

impl SpiffeId {
    /// The identity of a service of a cluster: `spiffe://<domain>/ns/<cluster>/sa/<service>`.
    ///
    /// # Errors
    /// None that valid parts can cause; it is a `Result` because the length is limited to 2048 octets.
    pub fn new(domain: &TrustDomain, cluster: &ClusterName, service: &ServiceName) -> Result<Self, InvalidName> {
        format!("{SCHEME}{domain}/ns/{cluster}/sa/{service}").parse()
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.domain().into())
    }

    /// Its trust domain, as text.
    pub fn domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.domain_end)]
    }

    /// Its path, with the leading `/`; empty when the ID names the trust domain itself.
    pub fn path(&self) -> &str {
        &self.uri[usize::from(self.domain_end)..]
    }

    /// Cluster and service, when the path has the form of ours.
    pub fn cluster_and_service(&self) -> Option<(&str, &str)> {
        let mut segments = self.path().strip_prefix("/ns/")?.split('/');
        match (segments.next(), segments.next(), segments.next(), segments.next()) {
            (Some(cluster), Some("sa"), Some(service), None) => Some((cluster, service)),
            _ => None,
        }
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let wrong = || invalid("SPIFFE ID", text, SPIFFE_RULE);
        if text.len() > MAX_URI {
            return Err(wrong());
        }
        let rest = text.strip_prefix(SCHEME).ok_or_else(wrong)?;
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let path_is_fine = path.is_empty() || path.split('/').skip(1).all(is_path_segment);
        if !is_trust_domain(domain) || !path_is_fine {
            return Err(wrong());
        }
        let domain_end = u16::try_from(SCHEME.len() + domain.len()).map_err(|_too_long| wrong())?;
        Ok(Self { uri: text.into(), domain_end })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.uri)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_parses_prints_the_same(text in "[a-zA-Z0-9._/-]{0,70}") {
            macro_rules! same { ($($t:ty),+) => { $(
                if let Ok(name) = text.parse::<$t>() {
                    prop_assert_eq!(name.to_string(), &*text);
                    prop_assert_eq!(name.as_str().parse::<$t>(), Ok(name));
                }
            )+ } }
            same!(ServiceName, TaskId, ClusterName, TrustDomain);
        }

        #[test]
        fn an_identity_survives_the_round_trip(
            domain in "[a-z0-9._-]{1,255}", cluster in "[a-zA-Z0-9_-]{1,255}", service in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        ) {
            let (domain, cluster, service): (TrustDomain, ClusterName, ServiceName) =
                (domain.parse()?, cluster.parse()?, service.parse()?);
            let id = SpiffeId::new(&domain, &cluster, &service)?;
            prop_assert_eq!(id.to_string().parse::<SpiffeId>()?, id.clone());
            prop_assert_eq!(id.trust_domain(), domain);
            prop_assert_eq!(id.path(), format!("/ns/{cluster}/sa/{service}"));
            prop_assert_eq!(id.cluster_and_service(), Some((cluster.as_str(), service.as_str())));
        }

        #[test]
        fn nothing_makes_parsing_panic(text in any::<String>(), tail in any::<String>()) {
            let _id = text.parse::<SpiffeId>();
            let _id = format!("spiffe://{text}/{tail}").parse::<SpiffeId>();
            let _name = ServiceName::sanitised(&text);
        }
    }

    #[test]
    fn spiffe_rules() {
        for good in ["spiffe://a", "spiffe://a.b/x", "spiffe://a/ns/default/sa/web", "spiffe://1_2-3/A.b-c_d/..."] {
            assert_eq!(good.parse::<SpiffeId>().expect(good).to_string(), good);
        }
        for bad in [
            "",
            "spiffe://",
            "spiffe:///x",
            "https://a/x",
            "SPIFFE://a/x",
            "spiffe://A/x",
            "spiffe://a/",
            "spiffe://a//x",
            "spiffe://a/x/",
            "spiffe://a/./x",
            "spiffe://a/../x",
            "spiffe://a:80/x",
            "spiffe://u@a/x",
            "spiffe://a/x?q",
            "spiffe://a/x#f",
            "spiffe://a/%41",
            "spiffe://a/ü",
            " spiffe://a/x",
            "spiffe://a/x\n",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
        let long = |n: usize| format!("spiffe://a/{}", "x".repeat(n - "spiffe://a/".len()));
        assert!(long(2048).parse::<SpiffeId>().is_ok());
        assert!(long(2049).parse::<SpiffeId>().is_err());
        assert!(format!("spiffe://{}/x", "a".repeat(256)).parse::<SpiffeId>().is_err());
    }

    #[test]
    fn the_bare_trust_domain_has_no_path() {
        let id: SpiffeId = "spiffe://demo.mesh".parse().expect("valid");
        assert_eq!((id.trust_domain().as_str(), id.path(), id.cluster_and_service()), ("demo.mesh", "", None));
    }

    #[test]
    fn service_names_are_dns_labels() {
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", &"a".repeat(64)] {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad}");
        }
        for (given, expected) in [("World_v1", "world-v1"), ("--a--", "a"), ("a b", "a-b")] {
            assert_eq!(ServiceName::sanitised(given).expect(given).as_str(), expected);
        }
        assert_eq!(ServiceName::sanitised("___"), None);
        assert_eq!(ServiceName::sanitised(&format!("{}-b", "a".repeat(62))).expect("cut").as_str().len(), 62);
    }

    #[test]
    fn an_error_can_be_logged_safely() {
        let error = format!("x\n{}", "y".repeat(500)).parse::<ServiceName>().expect_err("has a newline");
        assert!(!error.to_string().contains('\n') && error.to_string().len() < 250, "{error}");
    }
}
