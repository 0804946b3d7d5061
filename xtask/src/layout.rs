//! `layout`: finds out which functions the agent runs, so that they can be linked side by side.
//!
//! Of the agent's code a tenth is run under load, but it lies everywhere in it, and the kernel maps sixteen pages around each one that is
//! touched. The agent's build script hands the list to the linker (`--symbol-ordering-file`, lld's manual); what it does not name
//! follows behind, so a list that has aged costs memory and nothing else. Must not know what the functions do.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{bench, build_ebpf, packages, process, workspace};

/// Within the repository; the agent's build script reads it.
const LIST: &str = "mesh-agent/layout.txt";
/// What the agent does while its functions are noted: carries everything that can be carried, and learns of tasks and services.
const RUNS: [(&str, &[&str]); 2] =
    [("peers", &["--only", "nginx", "--rounds", "1", "--seconds", "2"]), ("freshness", &["--quick"])];

/// Runs the benchmarks with the agent below callgrind, and writes the list.
pub fn run() -> Result<()> {
    packages::ensure(&[packages::CC, packages::LIBC_DEV, packages::VALGRIND])?;
    build_ebpf::ensure()?;
    let folder = workspace::target().join("layout");
    drop(fs::remove_dir_all(&folder));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let agent = bench::peers::agent()?;
    let wrapper = wrapper(&folder, &agent)?;
    for (name, arguments) in RUNS {
        let mut cargo = process::cargo();
        match name {
            "peers" => bench::peers::prepare(&mut cargo)?,
            _ => bench::freshness::prepare(&mut cargo)?,
        }
        cargo.env("MESH_AGENT", &wrapper).args(["bench", "--package", "mesh-benches", "--bench", name, "--"]);
        cargo.args(arguments);
        if name == "peers" {
            cargo.arg("--out").arg(&folder);
        }
        // Everything takes fifty times as long. `peers` promises nothing; of the other no promise holds.
        let status = cargo.status().with_context(|| format!("cannot start `bench {name}`"))?;
        ensure!(
            name != "peers" || status.success(),
            "`bench {name}` ended with {status}: see above, and said.* in {}",
            folder.display()
        );
        println!("bench {name} below callgrind: {status}; its figures mean nothing");
    }
    let calls = read(&folder, &agent)?;
    let order = order(&calls);
    ensure!(
        order.len() > 1000,
        "callgrind noted {} functions of the agent in {}, which cannot be all: what the benchmarks said above tells why",
        order.len(),
        folder.display()
    );
    let list = workspace::root().join(LIST);
    fs::write(&list, text(&process::output(Command::new("rustc").arg("--version"))?, &order))
        .with_context(|| format!("cannot write {}", list.display()))?;
    println!("{} functions in {LIST}", order.len());
    Ok(())
}

/// A program that is started as the agent would be. Each process leaves a file of its own.
fn wrapper(folder: &Path, agent: &Path) -> Result<PathBuf> {
    let path = folder.join("mesh-agent");
    let script = format!(
        "#!/bin/sh\nexec valgrind -q --tool=callgrind --demangle=no --callgrind-out-file='{}/noted.%p' '{}' \"$@\" 2>'{}'/said.$$\n",
        folder.display(),
        agent.display(),
        folder.display(),
    );
    fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", path.display()))?;
    Ok(path)
}

/// How often each function of the agent was called.
type Calls = HashMap<String, u64>;

fn read(folder: &Path, agent: &Path) -> Result<Calls> {
    let mut all = Calls::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("noted.")) {
            let noted = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            add(&mut all, &noted, &agent.to_string_lossy());
        }
    }
    Ok(all)
}

/// Adds what one process did, in callgrind's format ("Callgrind Format Specification" of valgrind's manual): a name is written once,
/// with a number in parentheses that stands for it from then on; a call is told where it is made, and told of the called
/// function by `cfn`.
fn add(all: &mut Calls, noted: &str, agent: &str) {
    let (mut objects, mut functions) = (HashMap::new(), HashMap::new());
    let (mut calls, mut run) = (HashMap::<String, u64>::new(), Vec::new());
    let (mut is_agent, mut called) = (false, String::new());
    for line in noted.lines() {
        let Some((key, value)) = line.split_once('=') else { continue };
        match key {
            "ob" => is_agent = name(&mut objects, value) == agent,
            // Named here, and so known by its number later.
            "cob" => drop(name(&mut objects, value)),
            "fn" => {
                let function = name(&mut functions, value);
                if is_agent {
                    run.push(function);
                }
            }
            "cfn" => called = name(&mut functions, value),
            "calls" => {
                let times: u64 = value.split(' ').next().and_then(|times| times.parse().ok()).unwrap_or_default();
                *calls.entry(called.clone()).or_default() += times;
            }
            _ => {}
        }
    }
    run.sort_unstable();
    run.dedup();
    for function in run {
        let times = calls.get(&function).copied().unwrap_or_default();
        *all.entry(function).or_default() += times;
    }
}

/// The name behind `(number) name`, or behind the number alone. A function that calls itself has its depth behind a `'`.
fn name(known: &mut HashMap<String, String>, value: &str) -> String {
    let (number, name) = value.split_once(' ').unwrap_or((value, ""));
    if !name.is_empty() {
        let name = name.split_once('\'').map_or(name, |(name, _depth)| name);
        known.insert(number.to_owned(), name.to_owned());
    }
    known.get(number).cloned().unwrap_or_default()
}

/// What is called most comes first: what is run under load ends up together, and so does what is run at the start alone.
fn order(calls: &Calls) -> Vec<&str> {
    let mut order: Vec<_> = calls.iter().filter(|(name, _)| !name.is_empty()).collect();
    order.sort_by(|(one, times), (other, others)| others.cmp(times).then_with(|| one.cmp(other)));
    order.into_iter().map(|(name, _)| name.as_str()).collect()
}

fn text(rustc: &str, order: &[&str]) -> String {
    let mut text = format!(
        "# The functions that the agent runs, in the order in which they are linked. Written by `cargo xtask layout`.\n\
         # Made with: {}\n",
        rustc.trim()
    );
    for name in order {
        writeln!(text, "{name}").unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTED: &str = "\
ob=(1) /usr/bin/mesh-agent
fl=(1) ???
fn=(1) main
0 5
cob=(2) /lib/libc.so.6
cfn=(2) malloc
calls=7 0
0 70
cfn=(3) often
calls=3 0
0 9
fn=(3)
0 9
cfn=(4) deep'2
calls=2 0
0 4

ob=(2)
fn=(2)
0 70

ob=(1)
fn=(4)
0 4
";

    #[test]
    fn the_agents_functions_are_counted_and_no_others() {
        let mut calls = Calls::new();
        add(&mut calls, NOTED, "/usr/bin/mesh-agent");
        add(&mut calls, NOTED, "/usr/bin/mesh-agent");
        assert_eq!(order(&calls), ["often", "deep", "main"]);
        assert_eq!(calls["often"], 6);
        assert!(!calls.contains_key("malloc"));
    }

    #[test]
    fn the_list_says_what_it_was_made_with() {
        assert!(text("rustc 1.2.3\n", &["a", "b"]).ends_with("\n# Made with: rustc 1.2.3\na\nb\n"));
    }
}
