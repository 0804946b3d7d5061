//! The report: goals, tables, noise, proofs and the foreign figures, as Markdown, and the plot that belongs to it.
//!
//! It writes down what it is given and must not measure or judge.

use std::fmt::Write as _;

use crate::{
    figures::median,
    goals::Verdict,
    load::Work,
    peers::Layer,
    plot::{self, Bar, Colour, Panel},
    proof::Proof,
    reference,
    rounds::{Metric, Table},
    subject::{self, Kind, Subject},
};

/// All that a report says.
#[derive(Debug)]
pub struct Report<'a> {
    pub machine: Vec<String>,
    pub versions: Vec<String>,
    pub rounds: u32,
    pub seconds: u32,
    pub subjects: &'a [Subject],
    pub table: &'a Table,
    pub verdicts: &'a [Verdict],
    pub proofs: &'a [Proof],
    pub skipped: &'a [String],
    /// Name of the plot's file, beside the report.
    pub plot: &'a str,
}

impl Report<'_> {
    /// `None` where nothing was written to a string, which does not happen.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).ok();
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "# ecs-mesh beside what could be installed instead\n")?;
        writeln!(
            text,
            "Written by `cargo xtask bench peers`. How it measures: [docs/performance.md](../docs/performance.md).\n"
        )?;
        for line in self.machine.iter().chain(&self.versions) {
            writeln!(text, "- {line}")?;
        }
        writeln!(
            text,
            "- {} rounds of {} s for each cell, subjects in turn; medians, and ratios taken within each round",
            self.rounds, self.seconds
        )?;
        self.noise(text)?;
        for skipped in self.skipped {
            writeln!(text, "- **Not measured**: {skipped}")?;
        }
        writeln!(text, "\n![Rates as shares of no mesh]({})\n", self.plot)?;
        self.goals(text)?;
        for work in Work::ALL {
            self.table_of(text, work)?;
        }
        self.proofs(text)?;
        elsewhere(text)
    }

    /// How far the rounds were apart, and what else the machine did.
    fn noise(&self, text: &mut String) -> std::fmt::Result {
        let strangers = self.table.column(Metric::Strangers);
        let most = strangers.iter().copied().fold(0.0, f64::max);
        let spreads: Vec<f64> = Work::ALL
            .iter()
            .filter(|work| work.is_a_race())
            .flat_map(|work| {
                self.subjects.iter().filter_map(|subject| self.table.spread(*work, subject.name, Metric::Rate))
            })
            .collect();
        let share = |value: f64| format!("{:.0} %", value * 100.0);
        writeln!(
            text,
            "- Noise: others took {} of the machine in the median run and {} in the worst; rates of one cell were {} \
             apart between rounds in the median and {} at most",
            share(median(&strangers).unwrap_or_default()),
            share(most),
            median(&spreads).map_or("(one round only)".to_owned(), share),
            share(spreads.iter().copied().fold(0.0, f64::max)),
        )
    }

    fn goals(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "## Goals\n\n| Goal | Measured | Bound | |\n|---|---:|---:|---|")?;
        for verdict in self.verdicts {
            let value = verdict.value.map_or("–".to_owned(), |value| format!("{value:.2} {}", verdict.unit));
            let word = verdict.word();
            let word = if verdict.met() == Some(false) { format!("**{word}**") } else { word.to_owned() };
            writeln!(text, "| {} | {value} | {} {} | {word} |", verdict.promise, verdict.bound, verdict.unit)?;
        }
        writeln!(text)
    }

    fn table_of(&self, text: &mut String, work: Work) -> std::fmt::Result {
        let shown: Vec<&Subject> = self.subjects.iter().filter(|subject| subject.works.contains(&work)).collect();
        let measured = |subject: &&&Subject| self.table.median(work, subject.name, Metric::Rate).is_some();
        if !shown.iter().any(|subject| measured(&subject)) {
            return Ok(());
        }
        writeln!(text, "## {}\n", work.title())?;
        let (rate, cpu) = match work {
            Work::Bulk => ("Gbit/s", "CPU ms/GB"),
            Work::Large => ("answers/s", "CPU µs each"),
            Work::Fresh | Work::Http | Work::Paced | Work::Grpc => ("req/s", "CPU µs/req"),
            Work::Trips | Work::Connect => ("1/s", "CPU µs each"),
        };
        let share = if work.is_a_race() { "of no mesh" } else { "p50, of no mesh" };
        writeln!(text, "| | {rate} | {share} | {cpu} | p50 µs | p99 µs | PSS MiB | spread | others |")?;
        writeln!(text, "|---|---:|---:|---:|---:|---:|---:|---:|---:|")?;
        for subject in shown {
            let of = |metric| self.table.median(work, subject.name, metric);
            let number =
                |value: Option<f64>, digits: usize| value.map_or("–".to_owned(), |v| format!("{v:.digits$}"));
            let rate = of(Metric::Rate).map(|rate| work.rate(rate).0);
            let spread = if work.is_a_race() { Metric::Rate } else { Metric::P50 };
            let spread = self.table.spread(work, subject.name, spread).map(|spread| spread * 100.0);
            let proxied = subject.kind != Kind::NoMesh;
            writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} % | {} % |",
                bold(subject),
                number(rate, usize::from(work == Work::Bulk)),
                number(self.share(work, subject), 3),
                number(of(Metric::Cpu).filter(|_| proxied).map(|cpu| work.cost(cpu).0), 1),
                number(of(Metric::P50), 1),
                number(of(Metric::P99), 1),
                number(of(Metric::Memory).filter(|_| proxied).map(|bytes| bytes / f64::from(1 << 20)), 1),
                number(spread, 0),
                number(of(Metric::Strangers).map(|share| share * 100.0), 0),
            )?;
        }
        writeln!(text)
    }

    /// Of no mesh over the same way: by rate in a race, else by median time.
    fn share(&self, work: Work, subject: &Subject) -> Option<f64> {
        let base = if subject::is_near(subject.name) { subject::DIRECT_NEAR } else { subject::DIRECT };
        let metric = if work.is_a_race() { Metric::Rate } else { Metric::P50 };
        self.table.ratio(work, subject.name, base, metric)
    }

    fn proofs(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "## What was checked before anything was measured\n")?;
        for Proof { subject, facts } in self.proofs {
            writeln!(text, "- {subject}: {}", facts.join("; "))?;
        }
        writeln!(text)
    }

    /// The plot that belongs to it.
    #[must_use]
    pub fn plot(&self) -> String {
        let panels = Work::ALL.iter().filter(|work| work.is_a_race()).map(|&work| {
            let bars = self.subjects.iter().filter_map(|subject| {
                let share = self.share(work, subject)?;
                let colour = match subject.kind {
                    Kind::NoMesh => Colour::NoMesh,
                    Kind::Ours => Colour::Ours,
                    Kind::Peer(Layer::L4) => Colour::L4,
                    Kind::Peer(Layer::L7) => Colour::L7,
                };
                let rate = self.table.median(work, subject.name, Metric::Rate)?;
                let (rate, unit) = work.rate(rate);
                let note = if rate < 1000.0 {
                    format!("{share:.2} · {rate:.1} {unit}")
                } else {
                    format!("{share:.2} · {:.1} k/s", rate / 1000.0)
                };
                Some(Bar { label: subject.name.to_owned(), share, colour, note })
            });
            Panel { title: work.title().to_owned(), bars: bars.collect() }
        });
        let panels: Vec<Panel> = panels.filter(|panel| !panel.bars.is_empty()).collect();
        plot::draw("Rate as a share of no mesh over the same way", &panels)
    }
}

fn bold(subject: &Subject) -> String {
    if subject.kind == Kind::Ours { format!("**{}**", subject.name) } else { subject.name.to_owned() }
}

/// What another machine said of peers, some of which are not here.
fn elsewhere(text: &mut String) -> std::fmt::Result {
    writeln!(
        text,
        "## Measured elsewhere\n\nOn another machine of two CPUs, with the same work and topology, and *not* in this run; \
         absolute figures do not compare. ztunnel and linkerd2-proxy are in no package registry that this machine can \
         install from, so only these figures speak for them.\n"
    )?;
    writeln!(text, "| | work | rate | of its own direct |\n|---|---|---:|---:|")?;
    for each in reference::RATES {
        let scale = |rate: f64| format!("{:.*}", usize::from(each.work == Work::Bulk), each.work.rate(rate).0);
        let range = if each.rate.0 < each.rate.1 {
            format!("{}–{}", scale(each.rate.0), scale(each.rate.1))
        } else {
            scale(each.rate.0)
        };
        let unit = each.work.rate(0.0).1;
        let share = reference::of_direct(each.name, each.work).map_or("–".to_owned(), |share| format!("{share:.2}"));
        writeln!(text, "| {} | {} | {range} {unit} | {share} |", each.name, each.work.name())?;
    }
    let range = |low: f64, high: f64| if low < high { format!("{low}–{high}") } else { low.to_string() };
    let cpu: Vec<_> = reference::CPU.iter().map(|(name, low, high)| format!("{name} {}", range(*low, *high))).collect();
    writeln!(text, "\nCPU µs per request of both proxies there (http1): {}.", cpu.join(", "))?;
    let times: Vec<_> = reference::TIMES.iter().map(|(name, p50, p99)| format!("{name} {p50}/{p99}")).collect();
    writeln!(text, "p50/p99 µs there at 2,000 requests per second: {}.", times.join(", "))
}
