//! What the kernel hooks cost: connecting to a service, connecting to anybody else, asking a name; by the kernel's count and by the clock.
//!
//! The kernel counts time and runs of each program (`BPF_ENABLE_STATS`, Linux 5.8); programs of these types cannot be run by
//! `BPF_PROG_TEST_RUN` (`bpf_prog_test_run` is 0 for `cg_sock_addr` and `sock_ops` in the kernel's `net/core/filter.c`).
//! Counting costs two clock readings in each run, so the clock's figures are taken without it. It must not know what the
//! programs do.
#![allow(clippy::print_stdout, reason = "figures are what a benchmark is for")]

use std::{collections::BTreeMap, env, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use aya::{programs::loaded_programs, sys};
use mesh_benches::{
    agents::Agents,
    interrupt,
    topology::{HTTP_AS_BYTES, NEAR, Pair, Seat, Topology},
};

/// Turns of each kind of call on each side, one side after the other: many and short, because a machine that is not alone
/// changes its speed within seconds.
const ROUNDS: usize = 45;
/// Calls in a turn.
const CALLS: &str = "400";
/// Nobody has this address (RFC 5737, TEST-NET-1).
const NOBODY: &str = "192.0.2.1:9";
/// The start of the names of our programs.
const OURS: &str = "mesh_";

/// One kind of call and how a task makes it.
struct Kind {
    name: &'static str,
    role: &'static str,
    /// To whom, with and without the mesh.
    meshed: String,
    plain: String,
}

/// Nanoseconds and runs of each program.
type Counts = BTreeMap<String, (u64, u64)>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAULT {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let probe = PathBuf::from(env!("CARGO_BIN_EXE_probe"));
    let agent =
        env::var_os("MESH_AGENT").context("MESH_AGENT names no agent; start this with `cargo xtask bench hooks`")?;
    interrupt::arm()?;
    let topology = Topology::up(&probe)?;
    let agents = Agents::start(&topology, &PathBuf::from(agent))?;
    let near = topology.plain.address(Seat::Near);
    let kinds = [
        Kind {
            name: "connect_service",
            role: "connect",
            meshed: format!("{NEAR}:{HTTP_AS_BYTES}"),
            plain: format!("{near}:{HTTP_AS_BYTES}"),
        },
        Kind { name: "connect_unrelated", role: "associate", meshed: NOBODY.to_owned(), plain: NOBODY.to_owned() },
        Kind {
            name: "dns_query",
            role: "question",
            meshed: resolver(&topology, &topology.meshed)?,
            plain: resolver(&topology, &topology.plain)?,
        },
    ];
    for kind in &kinds {
        by_the_clock(&topology, kind)?;
    }
    let counting = sys::enable_stats(sys::Stats::RunTime).context("the kernel does not count the runs of programs")?;
    for kind in &kinds {
        by_the_kernel(&topology, kind)?;
    }
    drop(counting);
    agents.stop()?;
    topology.down()
}

/// How long the call takes with the mesh and without, and the median of their differences.
fn by_the_clock(topology: &Topology, kind: &Kind) -> Result<()> {
    let (mut with, mut without, mut more) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let meshed = p50(topology, &topology.meshed, kind.role, &kind.meshed)?;
        let plain = p50(topology, &topology.plain, kind.role, &kind.plain)?;
        with.push(meshed);
        without.push(plain);
        more.push(meshed - plain);
    }
    println!("FIGURE hooks.{}.plain {:.2} us", kind.name, median(without)?);
    println!("FIGURE hooks.{}.meshed {:.2} us", kind.name, median(with)?);
    println!("FIGURE hooks.{}.more {:.2} us", kind.name, median(more)?);
    Ok(())
}

/// What each of the programs took for one call.
fn by_the_kernel(topology: &Topology, kind: &Kind) -> Result<()> {
    let calls: f64 = CALLS.parse().context("a number")?;
    let before = counts()?;
    p50(topology, &topology.meshed, kind.role, &kind.meshed)?;
    for (program, (time, runs)) in counts()? {
        let (time_before, runs_before) = before.get(&program).copied().unwrap_or_default();
        let (time, runs) = (time.saturating_sub(time_before) as f64, runs.saturating_sub(runs_before) as f64);
        // Less than one in ten calls is somebody else's.
        if runs * 10.0 > calls {
            println!("FIGURE hooks.{}.{program}.each {:.0} ns", kind.name, time / runs);
            println!("FIGURE hooks.{}.{program}.runs_per_call {:.2} x", kind.name, runs / calls);
        }
    }
    Ok(())
}

/// The median of one turn, in microseconds.
fn p50(topology: &Topology, pair: &Pair, role: &str, to: &str) -> Result<f64> {
    let said = pair.ask(&topology.cluster, Seat::Neighbour, &["probe", role, to, CALLS])?;
    let field = said.split_whitespace().nth(1).with_context(|| format!("probe said {said:?}"))?;
    field.parse().with_context(|| format!("probe said {said:?}"))
}

/// The first name server that the tasks ask, with its port.
fn resolver(topology: &Topology, pair: &Pair) -> Result<String> {
    let said = pair.ask(&topology.cluster, Seat::Neighbour, &["cat", "/etc/resolv.conf"])?;
    let server = said.lines().find_map(|line| line.strip_prefix("nameserver "));
    Ok(format!("{}:53", server.with_context(|| format!("no name server in {said:?}"))?.trim()))
}

fn counts() -> Result<Counts> {
    let mut counts = Counts::new();
    for program in loaded_programs() {
        // One that was unloaded since it was listed has no figures.
        let Ok(program) = program else { continue };
        let Some(name) = program.name_as_str().filter(|name| name.starts_with(OURS)) else {
            continue;
        };
        let count = counts.entry(name.to_owned()).or_default();
        count.0 += u64::try_from(program.run_time().as_nanos()).context("a program that ran for centuries")?;
        count.1 += program.run_count();
    }
    ensure!(!counts.is_empty(), "no program of the mesh is loaded");
    Ok(counts)
}

fn median(mut values: Vec<f64>) -> Result<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().context("nothing was measured")
}
