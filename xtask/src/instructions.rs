//! `bench instructions`: how many instructions each decision and tunnel takes, against a table in the repository.
//!
//! Times on a shared machine tell a regression of a few per cent from noise only after hours; instructions tell it at
//! once, as long as compiler and C library are the same. Must not know what the cases do.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::test::Report;
use crate::{packages, process, workspace};

/// Within the repository.
const TABLE: &str = "benches/INSTRUCTIONS.md";
const UPDATE: &str = "cargo xtask bench instructions -- --update";
/// What may come on top before it is a fault: hash seeds and the processor's own string functions differ a little.
const TOLERANCE: f64 = 0.05;
/// The programs that have the cases, and their packages.
const PROGRAMS: [(&str, &str); 2] = [("mesh-worlds", "instructions"), ("mesh-tunnels", "tunnels")];
/// Below which the profiler collects; each of the programs has it.
const COLLECT: &str = "--toggle-collect=*counted_from_here*";
const MADE_WITH: &str = "Made with: ";

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
struct Count {
    name: String,
    instructions: u64,
    about: String,
}

/// As a benchmark: prints the table, and writes it when told to.
pub fn run(arguments: &[String]) -> Result<bool> {
    let update = match arguments.iter().map(String::as_str).filter(|argument| *argument != "--").collect::<Vec<_>>()[..]
    {
        [] => false,
        ["--update"] => true,
        _ => bail!("`bench instructions` takes nothing but --update"),
    };
    packages::ensure(&[packages::CC, packages::LIBC_DEV, packages::VALGRIND])?;
    let mut report = Report::default();
    if update {
        let table = table(&made_with()?, &count()?);
        let path = workspace::root().join(TABLE);
        fs::write(&path, &table).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{table}");
    } else {
        compare(&mut report)?;
    }
    Ok(report.finish_figures())
}

/// As a step of the tests: a decision that takes more instructions than the table says is a fault.
pub fn check(report: &mut Report) -> Result<()> {
    match packages::ensure(&[packages::VALGRIND]) {
        Ok(()) => compare(report),
        Err(lack) => {
            report.skip(&format!("counting instructions: {lack:#}"));
            Ok(())
        }
    }
}

fn compare(report: &mut Report) -> Result<()> {
    let path = workspace::root().join(TABLE);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}; make it with `{UPDATE}`", path.display()))?;
    let (counted, made_with) = (count()?, made_with()?);
    let known = parse(&text);
    let (lines, faults) = judge(&known, &counted);
    println!("{lines}");
    if !text.lines().any(|line| line.strip_prefix(MADE_WITH) == Some(made_with.as_str())) {
        report.skip(&format!(
            "comparing instructions: {TABLE} was not made with {made_with}; look at the table, then `{UPDATE}`"
        ));
        return Ok(());
    }
    for fault in faults {
        report.fault(&fault);
    }
    Ok(())
}

/// The table as it is now beside what it was, and what is wrong with it.
fn judge(known: &[Count], counted: &[Count]) -> (String, Vec<String>) {
    let mut lines = format!("{:<20} {:>12} {:>12} {:>8}\n", "case", "instructions", "table", "change");
    let mut faults = Vec::new();
    for Count { name, instructions, .. } in counted {
        let Some(before) = known.iter().find(|known| known.name == *name).map(|known| known.instructions) else {
            faults.push(format!("{TABLE} does not have {name}: `{UPDATE}`"));
            continue;
        };
        let change = *instructions as f64 / before.max(1) as f64 - 1.0;
        writeln!(lines, "{name:<20} {instructions:>12} {before:>12} {:>+7.1}%", change * 100.0).unwrap_or_default();
        if change > TOLERANCE {
            faults.push(format!(
                "{name} takes {instructions} instructions, {:.1} % more than {before}: find out why; if that is as it \
                 must be, `{UPDATE}`",
                change * 100.0
            ));
        } else if change < -TOLERANCE {
            writeln!(lines, "  fewer: `{UPDATE}` keeps it so").unwrap_or_default();
        }
    }
    let gone = known.iter().filter(|known| counted.iter().all(|counted| counted.name != known.name));
    faults.extend(gone.map(|gone| format!("{TABLE} has {}, which is not counted any more: `{UPDATE}`", gone.name)));
    (lines, faults)
}

/// Builds the program and has the profiler run each case, as many at once as there are processors.
fn count() -> Result<Vec<Count>> {
    let mut cases: Vec<(PathBuf, Vec<String>)> = Vec::new();
    for (package, name) in PROGRAMS {
        let mut cargo = process::cargo();
        // One after the other: what both have in common is built with the same features as when one is built alone.
        cargo.args(["build", "--package", package, "--bin", name, "--profile", "instructions"]);
        process::run(&mut cargo)?;
        let program = target().join("instructions").join(name);
        let listed = process::output(&mut Command::new(&program))?;
        let split = |line: &str| (program.clone(), line.split('\t').map(str::to_owned).collect());
        cases.extend(listed.lines().map(split));
    }
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let (sender, results) = mpsc::channel();
    thread::scope(|scope| {
        for worker in 0..workers {
            let (sender, cases) = (sender.clone(), &cases);
            scope.spawn(move || {
                for (place, (program, case)) in cases.iter().enumerate().skip(worker).step_by(workers) {
                    // The receiver outlives the scope.
                    sender.send((place, count_one(program, case))).unwrap_or_default();
                }
            });
        }
    });
    drop(sender);
    let mut counts = results.iter().map(|(place, count)| Ok((place, count?))).collect::<Result<Vec<_>>>()?;
    counts.sort_by_key(|(place, _)| *place);
    Ok(counts.into_iter().map(|(_, count)| count).collect())
}

fn count_one(program: &Path, case: &[String]) -> Result<Count> {
    let [name, about, times] = case else { bail!("the cases are listed as name, meaning and times, not as {case:?}") };
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no", COLLECT]);
    let run = valgrind.arg(program).arg(name).output().context("cannot start valgrind")?;
    let said = String::from_utf8_lossy(&run.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse::<u64>().ok());
    let (Some(collected), Ok(times @ 1..)) = (collected, times.parse::<u64>()) else {
        bail!("valgrind counted nothing of {name}: {said}");
    };
    Ok(Count { name: name.clone(), instructions: collected / times, about: about.clone() })
}

/// Where cargo puts what it builds: two above ourselves.
fn target() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.ancestors().nth(2).map_or_else(|| workspace::root().join("target"), Path::to_path_buf)
}

/// What the counts depend on besides the code.
fn made_with() -> Result<String> {
    let rustc = process::output(Command::new("rustc").arg("--version"))?;
    let libc =
        process::output(Command::new("getconf").arg("GNU_LIBC_VERSION")).unwrap_or_else(|_| "another libc".into());
    Ok(format!("{}, {}, {}", rustc.trim(), libc.trim(), std::env::consts::ARCH))
}

fn table(made_with: &str, counts: &[Count]) -> String {
    let mut text = format!(
        "# Instructions of the decisions and of tunnels\n\n\
         How many instructions each takes, counted by callgrind, memory allocation included. `cargo xtask test` counts\n\
         again and fails when one takes over {:.0} % more; with another compiler or C library it only shows the table.\n\
         Written by `{UPDATE}`.\n\n\
         {MADE_WITH}{made_with}\n\n| Case | Instructions | What it is |\n|---|---:|---|\n",
        TOLERANCE * 100.0
    );
    for Count { name, instructions, about } in counts {
        writeln!(text, "| {name} | {instructions} | {about} |").unwrap_or_default();
    }
    text
}

fn parse(text: &str) -> Vec<Count> {
    let cells =
        |line: &str| line.strip_prefix('|').map(|line| line.split('|').map(|cell| cell.trim().to_owned()).collect());
    let count = |cells: Vec<String>| match cells.as_slice() {
        [name, instructions, about, ..] => {
            let instructions = instructions.parse().ok()?;
            Some(Count { name: name.clone(), instructions, about: about.clone() })
        }
        _ => None,
    };
    text.lines().filter_map(cells).filter_map(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(of: &[(&str, u64)]) -> Vec<Count> {
        let count = |(name, instructions): &(&str, u64)| Count {
            name: (*name).into(),
            instructions: *instructions,
            about: "something".into(),
        };
        of.iter().map(count).collect()
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let all = counts(&[("plan", 3000), ("merge", 70_000)]);
        let text = table("rustc 1, glibc 2, x86_64", &all);
        assert_eq!(parse(&text), all);
        assert!(text.lines().any(|line| line == "Made with: rustc 1, glibc 2, x86_64"));
    }

    #[test]
    fn only_what_takes_more_is_a_fault() {
        let known = counts(&[("a", 1000), ("b", 1000), ("c", 1000), ("gone", 1)]);
        let (lines, faults) = judge(&known, &counts(&[("a", 1049), ("b", 1051), ("c", 900), ("new", 1)]));
        assert!(lines.contains("fewer"), "{lines}");
        let about: Vec<_> = faults.iter().map(|fault| fault.split(' ').next().unwrap_or_default()).collect();
        assert_eq!(about, ["b", TABLE, TABLE], "{faults:?}");
    }
}
