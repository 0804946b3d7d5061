//! The mesh beside what a user could install instead: same hosts, same work, in turn.
//!
//! It checks that every peer really encrypts and verifies, measures, judges the goals, and writes `RESULTS.md` and a
//! plot. It fails when a measurement is broken; a missed goal fails it only with `--strict`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark talks to whoever started it")]

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use mesh_benches::{
    agents::Agents,
    certificates::Authority,
    goals::{self, Memory, Verdict},
    interrupt,
    load::Work,
    peers::{self, Layer, Linkerd, Peer, Programs, Running},
    proof::{self, Proof},
    report::Report,
    rounds::{self, Metric, Table},
    subject::{self, Kind, Subject},
    topology::Topology,
    usage,
};

/// Tasks of the host whose idle agent is weighed.
const CROWD: usize = 50;
/// An agent is idle when its memory has stayed the same for so long.
const AT_REST: Duration = Duration::from_secs(10);

#[derive(clap::Parser)]
#[command(about = "Measures ecs-mesh beside what a user could install instead")]
struct Args {
    /// Only these peers, comma separated; `none` for ours and no mesh alone
    #[arg(long, value_delimiter = ',', value_name = "PEER")]
    only: Vec<String>,
    /// Only these kinds of work, comma separated
    #[arg(long, value_delimiter = ',', value_name = "WORK")]
    work: Vec<String>,
    /// One round of one second each: whether everything works, not how fast
    #[arg(long)]
    quick: bool,
    /// Rounds; each subject does each work once in each
    #[arg(long, value_name = "COUNT")]
    rounds: Option<u32>,
    /// Length of each measurement
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u32>,
    /// Fail when a goal is missed
    #[arg(long)]
    strict: bool,
    /// Folder for the report; default: `benches` after a full run, else a scratch folder
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// A ztunnel that was built with the feature `testing`, to be measured too
    #[arg(long, value_name = "PROGRAM")]
    ztunnel: Option<PathBuf>,
    /// linkerd2-proxy of Linkerd 2.13 or later, to be measured too
    #[arg(long, value_name = "PROGRAM")]
    linkerd: Option<PathBuf>,
    /// Cargo says so to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(faults) if faults.is_empty() => ExitCode::SUCCESS,
        Ok(faults) => {
            for fault in faults {
                eprintln!("FAILED {fault}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("FAILED {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does everything; returns what went wrong on the way.
fn run(args: &Args) -> Result<Vec<String>> {
    let chosen = choose(args)?;
    let works = works(args)?;
    let probe = PathBuf::from(env!("CARGO_BIN_EXE_probe"));
    let agent =
        env::var_os("MESH_AGENT").context("MESH_AGENT names no agent; start this with `cargo xtask bench peers`")?;
    let agent = PathBuf::from(agent);
    let programs = programs(args)?;
    let (rounds, seconds) = if args.quick { (1, 1) } else { (3, 3) };
    let (rounds, seconds) = (args.rounds.unwrap_or(rounds).max(1), args.seconds.unwrap_or(seconds).max(1));

    interrupt::arm()?;
    println!("Making four hosts, their tasks, and two agents …");
    let topology = Topology::up(&probe)?;
    let trusted = Authority::make(topology.cluster.dir(), "trusted")?;
    let stranger = Authority::make(topology.cluster.dir(), "stranger")?;
    let agents = Agents::start(&topology, &agent)?;
    let mut faults = Vec::new();
    let mut skipped = Vec::new();
    let mut running = Vec::new();
    for (index, peer) in (0..).zip(chosen) {
        if let Some(lack) = peer.lacks(&programs) {
            skipped.push(format!("{}: {lack}", peer.name));
            continue;
        }
        match peer.start(&topology, &programs, index, &trusted, &trusted) {
            Ok(pair) => running.push(pair),
            Err(error) if peer.is_named(&programs) => {
                return Err(error.context(format!("{} was to be measured and does not run", peer.name)));
            }
            Err(error) => faults.push(format!("{} does not run: {error:#}", peer.name)),
        }
    }
    for skipped in &skipped {
        println!("SKIPPED {skipped}");
    }

    let mut subjects = subject::all(&topology, &agents, &running)?;
    println!("Checking that each encrypts and verifies …");
    let proofs = prove(&topology, &programs, &subjects, &running, (&trusted, &stranger), &mut faults);
    // A peer that proves nothing gets no figures; ours and no mesh at all are what the others are held against.
    subjects.retain(|subject| {
        !matches!(subject.kind, Kind::Peer(_)) || proofs.iter().any(|each| each.subject == subject.name)
    });
    let pids = agents.pids()?;
    println!("FIGURE memory.pair_start_peak {:.1} MB", usage::high_water(&pids) as f64 / 1e6);
    usage::forget_high_water(&pids)?;
    println!("Measuring: {rounds} rounds of {seconds} s …");
    let table =
        rounds::measure(&topology, &subjects, &works, (rounds, seconds), goals::turns, |line| println!("{line}"));
    if table.failures() > 0 {
        faults.push(format!("{} measurements are broken; they are marked above", table.failures()));
    }
    let pair_peak = Some(usage::high_water(&pids) as f64);
    println!("FIGURE memory.pair_anonymous_after_load {:.1} MB", usage::anonymous(&pids) as f64 / 1e6);
    let versions = versions(&topology, &programs);
    drop(running);
    let idle = weigh_idle(&topology, agents).inspect_err(|error| faults.push(format!("idle agent: {error:#}"))).ok();

    let names = |layer: Layer| -> Vec<&'static str> {
        subjects.iter().filter(|each| each.kind == Kind::Peer(layer)).map(|each| each.name).collect()
    };
    let memory = Memory { pair_peak, idle };
    let verdicts = goals::judge(&table, &names(Layer::L7), &names(Layer::L4), memory);
    figures(&table, &subjects, &verdicts);
    let report = Report {
        machine: machine()?,
        versions,
        rounds,
        seconds,
        subjects: &subjects,
        table: &table,
        verdicts: &verdicts,
        proofs: &proofs,
        skipped: &skipped,
        plot: "results.svg",
    };
    write(args, &report)?;
    let missed: Vec<&str> = verdicts.iter().filter(|each| each.met() == Some(false)).map(|each| each.name).collect();
    println!("goals missed: {}", if missed.is_empty() { "none".to_owned() } else { missed.join(" ") });
    if args.strict && !missed.is_empty() {
        faults.push(format!("goals missed: {}", missed.join(" ")));
    }
    topology.down()?;
    Ok(faults)
}

/// Those that were named, and those that `xtask` has fetched or built.
fn programs(args: &Args) -> Result<Programs> {
    let from = |variable: &str| env::var_os(variable).map(PathBuf::from);
    let ztunnel = args.ztunnel.as_deref().map(|named| program("--ztunnel", named)).transpose()?;
    let linkerd = args.linkerd.as_deref().map(|named| {
        let control = from("MESH_LINKERD_CONTROL").context(
            "MESH_LINKERD_CONTROL names nothing that answers linkerd2-proxy; start this with `cargo xtask bench peers`",
        )?;
        anyhow::Ok(Linkerd { proxy: program("--linkerd", named)?, control })
    });
    Ok(Programs { envoy: from("MESH_ENVOY"), ztunnel, linkerd: linkerd.transpose()? })
}

/// The program that was named, if it is one.
fn program(option: &str, named: &Path) -> Result<PathBuf> {
    let program = named.canonicalize().with_context(|| format!("{option}: there is no {}", named.display()))?;
    let mode =
        program.metadata().with_context(|| format!("cannot look at {}", program.display()))?.permissions().mode();
    ensure!(program.is_file() && mode & 0o111 != 0, "{option}: {} is no program", program.display());
    Ok(program)
}

fn choose(args: &Args) -> Result<Vec<Peer>> {
    let known: Vec<&str> = peers::ALL.iter().map(|peer| peer.name).collect();
    for name in args.only.iter().filter(|name| *name != "none") {
        ensure!(known.contains(&name.as_str()), "no peer is called {name}; there are: {}", known.join(" "));
    }
    let wanted = |peer: &Peer| args.only.is_empty() || args.only.iter().any(|name| name == peer.name);
    Ok(peers::ALL.into_iter().filter(wanted).collect())
}

fn works(args: &Args) -> Result<Vec<Work>> {
    for name in &args.work {
        let known = Work::ALL.map(Work::name);
        ensure!(known.contains(&name.as_str()), "no work is called {name}; there are: {}", known.join(" "));
    }
    let wanted = |work: &Work| args.work.is_empty() || args.work.iter().any(|name| name == work.name());
    Ok(Work::ALL.into_iter().filter(wanted).collect())
}

/// Every proof; one that fails is a fault, and its subject's figures are not to be believed: it has proved nothing.
fn prove(
    topology: &Topology,
    programs: &Programs,
    subjects: &[Subject],
    running: &[Running],
    (trusted, stranger): (&Authority, &Authority),
    faults: &mut Vec<String>,
) -> Vec<Proof> {
    let mut proofs = Vec::new();
    let across = [subject::DIRECT, subject::OURS_L7, subject::OURS_L4];
    for (index, subject) in (20..).zip(subjects) {
        let pair = running.iter().find(|pair| pair.peer.name == subject.name);
        if pair.is_none() && !across.contains(&subject.name) {
            continue; // on one host nothing is on a wire
        }
        let mut facts = Vec::new();
        let before = faults.len();
        let mut shown = |fact: Result<Vec<String>>| match fact {
            Ok(more) => facts.extend(more),
            Err(error) => faults.push(format!("{} proves nothing: {error:#}", subject.name)),
        };
        shown(proof::wire(topology, subject, subject.kind != Kind::NoMesh));
        if let Some(pair) = pair {
            shown(proof::certificates(topology, programs, pair, (trusted, stranger), index));
        } else if subject.name == subject::OURS_L7 {
            shown(proof::agents(topology, stranger));
        }
        println!("{:<18} {}", subject.name, facts.join("; "));
        if faults.len() > before {
            continue;
        }
        proofs.push(Proof { subject: subject.name.to_owned(), facts });
    }
    proofs
}

/// Resident memory of one agent that has fifty tasks and has never carried anything.
fn weigh_idle(topology: &Topology, agents: Agents) -> Result<f64> {
    println!("Starting {CROWD} tasks and an agent that carries nothing …");
    topology.crowd(CROWD)?;
    let agents = agents.restart_first(topology, CROWD)?;
    let pids = agents.pids()?;
    // What start-up needed is given back after a while; a figure is what no longer changes.
    let mut resident = usage::resident(&pids);
    let mut since = Instant::now();
    let limit = Instant::now() + Duration::from_secs(60);
    while since.elapsed() < AT_REST && Instant::now() < limit {
        thread::sleep(Duration::from_millis(500));
        let now = usage::resident(&pids);
        if now.abs_diff(resident) * 200 >= resident {
            (resident, since) = (now, Instant::now());
        }
    }
    let idle = usage::resident(&pids) as f64;
    println!("FIGURE memory.idle_anonymous {:.1} MB", usage::anonymous(&pids) as f64 / 1e6);
    agents.stop()?;
    Ok(idle)
}

/// Every figure, in the form that `cargo xtask bench` gathers.
fn figures(table: &Table, subjects: &[Subject], verdicts: &[Verdict]) {
    for work in Work::ALL {
        for subject in subjects.iter().filter(|subject| subject.works.contains(&work)) {
            let figure = |what: &str, metric, scale: f64, unit: &str| {
                if let Some(value) = table.median(work, subject.name, metric) {
                    println!("FIGURE {}.{}.{what} {:.2} {unit}", work.name(), subject.name, value * scale);
                }
            };
            if work.is_a_race() {
                let (scale, unit) = work.rate(1.0);
                figure("rate", Metric::Rate, scale, unit);
            }
            figure("p50", Metric::P50, 1.0, "us");
            figure("p99", Metric::P99, 1.0, "us");
            if subject.kind != Kind::NoMesh {
                let (scale, unit) = work.cost(1.0);
                figure("cpu", Metric::Cpu, scale, unit);
                figure("memory", Metric::Memory, 1e-6, "MB");
            }
        }
    }
    for verdict in verdicts {
        if let Some(value) = verdict.value {
            println!("FIGURE goal.{} {value:.3} {}", verdict.name, verdict.unit);
        }
    }
    println!();
    for verdict in verdicts {
        let value = verdict.value.map_or("–".to_owned(), |value| format!("{value:.3}"));
        println!("{:<12} {value:>8} {} {}: {}", verdict.word(), verdict.bound, verdict.unit, verdict.promise);
    }
}

fn machine() -> Result<Vec<String>> {
    let cpu = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let uname = nix::sys::utsname::uname().context("the kernel does not say its name")?;
    Ok(vec![format!(
        "Machine: {}, {} CPUs, Linux {}; clients, proxies and servers share them",
        model.trim_start_matches([' ', '\t', ':']),
        usage::cpus(),
        uname.release().to_string_lossy(),
    )])
}

/// The first line of what each program says of itself.
fn versions(topology: &Topology, programs: &Programs) -> Vec<String> {
    let envoy = programs.envoy.as_deref().unwrap_or(Path::new("envoy"));
    let mut versions = Vec::new();
    let agent = topology.cluster.hosts()[0].exec(&["mesh-agent", "--version"]).map(|said| said.stdout);
    versions.extend(agent.ok().map(|line| line.trim().to_owned()));
    for (program, argument) in
        [(Path::new("nginx"), "-v"), (Path::new("haproxy"), "-v"), (envoy, "--version"), (Path::new("wrk"), "-v")]
    {
        let said = mesh_lab::output(Command::new(program).arg(argument));
        let said = said.map(|said| format!("{}{}", said.stdout, said.stderr)).unwrap_or_default();
        let line = said.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned();
        // Envoy says its path first.
        versions.extend(
            line.split("  version: ")
                .last()
                .filter(|line| !line.is_empty())
                .map(|line| if program == envoy { format!("envoy {line}") } else { line.to_owned() }),
        );
    }
    vec![format!("Programs: {}", versions.join("; "))]
}

/// Partial runs must not replace the results that the project shows.
fn write(args: &Args, report: &Report<'_>) -> Result<()> {
    let full = !args.quick && args.only.is_empty() && args.work.is_empty();
    let default = if full { env!("CARGO_MANIFEST_DIR") } else { env!("CARGO_TARGET_TMPDIR") };
    let folder = args.out.clone().unwrap_or_else(|| PathBuf::from(default));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, text) in [("RESULTS.md", report.markdown()), (report.plot, report.plot())] {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written: {}", path.display());
    }
    Ok(())
}
