//! `bench`: runs one named benchmark and shows its figures. A benchmark is a bench target of the `benches` crate; it
//! measures, prints `FIGURE name value unit` lines, and exits non-zero when a bound that it promises does not hold.

pub mod freshness;
pub mod peers;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::test::Report;
use crate::{build_ebpf, instructions, packages, process, workspace};

/// The one that runs below a profiler.
const INSTRUCTIONS: &str = "instructions";

#[derive(clap::Args)]
pub struct Args {
    /// Which one; without a name they are listed
    name: Option<String>,
    /// What to pass on to it; `--help` after its name lists what it takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// A benchmark and the first line of what its file says it is for.
struct Bench {
    name: String,
    about: String,
}

/// Runs the benchmark, or lists them; false when a promised bound does not hold.
pub fn run(args: &Args) -> Result<bool> {
    let benches = find(&workspace::root().join("benches").join("benches"))?;
    let Some(name) = &args.name else {
        for bench in &benches {
            println!("{:<16} {}", bench.name, bench.about);
        }
        println!("{:<16} How many instructions each decision takes, against a table.", INSTRUCTIONS);
        return Ok(true);
    };
    if name == INSTRUCTIONS {
        return instructions::run(&args.arguments);
    }
    if !benches.iter().any(|bench| bench.name == *name) {
        let names: Vec<&str> = benches.iter().map(|bench| bench.name.as_str()).collect();
        bail!("no benchmark is called {name}; there are: {INSTRUCTIONS} {}", names.join(" "));
    }
    packages::ensure(&[packages::CC, packages::LIBC_DEV])?;
    build_ebpf::ensure()?;
    let mut cargo = process::cargo();
    // What cannot be set up is said before the first build, and not at all for somebody who only asks for help.
    let is_help = args.arguments.iter().any(|argument| argument == "--help");
    match name.as_str() {
        "peers" if !is_help => peers::prepare_for(&mut cargo, &args.arguments)?,
        "hooks" => peers::prepare_alone(&mut cargo)?,
        "freshness" => freshness::prepare(&mut cargo)?,
        "scale" if needs_consul(&args.arguments) => freshness::prepare(&mut cargo)?,
        _ => {}
    }
    cargo.args(["bench", "--package", "mesh-benches", "--bench", name, "--"]);
    cargo.args(args.arguments.iter().filter(|argument| *argument != "--"));
    let mut report = Report::default();
    report.step(name, cargo)?;
    Ok(report.finish_figures())
}

/// Whether `scale` is to run as a whole, or the part of it that needs a registry.
fn needs_consul(arguments: &[String]) -> bool {
    let mut parts = arguments.iter().filter(|argument| *argument != "--").peekable();
    parts.peek().is_none() || parts.any(|part| part == "consul")
}

/// Every benchmark in `folder`, by name.
fn find(folder: &Path) -> Result<Vec<Bench>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_none_or(|kind| kind != "rs") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let about = text.lines().find_map(|line| line.strip_prefix("//! ")).unwrap_or_default().to_owned();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        found.push(Bench { name, about });
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}
