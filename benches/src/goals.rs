//! What the mesh promises about speed, and whether the figures keep it.
//!
//! Pure: a table in, verdicts out. A goal that was not measured is not met and not missed. It must not measure.

use crate::{
    figures::median,
    load::Work,
    peers::Layer,
    reference,
    rounds::{Metric, Table},
    subject::{DIRECT, DIRECT_NEAR, Kind, OURS_L4, OURS_L7, OURS_NEAR_L4, OURS_NEAR_L7, Subject},
};

/// A promise and what came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// As in the names of figures.
    pub name: &'static str,
    pub promise: String,
    pub value: Option<f64>,
    pub bound: Bound,
    pub unit: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Verdict {
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        self.value.map(|value| match self.bound {
            Bound::AtLeast(least) => value >= least,
            Bound::AtMost(most) => value <= most,
        })
    }

    /// `met`, `MISSED` or `not measured`.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(value) => write!(f, "≥ {value}"),
            Self::AtMost(value) => write!(f, "≤ {value}"),
        }
    }
}

/// Memory that was measured apart from the table, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// The most that both agents together ever held.
    pub pair_peak: Option<f64>,
    /// One agent with fifty tasks and no traffic.
    pub idle: Option<f64>,
}

const MB: f64 = 1e6;

/// Judges. `l7` and `l4` are the names of the peers that were measured.
#[must_use]
pub fn judge(table: &Table, l7: &[&str], l4: &[&str], memory: Memory) -> Vec<Verdict> {
    let rate = |work, one, other| table.ratio(work, one, other, Metric::Rate);
    let best_l7 = best_rate(table, l7, Work::Http);
    let best_l4 = best_rate(table, l4, Work::Http);
    let quickest = |metric| {
        let peers = l4.iter().filter_map(|name| Some((*name, table.median(Work::Paced, name, metric)?)));
        peers.min_by(|one, other| one.1.total_cmp(&other.1)).map(|(name, _)| name)
    };
    let against = |work, one: &str, other: Option<&str>, metric| table.ratio(work, one, other?, metric);
    let least =
        |name, promise: String, value, bound| Verdict { name, promise, value, bound: Bound::AtLeast(bound), unit: "x" };
    let most =
        |name, promise: String, value, bound, unit| Verdict { name, promise, value, bound: Bound::AtMost(bound), unit };
    let called = |name: Option<&str>| name.unwrap_or("none was measured").to_owned();
    let mut verdicts = vec![
        least(
            "near_tcp_bulk",
            "one host, L4: bulk, of no mesh".into(),
            rate(Work::Bulk, OURS_NEAR_L4, DIRECT_NEAR),
            0.97,
        ),
        least(
            "near_tcp_http1",
            "one host, L4: requests, of no mesh".into(),
            rate(Work::Http, OURS_NEAR_L4, DIRECT_NEAR),
            0.97,
        ),
        most(
            "near_tcp_rtt",
            "one host, L4: round trip, of no mesh".into(),
            table.ratio(Work::Trips, OURS_NEAR_L4, DIRECT_NEAR, Metric::P50),
            1.05,
            "x",
        ),
        most(
            "near_tcp_agent_cpu",
            "one host, L4: CPU time of both agents during the bulk and round trip runs, of one CPU".into(),
            near_cpu(table),
            1.0,
            "%",
        ),
        most(
            "near_tcp_connect",
            "one host, L4: connect() slower than without a mesh by (p50)".into(),
            connect(table),
            2.0,
            "us",
        ),
        least(
            "near_http1",
            format!("one host, HTTP/1.1 through one proxy, of the best L7 pair ({})", called(best_l7)),
            against(Work::Http, OURS_NEAR_L7, best_l7, Metric::Rate),
            1.6,
        ),
        least(
            "http1_nginx",
            "across hosts, L7: HTTP/1.1, of nginx's pair".into(),
            rate(Work::Http, OURS_L7, "nginx"),
            1.3,
        ),
        most(
            "http1_nginx_cpu",
            "across hosts, L7: CPU time per request, of nginx's pair".into(),
            table.ratio(Work::Http, OURS_L7, "nginx", Metric::Cpu),
            0.75,
            "x",
        ),
    ];
    for (name, what, metric) in [("paced_p50", "p50", Metric::P50), ("paced_p99", "p99", Metric::P99)] {
        let best = quickest(metric);
        verdicts.push(most(
            name,
            format!("across hosts, L7: {what} at 2,000 requests per second, of the best L4 pair ({})", called(best)),
            against(Work::Paced, OURS_L7, best, metric),
            1.0,
            "x",
        ));
    }
    verdicts.extend([
        least(
            "tcp_http1",
            format!("across hosts, L4: HTTP/1.1, of the best L4 pair ({})", called(best_l4)),
            against(Work::Http, OURS_L4, best_l4, Metric::Rate),
            1.25,
        ),
        least(
            "tcp_bulk",
            "across hosts, L4: bulk, of envoy's TCP pair".into(),
            rate(Work::Bulk, OURS_L4, "envoy-tcp"),
            1.25,
        ),
        fresh(table),
        least(
            "grpc_haproxy",
            "across hosts, L7: gRPC, of haproxy's pair".into(),
            rate(Work::Grpc, OURS_L7, "haproxy"),
            1.3,
        ),
        most(
            "memory_pair",
            "memory of both agents at its highest".into(),
            memory.pair_peak.map(|bytes| bytes / MB),
            40.0,
            "MB",
        ),
        most(
            "memory_idle",
            "memory of an idle agent with 50 tasks".into(),
            memory.idle.map(|bytes| bytes / MB),
            12.0,
            "MB",
        ),
    ]);
    verdicts
}

/// How often in a round a subject does a work. What the closest goals compare is done more often than the rest: differences of
/// a few per cent, and of a microsecond, drown in anything but turns that follow each other closely.
#[must_use]
pub fn turns(work: Work, subject: &Subject) -> usize {
    let near = matches!(subject.name, DIRECT_NEAR | OURS_NEAR_L4);
    match work {
        // A turn is a few hundred calls.
        Work::Connect => 15,
        Work::Trips => 5,
        Work::Http | Work::Bulk if near => 8,
        Work::Bulk if matches!(subject.name, OURS_L4 | "envoy-tcp") => 6,
        Work::Grpc if matches!(subject.name, OURS_L7 | "haproxy") => 3,
        Work::Fresh if matches!(subject.name, OURS_L4 | DIRECT) => 3,
        Work::Paced if subject.name == OURS_L7 || subject.kind == Kind::Peer(Layer::L4) => 3,
        Work::Http | Work::Paced | Work::Large | Work::Fresh | Work::Grpc | Work::Bulk => 1,
    }
}

/// ztunnel itself where it was measured; else its share of `direct` on another machine.
fn fresh(table: &Table) -> Verdict {
    let measured = table.ratio(Work::Fresh, OURS_L4, "ztunnel", Metric::Rate);
    let (promise, value) = match measured {
        Some(ratio) => ("across hosts, L4: new connections, of ztunnel's".to_owned(), Some(ratio)),
        None => {
            let ours = table.ratio(Work::Fresh, OURS_L4, DIRECT, Metric::Rate);
            let theirs = reference::of_direct("ztunnel", Work::Fresh);
            (
                "across hosts, L4: new connections, of ztunnel's (each of its own machine's direct: ztunnel was measured \
                 elsewhere)"
                    .to_owned(),
                ours.zip(theirs).map(|(ours, theirs)| ours / theirs),
            )
        }
    };
    Verdict { name: "fresh_ztunnel", promise, value, bound: Bound::AtLeast(2.0), unit: "x" }
}

/// The peer with the highest median rate.
fn best_rate<'a>(table: &Table, peers: &[&'a str], work: Work) -> Option<&'a str> {
    let rates = peers.iter().filter_map(|name| Some((*name, table.median(work, name, Metric::Rate)?)));
    rates.max_by(|one, other| one.1.total_cmp(&other.1)).map(|(name, _)| name)
}

/// CPU time of the agents as a share of one CPU, over all runs in which they have nothing to do. Their clocks tick in
/// hundredths of a second, so single runs say little.
fn near_cpu(table: &Table) -> Option<f64> {
    let sum = |metric| -> f64 {
        let runs = [Work::Bulk, Work::Trips].map(|work| table.series(work, OURS_NEAR_L4, metric));
        runs.iter().flatten().flatten().sum()
    };
    let micros = sum(Metric::Duration) * 1e6;
    (micros > 0.0).then(|| sum(Metric::CpuTotal) / micros * 100.0)
}

fn connect(table: &Table) -> Option<f64> {
    let ours = table.series(Work::Connect, OURS_NEAR_L4, Metric::P50);
    let without = table.series(Work::Connect, DIRECT_NEAR, Metric::P50);
    let rounds = ours.iter().zip(&without).filter_map(|(ours, without)| Some((*ours)? - (*without)?));
    median(&rounds.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{load::Sample, rounds::Cell};

    fn rate(rate: f64) -> Option<Cell> {
        Some(Cell { sample: Sample { rate, ..Sample::default() }, ..Cell::default() })
    }

    fn of<'a>(verdicts: &'a [Verdict], name: &str) -> &'a Verdict {
        verdicts.iter().find(|verdict| verdict.name == name).expect("a goal of that name")
    }

    #[test]
    fn a_bound_itself_is_good_enough_and_nothing_measured_is_no_verdict() {
        let mut table = Table::default();
        table.add(Work::Http, OURS_L7, 1, rate(130.0));
        table.add(Work::Http, "nginx", 1, rate(100.0));
        let verdicts = judge(&table, &["nginx"], &[], Memory { pair_peak: Some(40.1e6), idle: None });
        assert_eq!(of(&verdicts, "http1_nginx").met(), Some(true));
        assert_eq!(of(&verdicts, "memory_pair").met(), Some(false));
        assert_eq!(of(&verdicts, "memory_idle").met(), None);
        assert_eq!(of(&verdicts, "tcp_http1").word(), "not measured");
    }

    #[test]
    fn the_best_peer_is_the_one_to_beat() {
        let mut table = Table::default();
        for (name, value) in [(OURS_NEAR_L7, 200.0), ("nginx", 100.0), ("haproxy", 125.0)] {
            table.add(Work::Http, name, 1, rate(value));
        }
        let verdicts = judge(&table, &["nginx", "haproxy"], &[], Memory::default());
        let verdict = of(&verdicts, "near_http1");
        assert_eq!((verdict.value, verdict.met()), (Some(1.6), Some(true)));
        assert!(verdict.promise.contains("haproxy"), "{}", verdict.promise);
    }

    #[test]
    fn agents_that_do_nothing_are_weighed_over_all_runs() {
        let mut table = Table::default();
        for (work, used) in [(Work::Bulk, 10_000.0), (Work::Trips, 0.0), (Work::Trips, 20_000.0)] {
            let sample = Sample { rate: 100.0, operations: 100.0, ..Sample::default() };
            table.add(work, OURS_NEAR_L4, 1, Some(Cell { sample, cpu_total: used, ..Cell::default() }));
        }
        assert_eq!(of(&judge(&table, &[], &[], Memory::default()), "near_tcp_agent_cpu").value, Some(1.0));
    }

    #[test]
    fn an_absent_ztunnel_is_compared_by_its_share_of_direct() {
        let mut table = Table::default();
        table.add(Work::Fresh, OURS_L4, 1, rate(300.0));
        table.add(Work::Fresh, DIRECT, 1, rate(760.0));
        let absent = of(&judge(&table, &[], &[], Memory::default()), "fresh_ztunnel").clone();
        assert!(absent.promise.contains("elsewhere"));
        assert_eq!(absent.value.map(|value| (value * 1000.0).round()), Some(2000.0));
        table.add(Work::Fresh, "ztunnel", 1, rate(200.0));
        assert_eq!(of(&judge(&table, &[], &[], Memory::default()), "fresh_ztunnel").value, Some(1.5));
    }
}
