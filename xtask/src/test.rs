//! `test`: what the README and CI run. It sets the machine up, builds the kernel object, runs every tier in order and
//! adds the results up. It must not know what any test does: tiers and suites are names of modules in `tests/it`.

mod report;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{archive, build_ebpf, instructions, packages, process, pypi, vm, workspace};
pub use report::Report;

/// The kernels of the matrix: the series that the ECS-optimised images of Amazon Linux 2023 run.
const MATRIX: [&str; 2] = ["6.1", "6.12"];

#[derive(clap::Args)]
pub struct Args {
    /// Only these tiers, each of which is then promised: a test of it that cannot run fails
    #[arg(long, num_args = 1.., value_name = "TIER")]
    tier: Vec<Tier>,
    /// Only one suite: `main` is everything, other names are files of `tests/it`
    #[arg(long, value_name = "NAME", conflicts_with_all = ["tier", "vm"])]
    suite: Option<String>,
    /// Only the kernel tier, and only on these kernels, in virtual machines
    #[arg(long, num_args = 1.., value_name = "SERIES", conflicts_with = "tier")]
    vm: Vec<String>,
    /// Leave the kernel matrix out
    #[arg(long, conflicts_with = "vm")]
    no_vm: bool,
}

/// A set of tests with the same needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tier {
    /// Unit, property and loopback tests: they need nothing
    Unit,
    /// Network namespaces
    Netns,
    /// Programs in the running kernel
    Kernel,
    /// Real containers
    Docker,
    /// A real Consul server
    Consul,
    /// Moto's AWS APIs
    Aws,
}

impl Tier {
    /// The module of `tests/it` that holds its tests, which is also its name in `MESH_TIERS`.
    fn module(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Netns => "netns",
            Self::Kernel => "kernel",
            Self::Docker => "docker",
            Self::Consul => "consul",
            Self::Aws => "aws",
        }
    }
}

/// Runs what was asked for; false when a test failed or could not be run although it was promised.
pub fn run(args: &Args) -> Result<bool> {
    let began = Instant::now();
    let mut report = Report::default();
    let suite = args.suite.as_deref().filter(|suite| *suite != "main").map(find_suite).transpose()?;
    set_up(args)?;
    build_ebpf::ensure()?;
    match suite {
        Some(suite) => run_suite(&suite, &mut report)?,
        None if !args.vm.is_empty() => {
            vm::prepare()?;
            run_matrix(&vm::fetch(&args.vm)?, &mut report)?;
        }
        None if !args.tier.is_empty() => run_tiers(&args.tier, &mut report)?,
        None => run_everything(args, &mut report)?,
    }
    Ok(report.finish(began.elapsed()))
}

/// What the tests use, installed where it is missing. Without root only a person can: then tests skip, loudly.
fn set_up(args: &Args) -> Result<()> {
    packages::ensure(&[packages::CC, packages::LIBC_DEV])?;
    let only_unit = !args.tier.is_empty() && args.tier.iter().all(|tier| *tier == Tier::Unit);
    if only_unit || !args.vm.is_empty() {
        return Ok(());
    }
    let tools = packages::ensure(&[
        packages::IP,
        packages::IPTABLES,
        packages::BPFTOOL,
        packages::DNSMASQ,
        packages::BUSYBOX,
        packages::CURL,
        packages::DIG,
        packages::DOCKER,
        packages::FAKETIME,
        packages::MARIADB,
        packages::MARIADB_CLIENT,
        packages::MUSL,
        packages::NGHTTPD,
        packages::H2LOAD,
        packages::NGINX,
        packages::NODE,
        packages::PYTHON,
        packages::REDIS,
        packages::REDIS_CLI,
        packages::SHELLCHECK,
        packages::SYSTEMD_ANALYZE,
        packages::TCPDUMP,
    ]);
    let tools = tools
        .and_then(|()| fetched(args, Tier::Consul, archive::CONSUL.fetch(&workspace::target())))
        .and_then(|()| fetched(args, Tier::Aws, pypi::MOTO.fetch(&workspace::target())));
    match tools {
        Err(lack) if !nix::unistd::geteuid().is_root() => {
            println!("{lack:#}\nwithout them, and without root, some tests will be skipped");
            Ok(())
        }
        other => other,
    }
}

/// The tests of its tier need it and nothing else does, so without it they skip, unless they were asked for.
fn fetched(args: &Args, tier: Tier, program: Result<PathBuf>) -> Result<()> {
    match program {
        Err(lack) if args.tier.contains(&tier) => Err(lack),
        Err(lack) => {
            println!("{lack:#}\nwithout it the tests of the {} tier will be skipped", tier.module());
            Ok(())
        }
        Ok(_program) => Ok(()),
    }
}

fn run_everything(args: &Args, report: &mut Report) -> Result<()> {
    let promised = promises();
    run_units(report)?;
    report.step("tests of the whole", integration(&promised, "*", &[])?)?;
    report.step("examples in the documentation", cargo_test(&["--doc"]))?;
    instructions::check(report)?;
    if args.no_vm {
        report.skip("the kernel matrix: --no-vm was given");
        return Ok(());
    }
    match vm::prepare().and_then(|()| vm::fetch(&MATRIX)) {
        Ok(kernels) => run_matrix(&kernels, report),
        Err(lack) if promised.contains("vm") => {
            report.fault(&format!("the kernel matrix was promised (MESH_TIERS): {lack:#}"));
            Ok(())
        }
        // Nobody named a kernel, and another machine may be no Debian, but it must not go unseen.
        Err(lack) => {
            report.skip(&format!("the kernel matrix ({}): {lack:#}", MATRIX.join(", ")));
            Ok(())
        }
    }
}

fn run_tiers(tiers: &[Tier], report: &mut Report) -> Result<()> {
    if tiers.contains(&Tier::Unit) {
        run_units(report)?;
    }
    let tiers: Vec<&str> = tiers.iter().filter(|tier| **tier != Tier::Unit).map(|tier| tier.module()).collect();
    if tiers.is_empty() {
        return Ok(());
    }
    let promised = tiers.iter().map(|tier| (*tier).to_owned()).collect();
    let filters: Vec<String> = tiers.iter().map(|tier| format!("{tier}::")).collect();
    report.step_with_tests(&tiers.join(" and "), integration(&promised, "it", &filters)?)
}

fn run_suite(suite: &str, report: &mut Report) -> Result<()> {
    let mut cargo = integration(&promises(), "it", &[format!("{suite}::")])?;
    // Long suites are `#[ignore]`d so that `main` stays short; asked for by name they run. What a tier ignores is no
    // test: it is the other half of one, run by it in a process of its own.
    if Tier::from_str(suite, false).is_err() {
        cargo.arg("--include-ignored");
    }
    report.step_with_tests(suite, cargo)
}

fn run_units(report: &mut Report) -> Result<()> {
    report.step("unit, property and loopback tests", cargo_test(&["--lib", "--bins"]))
}

fn run_matrix(kernels: &[vm::Kernel], report: &mut Report) -> Result<()> {
    let tests = executable(&["test", "--workspace", "--test", "it", "--no-run"], "it")?;
    vm::run(kernels, &tests, &agent_binary()?, report)
}

/// The tiers that must run here: what the caller promises, and with root everything that this machine was set up for.
fn promises() -> BTreeSet<String> {
    let said = env::var("MESH_TIERS").unwrap_or_default();
    let said = said.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
    let set_up = [Tier::Netns, Tier::Kernel, Tier::Docker].map(|tier| tier.module().to_owned());
    said.chain(set_up.into_iter().filter(|_| nix::unistd::geteuid().is_root())).collect()
}

/// The tests of the whole: targets of this name, with what they may count on.
fn integration(promised: &BTreeSet<String>, target: &str, filters: &[String]) -> Result<Command> {
    let promised: Vec<&str> = promised.iter().map(String::as_str).collect();
    let mut cargo = cargo_test(&["--test", target]);
    cargo.env("MESH_TIERS", promised.join(",")).env("MESH_AGENT", agent_binary()?);
    cargo.env("MESH_CONSUL", archive::CONSUL.place(&workspace::target()));
    cargo.env("MESH_MOTO", pypi::MOTO.place(&workspace::target()));
    // What moto takes from anybody. Nobody here has real ones, and nobody shall ask the machine for them.
    for (key, value) in [
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
    ] {
        cargo.env(key, value);
    }
    cargo.arg("--").args(filters);
    Ok(cargo)
}

/// Always the whole workspace, narrowed by kind of target: every step then builds with the same features, once.
fn cargo_test(targets: &[&str]) -> Command {
    let mut cargo = process::cargo();
    cargo.args(["test", "--workspace", "--no-fail-fast"]).args(targets);
    cargo
}

/// Builds the agent and says where it is.
fn agent_binary() -> Result<PathBuf> {
    executable(&["build", "--workspace", "--bin", "mesh-agent"], "mesh-agent")
}

/// Builds one target and asks cargo where its program is.
fn executable(args: &[&str], target: &str) -> Result<PathBuf> {
    let messages = process::cargo()
        .args(args)
        .arg("--message-format=json-render-diagnostics")
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !messages.status.success() {
        bail!("`cargo {}` ended with {}", args.join(" "), messages.status);
    }
    let messages = String::from_utf8_lossy(&messages.stdout);
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == target)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo named no program for {target}"))
}

/// The module that a suite's name stands for.
fn find_suite(name: &str) -> Result<String> {
    let suites = suites(&workspace::root().join("tests").join("it"))?;
    let module = name.replace('-', "_");
    if suites.contains(&module) {
        return Ok(module);
    }
    let names: Vec<String> = suites.iter().map(|suite| suite.replace('_', "-")).collect();
    bail!("no suite is called {name}; there are: main {}", names.join(" "))
}

/// Every module of the integration binary, at any depth.
fn suites(folder: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.append(&mut suites(&path)?);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            found.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    found.remove("main");
    Ok(found)
}
