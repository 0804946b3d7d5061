//! The mesh beside what a user could install instead: same hosts, same work, in turn.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark talks to whoever started it")]

use std::{collections::BTreeMap, env, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser as _;
use mesh_benches::{
    agents::Agents,
    certificates::Authority,
    figures::{median, ratio, spread},
    load::{Sample, Target, Work},
    peers::{self, Layer, Programs},
    topology::{BULK, ECHO, FAR, HTTP, HTTP_AS_BYTES, HTTP2, Pair, Seat, Topology},
    usage::{self, Strangers, Watch},
};

#[derive(clap::Parser)]
struct Args {
    /// Only these peers, comma separated
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// One round of one second each: to see that everything works
    #[arg(long)]
    quick: bool,
    /// Cargo says so to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Subject<'a> {
    name: String,
    pair: &'a Pair,
    target: Target,
    works: Vec<Work>,
    pids: std::collections::BTreeSet<u32>,
}

#[derive(Clone, Copy)]
struct Cell {
    sample: Sample,
    cpu: f64,
    memory: u64,
    strangers: f64,
}

fn run(args: &Args) -> Result<()> {
    let probe = PathBuf::from(env!("CARGO_BIN_EXE_probe"));
    let agent = PathBuf::from(env::var_os("MESH_AGENT").context("MESH_AGENT names no agent; use `cargo xtask bench`")?);
    let topology = Topology::up(&probe)?;
    let authority = Authority::make(topology.cluster.dir(), "trusted")?;
    let programs = Programs::default();
    let agents = Agents::start(&topology, &agent)?;
    let mut running = Vec::new();
    for (index, peer) in (0..).zip(peers::ALL) {
        if args.only.is_empty() || args.only.iter().any(|name| name == peer.name) {
            running.push(peer.start(&topology, &programs, index, &authority, &authority)?);
        }
    }
    let far = topology.plain.address(Seat::Far);
    let works = vec![Work::Http];
    let mut subjects = vec![
        Subject {
            name: "direct".to_owned(),
            pair: &topology.plain,
            target: target(&far.to_string(), HTTP),
            works: works.clone(),
            pids: Default::default(),
        },
        Subject {
            name: "ours-l7".to_owned(),
            pair: &topology.meshed,
            target: target(FAR, HTTP),
            works: works.clone(),
            pids: agents.pids()?,
        },
        Subject {
            name: "ours-l4".to_owned(),
            pair: &topology.meshed,
            target: target(FAR, HTTP_AS_BYTES),
            works: works.clone(),
            pids: agents.pids()?,
        },
    ];
    for peer in &running {
        subjects.push(Subject {
            name: peer.peer.name.to_owned(),
            pair: &topology.plain,
            target: peer.target(),
            works: works.clone(),
            pids: peer.pids()?,
        });
    }
    let _ = Layer::L4;
    let (rounds, seconds) = if args.quick { (1, 1) } else { (3, 3) };
    let mut cells: BTreeMap<(Work, String), Vec<Option<Cell>>> = BTreeMap::new();
    for round in 0..rounds {
        for work in Work::ALL {
            for subject in subjects.iter().filter(|subject| subject.works.contains(&work)) {
                let cell = measure(&topology, subject, work, seconds)?;
                println!(
                    "round {round} {:8} {:12} {:10.0}/s {:7.1} µs/op {:6.1} MiB strangers {:.0} %",
                    work.name(),
                    subject.name,
                    cell.sample.rate,
                    cell.cpu,
                    cell.memory as f64 / (1 << 20) as f64,
                    cell.strangers * 100.0
                );
                cells.entry((work, subject.name.clone())).or_default().push(Some(cell));
            }
        }
    }
    for ((work, name), row) in &cells {
        let rates: Vec<f64> = row.iter().flatten().map(|cell| cell.sample.rate).collect();
        let cpus: Vec<f64> = row.iter().flatten().map(|cell| cell.cpu).collect();
        let of = |name: &str| -> Vec<Option<f64>> {
            let row = cells.get(&(*work, name.to_owned()));
            row.into_iter().flatten().map(|cell| cell.map(|cell| cell.sample.rate)).collect()
        };
        println!(
            "FIGURE {}.{name}.rate {:.0} /s\nFIGURE {}.{name}.cpu {:.1} µs\nFIGURE {}.{name}.of_direct {:.3} ratio (spread {:.2})",
            work.name(),
            median(&rates).unwrap_or_default(),
            work.name(),
            median(&cpus).unwrap_or_default(),
            work.name(),
            ratio(&of(name), &of("direct")).unwrap_or_default(),
            spread(&rates).unwrap_or_default(),
        );
    }
    drop(subjects);
    drop(running);
    agents.stop()?;
    topology.down()
}

fn target(host: &str, http: u16) -> Target {
    Target {
        http: format!("{host}:{http}"),
        http2: format!("{host}:{HTTP2}"),
        bulk: Some((host.to_owned(), BULK)),
        echo: Some(format!("{host}:{ECHO}")),
    }
}

fn measure(topology: &Topology, subject: &Subject<'_>, work: Work, seconds: u32) -> Result<Cell> {
    let watch = Watch::start(&subject.pids);
    let cgroup = topology.cluster.hosts()[0].cgroup().parent().context("a host's cgroup is in the cluster's")?;
    let strangers = Strangers::watch(cgroup)?;
    let before = usage::cpu(&subject.pids);
    let sample = work
        .run(&topology.cluster, subject.pair, &subject.target, seconds)
        .with_context(|| format!("{} through {}", work.name(), subject.name))?;
    let used = usage::cpu(&subject.pids).saturating_sub(before);
    let cpu = used.as_secs_f64() * 1e6 / sample.operations;
    Ok(Cell { sample, cpu, memory: watch.most(), strangers: strangers.share()? })
}
