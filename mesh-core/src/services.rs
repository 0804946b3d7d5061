//! The static file of services, endpoints and policy: parsed and checked as a whole.
//!
//! Must not know where the file lies. A document with any fault is refused as a whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, LazyLock},
};

use imbl::OrdMap;

use crate::{
    addr::canonical,
    config::{
        Fault,
        check::{DEATH_WORDS, TLS_WORDS, not_empty},
    },
    document::{self, Section},
    id::{ServiceName, SpiffeId, TrustDomain},
    model::{Endpoint, OnAgentDeath, Protocol, TlsMode},
    owners::Owners,
    policy::{Effect, Policy, Rule},
};

/// What one source says about services. Several of these are merged. A clone costs nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceSet {
    pub services: OrdMap<ServiceName, Arc<ServiceEntry>>,
    /// Only the static file has one.
    pub policy: Option<Arc<Policy>>,
}

/// What one source says about one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    pub name: ServiceName,
    /// Empty: derived from the endpoints' tasks.
    pub ports: Vec<PortEntry>,
    pub endpoints: Vec<EndpointEntry>,
    pub tls: Option<TlsMode>,
    pub on_agent_death: Option<OnAgentDeath>,
    /// Local tasks of these families belong to the service; empty: the family that bears its name.
    pub families: Vec<String>,
    /// What sources of lower precedence say about the service does not count.
    pub alone: bool,
    /// The services that the endpoints are of; `None`: of this one.
    pub owners: Option<Arc<Owners>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortEntry {
    pub port: u16,
    /// Container port of local tasks; default: `port`, or the only port that the task has.
    pub target: Option<u16>,
    pub protocol: Option<Protocol>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointEntry {
    /// Which of the service's ports it serves; may be left out where there is one.
    pub port: Option<u16>,
    /// As the snapshot will have it, and the same value there, for whichever ports and services it is listed. Without an
    /// identity, one that has an agent has that of the service in this cluster.
    pub endpoint: Arc<Endpoint>,
    /// The port is not one that somebody chose but the one that clients use who were told none: 80, unless the service
    /// really serves that one, or the only one that is defined.
    pub alias: bool,
    /// Nobody has said the port of its address; such endpoints usually have this one. It gives way to any other endpoint of
    /// the service at its IP.
    pub assumed: bool,
}

/// What a registry knows of an endpoint besides. Mostly the same for many endpoints, so shared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attributes {
    pub tags: BTreeSet<String>,
    pub meta: BTreeMap<String, String>,
}

impl Attributes {
    /// Nothing is known besides: one value for all of which that is so.
    pub fn none() -> Arc<Self> {
        static NONE: LazyLock<Arc<Attributes>> = LazyLock::new(Arc::default);
        NONE.clone()
    }
}

impl ServiceSet {
    /// A set of these, without a policy. Of two with one name the later one stays.
    pub fn of(entries: impl IntoIterator<Item = ServiceEntry>) -> Self {
        let named = |entry: ServiceEntry| (entry.name.clone(), Arc::new(entry));
        Self { services: entries.into_iter().map(named).collect(), policy: None }
    }

    /// The same set, made of the parts of `before` where they are equal, so that a merge sees at once what changed.
    #[must_use]
    pub fn sharing(self, before: &Self) -> Self {
        let mut services = before.services.clone();
        for name in before.services.keys().filter(|name| !self.services.contains_key(*name)) {
            services.remove(name);
        }
        for (name, entry) in self.services {
            if before.services.get(&name) != Some(&entry) {
                services.insert(name, entry);
            }
        }
        let policy = if self.policy == before.policy { before.policy.clone() } else { self.policy };
        Self { services, policy }
    }
}

/// Weight of an endpoint that names none.
pub const DEFAULT_WEIGHT: u32 = 100;
/// Keeps sums over many endpoints far from overflow.
pub(crate) const MAX_WEIGHT: u32 = 1_000_000;

const PROTOCOL_WORDS: &[(&str, Protocol)] = &[
    ("auto", Protocol::Auto),
    ("http", Protocol::Http),
    ("http2", Protocol::Http2),
    ("grpc", Protocol::Grpc),
    ("tcp", Protocol::Tcp),
];
const EFFECT_WORDS: &[(&str, Effect)] = &[("allow", Effect::Allow), ("deny", Effect::Deny)];

/// Parses and checks a static file.
///
/// # Errors
/// All faults together, each with its path and a remedy. A text that is not TOML has one, with line and column.
pub fn parse(text: &str) -> Result<ServiceSet, Vec<Fault>> {
    document::read(text, |root| {
        let services = root.sections("service", service);
        unique_families(root, &services);
        let mut names = BTreeSet::new();
        for entry in &services {
            if !names.insert(&entry.name) {
                root.fault(&format!("service[{}]", entry.name), "is there twice", "join the two, or rename one");
            }
        }
        let policy = root.has("policy").then(|| Arc::new(root.section("policy", policy)));
        Some(ServiceSet { policy, ..ServiceSet::of(services) })
    })
}

fn service(s: &mut Section<'_>) -> Option<ServiceEntry> {
    s.require("name", "clients call a service by its name, such as `world`");
    let name: Option<ServiceName> = s.parsed("name", "world");
    let families = s.list("families", not_empty).unwrap_or_default();
    let tls = s.choice("tls", TLS_WORDS);
    let on_agent_death = s.choice("on_agent_death", DEATH_WORDS);
    let wanted = s.count("ports");
    let ports = s.sections("ports", port);
    let mut seen = BTreeSet::new();
    for entry in &ports {
        if !seen.insert(entry.port) {
            s.fault("ports", format!("port {} is there twice", entry.port), "remove one of them");
        }
    }
    // Where a port is faulty itself, endpoints that name it are not to blame.
    let known = (ports.len() == wanted).then_some(ports.as_slice());
    let mut endpoints = s.sections("endpoint", |s| endpoint(s, known));
    endpoints.shrink_to_fit();
    let mut seen = BTreeSet::new();
    for entry in &endpoints {
        let addr = entry.endpoint.addr();
        if !seen.insert((addr, entry.port)) {
            s.fault("endpoint", format!("{addr} is there twice"), "remove one of them");
        }
    }
    let alone = s.boolean("override").unwrap_or(false);
    Some(ServiceEntry { name: name?, ports, endpoints, tls, on_agent_death, families, alone, owners: None })
}

fn port(s: &mut Section<'_>) -> Option<PortEntry> {
    s.require("port", "name the port that clients use");
    let port = s.port("port");
    let (target, protocol) = (s.port("target"), s.choice("protocol", PROTOCOL_WORDS));
    Some(PortEntry { port: port?, target, protocol })
}

fn endpoint(s: &mut Section<'_>, ports: Option<&[PortEntry]>) -> Option<EndpointEntry> {
    s.require("address", "name address and port, such as `10.0.1.20:32768`");
    let had_port = s.has("port");
    let addr = reachable(s, "address");
    let port = s.port("port");
    let known = || {
        let all: Vec<_> = ports.unwrap_or_default().iter().map(|entry| entry.port.to_string()).collect();
        if all.is_empty() { "none".to_owned() } else { all.join(", ") }
    };
    match (port, ports) {
        (Some(port), Some(ports)) if !ports.is_empty() && ports.iter().all(|entry| entry.port != port) => {
            let remedy = format!("name one of the service's ports ({}), or add it there", known());
            s.fault("port", format!("the service has no port {port}"), remedy);
        }
        (None, Some(ports)) if !had_port && ports.len() != 1 => {
            let remedy = format!("name the service's port that it serves; there are: {}", known());
            s.fault("port", "is missing", remedy);
        }
        _ => {}
    }
    let had_agent = s.has("agent");
    let agent = reachable(s, "agent");
    let identity = s.parsed("identity", "spiffe://example.mesh/ns/production/sa/world");
    if identity.is_some() && !had_agent {
        let remedy = "add `agent`, such as `10.0.1.20:15008`, or remove `identity`";
        s.fault("identity", "there is no agent to prove it", remedy);
    }
    let zone = s.text("zone");
    if zone.as_ref().is_some_and(String::is_empty) {
        s.fault("zone", "is empty", "name the zone, or leave it out");
    }
    let weight = s.number("weight", 0, MAX_WEIGHT).unwrap_or(DEFAULT_WEIGHT);
    let endpoint = Endpoint { weight, zone: zone.map(Arc::from), ..Endpoint::listed(addr?, agent, identity) };
    Some(EndpointEntry { port, endpoint: Arc::new(endpoint), alias: false, assumed: false })
}

/// An address that can be connected to.
fn reachable(s: &mut Section<'_>, key: &'static str) -> Option<SocketAddr> {
    let addr = canonical(s.parsed(key, "10.0.1.20:32768")?);
    if addr.ip().is_unspecified() || addr.ip().is_multicast() || addr.port() == 0 {
        s.fault(key, format!("nothing can be reached at {addr}"), "name the address and port of one host or task");
        return None;
    }
    Some(addr)
}

fn unique_families(root: &mut Section<'_>, services: &[ServiceEntry]) {
    let mut owners: BTreeMap<&str, &ServiceName> = BTreeMap::new();
    for entry in services {
        for family in &entry.families {
            if let Some(other) = owners.insert(family, &entry.name) {
                let (path, other) =
                    (format!("service[{}].families", entry.name), format!("`{family}` belongs to {other}"));
                root.fault(&path, other, "a task belongs to one service; remove it from one of the lists");
            }
        }
    }
}

fn policy(s: &mut Section<'_>) -> Policy {
    let default = s.choice("default", EFFECT_WORDS).unwrap_or(Effect::Allow);
    let rules = s.sections("rule", rule);
    let mut names = BTreeSet::new();
    for rule in &rules {
        if !names.insert(&rule.name) {
            let remedy = "rename one: a refusal names the rule that decided";
            s.fault(&format!("rule[{}]", rule.name), "is there twice", remedy);
        }
    }
    Policy { default, rules }
}

fn rule(s: &mut Section<'_>) -> Option<Rule> {
    s.require("name", "name the rule: a refusal says which one decided");
    s.require("effect", "use \"allow\" or \"deny\"");
    let name = s.text("name");
    if name.as_ref().is_some_and(|name| name.trim().is_empty()) {
        s.fault("name", "is empty", "name the rule: a refusal says which one decided");
    }
    let effect = s.choice("effect", EFFECT_WORDS);
    let from = s.list("from", source);
    let to = s.list("to", |text| {
        text.parse::<ServiceName>().map_err(|error| (error.to_string(), "name a service, such as `world`".into()))
    });
    for (key, empty) in
        [("from", from.as_ref().is_some_and(Vec::is_empty)), ("to", to.as_ref().is_some_and(Vec::is_empty))]
    {
        if empty {
            // Leaving a key out means everybody; an emptied list more likely means nobody. Neither is guessed.
            s.fault(key, "is an empty list", "leave the key out to mean all, or remove the rule");
        }
    }
    Some(Rule { name: name?, effect: effect?, from: from.unwrap_or_default(), to: to.unwrap_or_default() })
}

/// An identity, or the beginning of one and `*`. The trust domain is always named in full: `spiffe://a*` would also
/// match the domain `a.evil`.
fn source(text: &str) -> Result<String, (String, String)> {
    let valid = match text.strip_suffix('*') {
        None => text.parse::<SpiffeId>().is_ok(),
        Some(start) => match start.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')) {
            Some((domain, path)) => {
                let path = format!("{path}x");
                domain.parse::<TrustDomain>().is_ok() && format!("spiffe://{domain}/{path}").parse::<SpiffeId>().is_ok()
            }
            None => false,
        },
    };
    let remedy = "write a whole identity, or the trust domain, a `/`, and a beginning that ends in `*`, such as \
         `spiffe://example.mesh/ns/production/*`";
    if valid {
        Ok(text.to_owned())
    } else {
        Err((format!("`{}` matches nothing safely", text.escape_debug()), remedy.into()))
    }
}

#[cfg(test)]
mod tests;
