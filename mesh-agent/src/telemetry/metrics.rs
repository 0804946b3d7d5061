//! Every metric family: its name, help, unit and labels.
//!
//! Label values are enums, or names from the snapshot; the number of (source, destination) pairs is limited, and what
//! comes beyond is counted under `other`. Must not know who counts.

mod endpoints;

use std::{
    array,
    collections::{BTreeMap, HashMap},
    sync::{Arc, OnceLock, PoisonError, RwLock, atomic::AtomicU64},
    time::Duration,
};

use mesh_common::{maps::counter, refusal::Refusal};
use mesh_core::{
    id::{ServiceName, TaskId},
    model::Snapshot,
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use endpoints::EndpointCounts;

/// Most (source, destination) pairs told apart.
const MAX_LINKS: usize = 10_000;

macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $label:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// The label, as it stands in metrics and logs.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label),+ }
            }
        }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                self.label().encode(encoder)
            }
        }
    };
}

labels! {
    /// Which way a connection goes, seen from this host's tasks.
    Direction {
        Outbound = "outbound",
        Inbound = "inbound",
        /// Between two tasks of this host, without the agent.
        Direct = "direct",
    }
}

labels! {
    /// What a record is about.
    Protocol { Tcp = "tcp", Http = "http", Http2 = "http2", Grpc = "grpc" }
}

labels! {
    /// How a connection ended.
    Outcome {
        /// Both directions ended in order.
        Ok = "ok",
        /// It was not carried; there is a refusal.
        Refused = "refused",
        /// One of the ends reset it.
        Reset = "reset",
        /// It was cut off before its end: by the client in the middle of an answer, or by the agent stopping.
        Aborted = "aborted",
    }
}

labels! {
    /// How a DNS query was answered.
    DnsOutcome {
        /// From the snapshot, negative answers too.
        Mesh = "mesh",
        /// By the resolver that the task had asked.
        Forwarded = "forwarded",
        Failed = "failed",
        /// Not forwarded, because too many were under way.
        Overload = "overload",
        Malformed = "malformed",
    }
}

labels! {
    /// Health of endpoints.
    EndpointHealth { Healthy = "healthy", Unhealthy = "unhealthy", Draining = "draining" }
}

/// A source and a destination that are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LinkKey {
    pub direction: Direction,
    pub src_service: Option<ServiceName>,
    pub src_task: Option<TaskId>,
    pub dst_service: Option<ServiceName>,
    pub dst_task: Option<TaskId>,
}

/// Handles of everything counted about one pair. Series appear when they are first counted.
pub struct Link {
    families: Arc<Families>,
    ends: Ends,
    sent: OnceLock<Counter>,
    received: OnceLock<Counter>,
    requests: [OnceLock<Counter>; STATUS.len()],
    connections: [OnceLock<Counter>; 4],
    request_seconds: OnceLock<Histogram>,
    connection_seconds: OnceLock<Histogram>,
}

/// Counts a connection as open until it is dropped.
pub struct Open(Gauge);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ends {
    direction: Direction,
    src_service: String,
    src_task: String,
    dst_service: String,
    dst_task: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Services {
    direction: Direction,
    src_service: String,
    dst_service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Connections {
    direction: Direction,
    src_service: String,
    src_task: String,
    dst_service: String,
    dst_task: String,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Requests {
    direction: Direction,
    src_service: String,
    src_task: String,
    dst_service: String,
    dst_task: String,
    status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refusals {
    direction: Direction,
    src_service: String,
    dst_service: String,
    number: u32,
    refusal: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Dns {
    outcome: DnsOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verdict {
    verdict: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Registered {
    registry: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LocalPorts {
    service: String,
    ready: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceName {
    source: String,
}

/// How a source of services is doing that is asked over the network.
#[derive(Clone, Copy, Debug, Default)]
pub struct SourceFigures {
    /// Since the last answer.
    pub age: Option<Duration>,
    pub answers: u64,
    pub errors: u64,
    pub watches: usize,
    pub services: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Map {
    map: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Endpoints {
    service: String,
    health: EndpointHealth,
}

/// Classes of HTTP status; the last one is for a request that got none.
const STATUS: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "none"];

/// Verdicts of the connect hooks, by their counter.
const VERDICTS: [(u32, &str); 6] = [
    (counter::REDIRECTED, "redirected"),
    (counter::DIRECT, "direct"),
    (counter::FAILED_OPEN, "failed_open"),
    (counter::REFUSED, "refused"),
    (counter::DNS, "dns"),
    (counter::PASSED, "passed"),
];

/// Families that are counted per pair.
struct Families {
    connections: Family<Connections, Counter>,
    active: Family<Services, Gauge>,
    connection_seconds: Family<Services, Histogram>,
    requests: Family<Requests, Counter>,
    request_seconds: Family<Services, Histogram>,
    sent: Family<Ends, Counter>,
    received: Family<Ends, Counter>,
    refusals: Family<Refusals, Counter>,
}

/// All metrics of the agent.
pub struct Metrics {
    registry: Registry,
    families: Arc<Families>,
    links: RwLock<HashMap<LinkKey, Arc<Link>>>,
    dns: Family<Dns, Counter>,
    handshakes: Counter,
    tunnels: Gauge,
    tunnel_streams: Gauge,
    verdicts: Family<Verdict, Counter>,
    map_full: Counter,
    events_lost: Counter,
    map_entries: Family<Map, Gauge>,
    generation: Gauge<u64, AtomicU64>,
    workloads: Gauge,
    source_age: Family<SourceName, Gauge<f64, AtomicU64>>,
    source_answers: Family<SourceName, Counter>,
    source_errors: Family<SourceName, Counter>,
    source_watches: Family<SourceName, Gauge>,
    source_services: Family<SourceName, Gauge>,
    local_ports: Family<LocalPorts, Gauge>,
    registrations: Family<Registered, Gauge>,
    registrations_behind: Family<Registered, Gauge>,
    endpoints: EndpointCounts,
    /// Attempts on another endpoint after one had failed.
    pub retries: Counter,
    /// Access lines that nobody took in time.
    pub access_lines_lost: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All families, registered, nothing counted.
    pub fn new() -> Self {
        let families = Families {
            connections: Family::default(),
            active: Family::default(),
            // 1 ms to about 4.5 hours: streams live long.
            connection_seconds: Family::new_with_constructor(|| Histogram::new(scale(0.001, 4.0, 13))),
            requests: Family::default(),
            // 0.25 ms to 32 s.
            request_seconds: Family::new_with_constructor(|| Histogram::new(scale(0.000_25, 2.0, 18))),
            sent: Family::default(),
            received: Family::default(),
            refusals: Family::default(),
        };
        let mut metrics = Self {
            registry: Registry::with_prefix("mesh"),
            families: Arc::new(families),
            links: RwLock::default(),
            dns: Family::default(),
            handshakes: Counter::default(),
            tunnels: Gauge::default(),
            tunnel_streams: Gauge::default(),
            verdicts: Family::default(),
            map_full: Counter::default(),
            events_lost: Counter::default(),
            map_entries: Family::default(),
            generation: Gauge::default(),
            workloads: Gauge::default(),
            source_age: Family::default(),
            source_answers: Family::default(),
            source_errors: Family::default(),
            source_watches: Family::default(),
            source_services: Family::default(),
            local_ports: Family::default(),
            registrations: Family::default(),
            registrations_behind: Family::default(),
            endpoints: EndpointCounts::default(),
            retries: Counter::default(),
            access_lines_lost: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let (r, f) = (&mut self.registry, &self.families);
        r.register("connections", "Byte-stream connections that have ended", f.connections.clone());
        r.register("connections_active", "Client connections that are open", f.active.clone());
        r.register_with_unit(
            "connection_duration",
            "Lifetime of connections",
            Unit::Seconds,
            f.connection_seconds.clone(),
        );
        r.register("requests", "HTTP requests that have ended", f.requests.clone());
        r.register_with_unit(
            "request_duration",
            "Time from head to last byte",
            Unit::Seconds,
            f.request_seconds.clone(),
        );
        r.register_with_unit("sent", "Payload from source to destination", Unit::Bytes, f.sent.clone());
        r.register_with_unit("received", "Payload from destination to source", Unit::Bytes, f.received.clone());
        r.register("refusals", "Connections and requests refused, by reason", f.refusals.clone());
        r.register("upstream_retries", "Attempts on another endpoint", self.retries.clone());
        r.register("dns_queries", "DNS queries of tasks", self.dns.clone());
        r.register(
            "tunnel_handshakes",
            "TLS handshakes with other agents that this one began",
            self.handshakes.clone(),
        );
        r.register("tunnels_open", "Connections to other agents", self.tunnels.clone());
        r.register("tunnel_streams_open", "Streams in connections to other agents", self.tunnel_streams.clone());
        r.register("kernel_verdicts", "Verdicts of the connect hooks", self.verdicts.clone());
        r.register("kernel_map_full", "Connections refused for want of room in a kernel map", self.map_full.clone());
        r.register("kernel_events_lost", "Reports for which the ring buffer had no room", self.events_lost.clone());
        r.register("kernel_map_entries", "Entries in use of the kernel maps", self.map_entries.clone());
        r.register("snapshot_generation", "Number of the snapshot in use", self.generation.clone());
        r.register("workloads", "Tasks of this host that are in the mesh", self.workloads.clone());
        r.register("endpoints", "Known endpoints", self.endpoints.clone());
        r.register_with_unit(
            "source_answer_age",
            "Time since a source of services last answered",
            Unit::Seconds,
            self.source_age.clone(),
        );
        r.register("source_answers", "Answers of a source of services", self.source_answers.clone());
        r.register("source_errors", "Questions to a source of services without an answer", self.source_errors.clone());
        r.register("source_watches", "Questions that wait for news", self.source_watches.clone());
        r.register("source_services", "Services that a source knows", self.source_services.clone());
        r.register("local_ports", "Ports of this host's tasks, by whether they are ready", self.local_ports.clone());
        r.register("registrations", "Instances of this host that are registered", self.registrations.clone());
        r.register(
            "registrations_behind",
            "Whether the registry does not know everything of this host (0 or 1)",
            self.registrations_behind.clone(),
        );
        r.register("access_lines_lost", "Access lines that nobody took in time", self.access_lines_lost.clone());
    }

    /// The handles of a pair. Fetch once per connection.
    pub fn link(&self, key: &LinkKey) -> Arc<Link> {
        if let Some(link) = self.links.read().unwrap_or_else(PoisonError::into_inner).get(key) {
            return link.clone();
        }
        let mut links = self.links.write().unwrap_or_else(PoisonError::into_inner);
        if links.len() >= MAX_LINKS && !links.contains_key(key) {
            // Not remembered: the pair is found again in the families, under one set of labels.
            return Arc::new(Link::new(&self.families, Ends::other(key.direction)));
        }
        links.entry(key.clone()).or_insert_with(|| Arc::new(Link::new(&self.families, Ends::from(key)))).clone()
    }

    /// A client connection is open until the answer is dropped.
    pub fn open(&self, direction: Direction, src: &str, dst: &str) -> Open {
        let services = Services { direction, src_service: src.to_owned(), dst_service: dst.to_owned() };
        let gauge = self.families.active.get_or_create_owned(&services);
        gauge.inc();
        Open(gauge)
    }

    /// A refusal outside any record: the kernel's own, for instance.
    pub fn refused(&self, direction: Direction, src: &str, dst: &str, refusal: Refusal) {
        self.families.refused(direction, src, dst, refusal);
    }

    /// Takes over the DNS servers' counters.
    pub fn dns(&self, totals: &[(DnsOutcome, u64)]) {
        for (outcome, total) in totals {
            store(&self.dns.get_or_create(&Dns { outcome: *outcome }), *total);
        }
    }

    /// Takes over the dialler's counters: handshakes ever, connections and streams now.
    pub fn tunnels(&self, handshakes: u64, connections: usize, streams: usize) {
        store(&self.handshakes, handshakes);
        self.tunnels.set(i64::try_from(connections).unwrap_or(i64::MAX));
        self.tunnel_streams.set(i64::try_from(streams).unwrap_or(i64::MAX));
    }

    /// Takes over the kernel's counters: `values[i]` belongs to [`counter`] number `i`.
    pub fn kernel(&self, values: &[u64]) {
        let value = |number: u32| values.get(number as usize).copied().unwrap_or(0);
        for (number, verdict) in VERDICTS {
            store(&self.verdicts.get_or_create(&Verdict { verdict }), value(number));
        }
        store(&self.map_full, value(counter::MAP_FULL));
        store(&self.events_lost, value(counter::EVENT_LOST));
    }

    /// Takes over what a source of services counts.
    pub fn source(&self, name: &str, figures: &SourceFigures) {
        let from = SourceName { source: name.to_owned() };
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        if let Some(age) = figures.age {
            self.source_age.get_or_create(&from).set(age.as_secs_f64());
        }
        store(&self.source_answers.get_or_create(&from), figures.answers);
        store(&self.source_errors.get_or_create(&from), figures.errors);
        self.source_watches.get_or_create(&from).set(number(figures.watches));
        self.source_services.get_or_create(&from).set(number(figures.services));
    }

    /// Of each service of this host: how many ports are ready, and how many are not.
    pub fn local_ports(&self, counts: &BTreeMap<ServiceName, (usize, usize)>) {
        self.local_ports.clear();
        for (service, (ready, unready)) in counts {
            for (word, count) in [("true", ready), ("false", unready)] {
                let labels = LocalPorts { service: service.to_string(), ready: word };
                self.local_ports.get_or_create(&labels).set(i64::try_from(*count).unwrap_or(i64::MAX));
            }
        }
    }

    /// How many instances of this host are registered with a registry, and whether these are all.
    pub fn registered(&self, registry: &'static str, count: usize, all: bool) {
        let labels = Registered { registry };
        self.registrations.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
        self.registrations_behind.get_or_create(&labels).set(i64::from(!all));
    }

    /// A kernel map has this many entries in use.
    pub fn kernel_map(&self, map: &str, entries: usize) {
        self.map_entries.get_or_create(&Map { map: map.to_owned() }).set(i64::try_from(entries).unwrap_or(i64::MAX));
    }

    /// A snapshot has been published. Series of pairs whose local task has left are removed.
    pub fn snapshot(&self, snapshot: &Arc<Snapshot>) {
        self.generation.set(snapshot.generation);
        self.workloads.set(i64::try_from(snapshot.workloads.len()).unwrap_or(i64::MAX));
        self.endpoints.set(snapshot);
        self.prune(snapshot);
    }

    /// Tasks come and go all day; their series must not pile up.
    fn prune(&self, snapshot: &Snapshot) {
        let local = |task: &Option<TaskId>| task.as_ref().is_none_or(|task| snapshot.workloads.contains_key(task));
        self.links.write().unwrap_or_else(PoisonError::into_inner).retain(|key, link| {
            let keep = Arc::strong_count(link) > 1
                || match key.direction {
                    Direction::Outbound | Direction::Direct => local(&key.src_task),
                    Direction::Inbound => local(&key.dst_task),
                };
            if !keep {
                link.forget();
            }
            keep
        });
    }

    /// Everything in Prometheus' text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        if encode(&mut text, &self.registry).is_err() {
            text.clear();
        }
        text
    }
}

impl Link {
    fn new(families: &Arc<Families>, ends: Ends) -> Self {
        Self {
            families: families.clone(),
            ends,
            sent: OnceLock::new(),
            received: OnceLock::new(),
            requests: array::from_fn(|_| OnceLock::new()),
            connections: array::from_fn(|_| OnceLock::new()),
            request_seconds: OnceLock::new(),
            connection_seconds: OnceLock::new(),
        }
    }

    /// Adds payload, seen from the source.
    pub fn bytes(&self, sent: u64, received: u64) {
        let families = &self.families;
        self.sent.get_or_init(|| families.sent.get_or_create_owned(&self.ends)).inc_by(sent);
        self.received.get_or_init(|| families.received.get_or_create_owned(&self.ends)).inc_by(received);
    }

    /// A connection has ended.
    pub fn connection(&self, outcome: Outcome, took: Duration) {
        let families = &self.families;
        let labels = || self.ends.connections(outcome);
        self.connections[outcome as usize].get_or_init(|| families.connections.get_or_create_owned(&labels())).inc();
        self.connection_seconds
            .get_or_init(|| families.connection_seconds.get_or_create_owned(&self.ends.services()))
            .observe(took.as_secs_f64());
    }

    /// A request has ended, with this status or without an answer.
    pub fn request(&self, status: Option<u16>, took: Duration) {
        let families = &self.families;
        let class = match status {
            Some(status @ 100..600) => usize::from(status / 100 - 1),
            _ => STATUS.len() - 1,
        };
        self.requests[class]
            .get_or_init(|| families.requests.get_or_create_owned(&self.ends.requests(STATUS[class])))
            .inc();
        self.request_seconds
            .get_or_init(|| families.request_seconds.get_or_create_owned(&self.ends.services()))
            .observe(took.as_secs_f64());
    }

    /// A connection or request was refused.
    pub fn refused(&self, refusal: Refusal) {
        self.families.refused(self.ends.direction, &self.ends.src_service, &self.ends.dst_service, refusal);
    }

    fn forget(&self) {
        let (families, ends) = (&self.families, &self.ends);
        families.sent.remove(ends);
        families.received.remove(ends);
        for status in STATUS {
            families.requests.remove(&ends.requests(status));
        }
        for outcome in [Outcome::Ok, Outcome::Refused, Outcome::Reset, Outcome::Aborted] {
            families.connections.remove(&ends.connections(outcome));
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Families {
    fn refused(&self, direction: Direction, src: &str, dst: &str, refusal: Refusal) {
        let labels = Refusals {
            direction,
            src_service: src.to_owned(),
            dst_service: dst.to_owned(),
            number: refusal as u32,
            refusal: refusal.label(),
        };
        self.refusals.get_or_create(&labels).inc();
    }
}

impl Ends {
    fn other(direction: Direction) -> Self {
        let other = || "other".to_owned();
        Self { direction, src_service: other(), src_task: other(), dst_service: other(), dst_task: other() }
    }

    fn services(&self) -> Services {
        Services {
            direction: self.direction,
            src_service: self.src_service.clone(),
            dst_service: self.dst_service.clone(),
        }
    }

    fn connections(&self, outcome: Outcome) -> Connections {
        let Self { direction, src_service, src_task, dst_service, dst_task } = self.clone();
        Connections { direction, src_service, src_task, dst_service, dst_task, outcome }
    }

    fn requests(&self, status: &'static str) -> Requests {
        let Self { direction, src_service, src_task, dst_service, dst_task } = self.clone();
        Requests { direction, src_service, src_task, dst_service, dst_task, status }
    }
}

impl From<&LinkKey> for Ends {
    fn from(key: &LinkKey) -> Self {
        fn text<T: ToString>(name: Option<&T>) -> String {
            name.map(ToString::to_string).unwrap_or_default()
        }
        Self {
            direction: key.direction,
            src_service: text(key.src_service.as_ref()),
            src_task: text(key.src_task.as_ref()),
            dst_service: text(key.dst_service.as_ref()),
            dst_task: text(key.dst_task.as_ref()),
        }
    }
}

fn store(counter: &Counter, value: u64) {
    counter.inner().store(value, std::sync::atomic::Ordering::Relaxed);
}

fn scale(start: f64, factor: f64, length: u16) -> impl Iterator<Item = f64> {
    prometheus_client::metrics::histogram::exponential_buckets(start, factor, length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> LinkKey {
        LinkKey {
            direction: Direction::Outbound,
            src_service: "web".parse().ok(),
            src_task: format!("t{number}").parse().ok(),
            dst_service: "world".parse().ok(),
            dst_task: None,
        }
    }

    #[test]
    fn pairs_beyond_the_limit_are_counted_together() {
        let metrics = Metrics::new();
        for number in 0..MAX_LINKS + 5 {
            metrics.link(&key(number)).connection(Outcome::Ok, Duration::from_millis(1));
        }
        let text = metrics.encode();
        let series = text.lines().filter(|line| line.starts_with("mesh_connections_total{")).count();
        assert_eq!(series, MAX_LINKS + 1);
        assert!(text.contains(r#"src_task="other",dst_service="other",dst_task="other",outcome="ok"} 5"#));
    }

    #[test]
    fn series_of_tasks_that_left_are_removed() {
        let metrics = Metrics::new();
        metrics.link(&key(1)).connection(Outcome::Ok, Duration::from_millis(1));
        assert!(metrics.encode().contains(r#"src_task="t1""#));
        metrics.snapshot(&Arc::default());
        assert!(!metrics.encode().contains(r#"src_task="t1""#));
    }

    #[test]
    fn kernel_counters_are_taken_over() {
        let metrics = Metrics::new();
        metrics.kernel(&[1, 2, 3, 4, 5, 6, 7, 8]);
        metrics.kernel(&[11, 2, 3, 4, 5, 6, 7, 8]);
        let text = metrics.encode();
        assert!(text.contains(r#"mesh_kernel_verdicts_total{verdict="redirected"} 11"#), "{text}");
        assert!(text.contains("mesh_kernel_map_full_total 6"), "{text}");
        assert!(text.contains(r#"verdict="passed"} 8"#), "{text}");
    }

    #[test]
    fn ports_are_counted_by_whether_they_are_ready() {
        let metrics = Metrics::new();
        metrics.local_ports(&[("web".parse().expect("valid"), (2, 1)), ("old".parse().expect("valid"), (1, 0))].into());
        metrics.local_ports(&[("web".parse().expect("valid"), (3, 0))].into());
        let text = metrics.encode();
        assert!(text.contains(r#"mesh_local_ports{service="web",ready="true"} 3"#), "{text}");
        assert!(text.contains(r#"mesh_local_ports{service="web",ready="false"} 0"#), "{text}");
        assert!(!text.contains("old"), "{text}");
    }

    #[test]
    fn an_open_connection_is_counted_while_it_lasts() {
        let metrics = Metrics::new();
        let open = metrics.open(Direction::Inbound, "web", "world");
        let line = |value| {
            format!(r#"mesh_connections_active{{direction="inbound",src_service="web",dst_service="world"}} {value}"#)
        };
        assert!(metrics.encode().contains(&line(1)));
        drop(open);
        assert!(metrics.encode().contains(&line(0)));
    }
}
