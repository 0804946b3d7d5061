//! Measures every subject at every work, in turn, several times; and the table of what came out.
//!
//! Interleaved: all subjects do the same work one after another before the next work begins, and the whole is repeated,
//! so that what the machine does besides meets all of them. It must not judge.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};

use crate::{
    figures::{self, median, spread},
    load::{Sample, Work},
    subject::Subject,
    topology::Topology,
    usage::{self, Strangers, Watch},
};

/// What one run of one work through one subject yielded, and what it cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cell {
    pub sample: Sample,
    /// CPU time of both proxies together, in microseconds: for each operation, and in all.
    pub cpu: f64,
    pub cpu_total: f64,
    /// The most memory of both proxies together, in bytes; shared pages once.
    pub memory: f64,
    /// Share of the machine that others took meanwhile.
    pub strangers: f64,
}

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    Rate,
    /// Seconds.
    Duration,
    P50,
    P99,
    Cpu,
    CpuTotal,
    Memory,
    Strangers,
}

/// What was measured, by work, subject, round, and turn within the round. A run that failed is `None`.
#[derive(Debug, Default)]
pub struct Table {
    cells: BTreeMap<(Work, String), Rounds>,
}

/// The turns of each round.
type Rounds = BTreeMap<u32, Vec<Option<Cell>>>;

impl Table {
    pub fn add(&mut self, work: Work, subject: &str, round: u32, cell: Option<Cell>) {
        self.cells.entry((work, subject.to_owned())).or_default().entry(round).or_default().push(cell);
    }

    /// One value for each turn of each round; nothing where the subject did not do the work.
    #[must_use]
    pub fn series(&self, work: Work, subject: &str, metric: Metric) -> Vec<Option<f64>> {
        self.by_round(work, subject, metric).into_values().flatten().collect()
    }

    fn by_round(&self, work: Work, subject: &str, metric: Metric) -> BTreeMap<u32, Vec<Option<f64>>> {
        let values = |turns: &Vec<Option<Cell>>| turns.iter().map(|cell| metric.of(cell.as_ref()?)).collect();
        let rounds = self.cells.get(&(work, subject.to_owned())).into_iter().flatten();
        rounds.map(|(round, turns)| (*round, values(turns))).collect()
    }

    #[must_use]
    pub fn median(&self, work: Work, subject: &str, metric: Metric) -> Option<f64> {
        median(&self.series(work, subject, metric).into_iter().flatten().collect::<Vec<_>>())
    }

    #[must_use]
    pub fn spread(&self, work: Work, subject: &str, metric: Metric) -> Option<f64> {
        spread(&self.series(work, subject, metric).into_iter().flatten().collect::<Vec<_>>())
    }

    /// Median of `one / other` over the turns, or over the rounds where the two had different numbers of turns.
    #[must_use]
    pub fn ratio(&self, work: Work, one: &str, other: &str, metric: Metric) -> Option<f64> {
        let others = self.by_round(work, other, metric);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (round, one) in self.by_round(work, one, metric) {
            let Some(other) = others.get(&round) else { continue };
            if one.len() == other.len() {
                ours.extend(one);
                theirs.extend(other);
            } else {
                let middle = |turns: &[Option<f64>]| median(&turns.iter().copied().flatten().collect::<Vec<_>>());
                ours.push(middle(&one));
                theirs.push(middle(other));
            }
        }
        figures::ratio(&ours, &theirs)
    }

    /// Every value of a column.
    #[must_use]
    pub fn column(&self, metric: Metric) -> Vec<f64> {
        self.all().filter_map(|cell| metric.of(cell.as_ref()?)).collect()
    }

    /// The most over all works and rounds.
    #[must_use]
    pub fn most(&self, subject: &str, metric: Metric) -> Option<f64> {
        let own = self.cells.iter().filter(|((_, name), _)| name == subject);
        let cells = own.flat_map(|(_, rounds)| rounds.values().flatten().flatten());
        cells.filter_map(|cell| metric.of(cell)).max_by(f64::total_cmp)
    }

    /// Runs that failed.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.all().filter(|cell| cell.is_none()).count()
    }

    fn all(&self) -> impl Iterator<Item = &Option<Cell>> {
        self.cells.values().flat_map(Rounds::values).flatten()
    }
}

impl Metric {
    fn of(self, cell: &Cell) -> Option<f64> {
        match self {
            Self::Rate => Some(cell.sample.rate),
            Self::Duration => Some(cell.sample.operations / cell.sample.rate).filter(|seconds| seconds.is_finite()),
            Self::P50 => cell.sample.p50,
            Self::P99 => cell.sample.p99,
            Self::Cpu => Some(cell.cpu),
            Self::CpuTotal => Some(cell.cpu_total),
            Self::Memory => Some(cell.memory),
            Self::Strangers => Some(cell.strangers),
        }
    }
}

/// Measures all, telling each result as it comes. `turns` says how often in a round a subject does a work: those with more
/// than others go on alone, so that they follow each other closely. Every other turn has the opposite order, so that nobody is
/// always the first, and what drifts meets all alike.
pub fn measure(
    topology: &Topology,
    subjects: &[Subject],
    works: &[Work],
    (rounds, seconds): (u32, u32),
    turns: impl Fn(Work, &Subject) -> usize,
    mut tell: impl FnMut(&str),
) -> Table {
    let mut table = Table::default();
    for round in 1..=rounds {
        for &work in works {
            let able = || subjects.iter().filter(|subject| subject.works.contains(&work));
            let most = able().map(|subject| turns(work, subject)).max().unwrap_or_default();
            for subject in (0..most).flat_map(|turn| {
                let mut all: Vec<_> = able().filter(|subject| turn < turns(work, subject)).collect();
                if turn % 2 == 1 {
                    all.reverse();
                }
                all
            }) {
                let cell = cell(topology, subject, work, seconds);
                tell(&match &cell {
                    Ok(cell) => line(round, work, subject.name, cell),
                    Err(error) => format!("round {round} {:<8} {:<18} FAILED {error:#}", work.name(), subject.name),
                });
                table.add(work, subject.name, round, cell.ok());
            }
        }
    }
    table
}

fn line(round: u32, work: Work, name: &str, cell: &Cell) -> String {
    let times = cell.sample.p50.zip(cell.sample.p99).map(|(p50, p99)| format!(" p50 {p50:.1} µs p99 {p99:.1} µs"));
    let ((rate, unit), (cost, per)) = (work.rate(cell.sample.rate), work.cost(cell.cpu));
    format!(
        "round {round} {:<8} {name:<18} {rate:>10.1} {unit}{} {cost:>8.1} {per}, {:.1} MiB, others {:.0} %",
        work.name(),
        times.unwrap_or_default(),
        cell.memory / f64::from(1 << 20),
        cell.strangers * 100.0,
    )
}

fn cell(topology: &Topology, subject: &Subject, work: Work, seconds: u32) -> Result<Cell> {
    let pair = if subject.meshed { &topology.meshed } else { &topology.plain };
    let watch = Watch::start(&subject.pids);
    let cgroup = topology.cluster.hosts()[0].cgroup().parent().context("a host's cgroup is in the cluster's")?;
    let strangers = Strangers::watch(cgroup)?;
    let before = usage::cpu(&subject.pids);
    let sample = work.run(&topology.cluster, (pair, subject.client), &subject.target, seconds)?;
    let used = usage::cpu(&subject.pids).saturating_sub(before).as_secs_f64() * 1e6;
    Ok(Cell {
        sample,
        cpu: used / sample.operations,
        cpu_total: used,
        strangers: strangers.share()?,
        memory: watch.most() as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(rate: f64) -> Option<Cell> {
        Some(Cell { sample: Sample { rate, ..Sample::default() }, ..Cell::default() })
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let mut table = Table::default();
        for (round, (one, other)) in (1..).zip([(10.0, 20.0), (30.0, 20.0), (10.0, 10.0)]) {
            table.add(Work::Http, "one", round, cell(one));
            table.add(Work::Http, "other", round, cell(other));
        }
        assert_eq!(table.ratio(Work::Http, "one", "other", Metric::Rate), Some(1.0));
        assert_eq!(table.median(Work::Http, "one", Metric::Rate), Some(10.0));
        assert_eq!(table.most("one", Metric::Rate), Some(30.0));
        assert_eq!(table.ratio(Work::Bulk, "one", "other", Metric::Rate), None);
    }

    #[test]
    fn who_has_more_turns_is_compared_by_the_middle_of_each_round() {
        let mut table = Table::default();
        for (round, rate) in [(1, 10.0), (1, 20.0), (1, 60.0), (2, 40.0), (2, 40.0), (2, 80.0)] {
            table.add(Work::Http, "often", round, cell(rate));
        }
        for (round, rate) in [(1, 10.0), (2, 10.0)] {
            table.add(Work::Http, "seldom", round, cell(rate));
        }
        assert_eq!(table.ratio(Work::Http, "often", "seldom", Metric::Rate), Some(3.0), "the middle of 2 and 4");
    }

    #[test]
    fn a_failed_run_is_no_figure_but_is_counted() {
        let mut table = Table::default();
        table.add(Work::Http, "one", 1, None);
        table.add(Work::Http, "one", 2, cell(4.0));
        assert_eq!(table.median(Work::Http, "one", Metric::Rate), Some(4.0));
        assert_eq!(table.failures(), 1);
    }
}
