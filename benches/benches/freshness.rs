//! How soon the mesh knows: a task that starts, stops or falls ill, and all endpoints of a service replaced under load.
//!
//! Exits non-zero when a request fails during a replacement, or a promised bound does not hold. It must not know how the
//! agent does it.
#![allow(clippy::print_stdout, reason = "figures are what a benchmark is for")]

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use mesh_benches::{
    fresh::{Kind, Stage, Started},
    program,
};

/// Beyond what the registry needs by itself, the median may be so much.
const BEYOND_MS: f64 = 100.0;
const RATE: u32 = 500;
/// Long enough for four tasks to be replaced on a machine that does other work too.
const SECONDS: u32 = 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (times, rolls) = match words.as_slice() {
        [] => (10, Some(1)),
        ["--quick"] => (2, Some(1)),
        ["times"] => (10, Some(0)),
        ["rolling"] => (0, Some(1)),
        ["rolling", count] => (0, count.parse().ok()),
        _ => (0, None),
    };
    let Some(rolls) = rolls else {
        println!(
            "FAULT `bench freshness` takes nothing, `--quick`, or `times` or `rolling` for a part, this with how many \
             times each server is replaced: {words:?}"
        );
        return ExitCode::FAILURE;
    };
    match measure(times, rolls) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAULT {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(times: u32, rolls: u32) -> Result<bool> {
    mesh_lab::preflight()?;
    let consul = env::var_os("MESH_CONSUL").map(PathBuf::from).context("MESH_CONSUL names no program")?;
    let stage = Stage::up(&program::agent()?, env!("CARGO_BIN_EXE_probe").as_ref(), &consul)?;
    let mut well = true;
    if times > 0 {
        well &= moments(&stage, times)?;
    }
    for kind in (0..rolls).flat_map(|_| [Kind::Nginx, Kind::Abrupt]) {
        well &= roll(&stage, kind)?;
    }
    stage.down()?;
    Ok(well)
}

fn moments(stage: &Stage, times: u32) -> Result<bool> {
    let (come, gone) = stage.registry(times)?;
    let come = figures("freshness_registry_register", come);
    let gone = figures("freshness_registry_deregister", gone);
    let started = (0..times).map(|n| stage.start(n)).collect::<Result<Vec<_>>>()?;
    let of = |part: fn(&Started) -> f64| started.iter().map(part).collect::<Vec<_>>();
    figures("freshness_start_to_consul", of(|it| it.shown));
    figures("freshness_start_to_request", of(|it| it.from_first_instruction));
    let start = figures("freshness_listening_to_request", of(|it| it.from_listening));
    let stop = figures("freshness_stop_to_last_request", (0..times).map(|n| stage.stop(n)).collect::<Result<_>>()?);
    let ill = (0..times.div_ceil(2)).map(|n| stage.fall_ill(n)).collect::<Result<_>>()?;
    figures("freshness_ill_to_last_request", ill);
    let mut well = true;
    for (name, whole, registry) in [("listening_to_request", start, come), ("stop_to_last_request", stop, gone)] {
        let beyond = whole - registry;
        println!("FIGURE freshness_{name}_beyond_registry {beyond:.3} ms");
        if beyond > BEYOND_MS {
            println!(
                "FAULT {name} takes {beyond:.1} ms beyond the registry's share; at most {BEYOND_MS:.0} are promised"
            );
            well = false;
        }
    }
    Ok(well)
}

/// Says median and maximum; the median.
fn figures(name: &str, mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let median = values.get(values.len() / 2).copied().unwrap_or_default();
    println!("FIGURE {name}_p50 {median:.3} ms");
    println!("FIGURE {name}_max {:.3} ms", values.last().copied().unwrap_or_default());
    median
}

fn roll(stage: &Stage, kind: Kind) -> Result<bool> {
    let rolled = stage.roll(kind, RATE, SECONDS)?;
    let name = kind.name();
    println!("FIGURE freshness_rolling_{name}_requests {:.0} requests", rolled.answered + rolled.failed);
    println!("FIGURE freshness_rolling_{name}_rate {:.1} 1/s", rolled.rate);
    println!("FIGURE freshness_rolling_{name}_failed {:.0} requests", rolled.failed);
    println!("FIGURE freshness_rolling_{name}_failed_posts {:.0} requests", rolled.failed_posts);
    println!("FIGURE freshness_rolling_{name}_read_after_close {:.0} requests", rolled.unanswered);
    println!("FIGURE freshness_rolling_{name}_posts_read_after_close {:.0} requests", rolled.unanswered_posts);
    println!("FIGURE freshness_rolling_{name}_p50 {:.3} ms", rolled.p50);
    println!("FIGURE freshness_rolling_{name}_p99 {:.3} ms", rolled.p99);
    println!("FIGURE freshness_rolling_{name}_max {:.3} ms", rolled.longest);
    for reason in &rolled.reasons {
        println!("      {reason}");
    }
    if rolled.failed > 0.0 {
        println!("FAULT {:.0} requests failed while four endpoints ({name}) were replaced", rolled.failed);
    }
    let twice = rolled.unanswered_posts - rolled.failed_posts;
    if twice > 0.0 {
        println!("FAULT {twice:.0} POSTs that a server ({name}) had read were sent to another");
    }
    Ok(rolled.failed == 0.0 && twice <= 0.0)
}
