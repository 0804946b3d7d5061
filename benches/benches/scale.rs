//! How cost grows with what there is: decisions, one change among 50,000 endpoints, and a whole agent that knows them.
//!
//! Exits non-zero when a promised bound does not hold. It must not know how the agent does it.
#![allow(clippy::print_stdout, reason = "figures are what a benchmark is for")]

use std::{
    alloc::System,
    env,
    io::{self, Read as _},
    net::{TcpListener, TcpStream, ToSocketAddrs as _},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use mesh_benches::{program, whole};
use mesh_core::{dataplane, merge::Merged};
use mesh_worlds::{CASES, Case, Size, World};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// 5,000 services with 10 endpoints each.
const MANY: Size = Size { services: 5000, endpoints: 10, tasks: 100 };
/// A change is in the kernel in under this, from the moment on which it is known.
const UPDATE_MS: f64 = 10.0;
const RESIDENT_MB: f64 = 60.0;
/// Beyond what Consul needs by itself, the change of an instance that a task uses is in the kernel after so long in the median.
const BEYOND_MS: f64 = 50.0;
/// What the kernel knows of a service that nobody used is as Consul says, so long after a task has first asked for it.
const FIRST_USE_MS: f64 = 250.0;
/// Between the smallest world and the largest, a decision may cost so many times as much: trees become deeper, caches
/// are missed. A decision that looks at everything would cost a thousand times as much.
const FLAT: f64 = 3.0;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        [] => measure(true),
        ["decisions"] => measure(false),
        ["update"] => {
            let mut bounds = Bounds(true);
            update(&mut bounds);
            Ok(bounds.0)
        }
        ["agent"] => agent_alone(),
        ["consul"] => agent_with_consul(),
        // What this program does inside of containers.
        ["serve", port] => serve(port),
        ["open", target, count] => open(target, count),
        ["resolve", name] => (*name, 80).to_socket_addrs().map(|_| true).map_err(anyhow::Error::from),
        other => Err(anyhow::anyhow!(
            "`bench scale` takes nothing, or `decisions`, `update`, `agent` or `consul` for a part: {other:?}"
        )),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAULT {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(whole: bool) -> Result<bool> {
    let mut bounds = Bounds(true);
    decisions(&mut bounds)?;
    update(&mut bounds);
    if whole {
        bounds.0 &= agent_alone()?;
        bounds.0 &= agent_with_consul()?;
    }
    Ok(bounds.0)
}

fn agent_alone() -> Result<bool> {
    let mut bounds = Bounds(true);
    if let Err(lack) = mesh_lab::preflight() {
        println!("SKIPPED the whole agent: {lack:#}");
        return Ok(bounds.0);
    }
    let agent = program::agent()?;
    let found = whole::measure(&agent, &env::current_exe()?, MANY)?;
    bounds.at_most("scale_agent_resident_mb", found.of("scale_agent_resident_mb")?, RESIDENT_MB);
    bounds.at_most("scale_agent_turn_ms", found.of("scale_agent_turn_ms")?, UPDATE_MS);
    Ok(bounds.0)
}

fn agent_with_consul() -> Result<bool> {
    let mut bounds = Bounds(true);
    if let Err(lack) = mesh_lab::preflight() {
        println!("SKIPPED the whole agent with Consul: {lack:#}");
        return Ok(bounds.0);
    }
    let consul = env::var_os("MESH_CONSUL")
        .context("MESH_CONSUL names no program; start this with `cargo xtask bench scale`")?;
    let found = whole::consul::measure(&program::agent()?, consul.as_ref(), &env::current_exe()?, MANY)?;
    for name in ["scale_consul_resident_mb", "scale_consul_after_changes_resident_mb"] {
        bounds.at_most(name, found.of(name)?, RESIDENT_MB);
    }
    for change in ["comes", "goes"] {
        let name = format!("scale_consul_used_instance_{change}_beyond_ms");
        bounds.at_most(&name, found.of(&name)?, BEYOND_MS);
    }
    let name = "scale_consul_first_use_to_kernel_ms";
    bounds.at_most(name, found.of(name)?, FIRST_USE_MS);
    Ok(bounds.0)
}

struct Bounds(bool);

impl Bounds {
    fn at_most(&mut self, name: &str, value: f64, most: f64) {
        if value > most {
            println!("FAULT {name} is {value:.3}, and at most {most:.3} is promised");
            self.0 = false;
        }
    }
}

fn figure(name: &str, value: f64, unit: &str) {
    println!("FIGURE {name} {value:.3} {unit}");
}

/// What each connection costs, as services and tasks become more.
fn decisions(bounds: &mut Bounds) -> Result<()> {
    for (kind, name) in [("plan", "plan"), ("inbound", "plan_inbound"), ("resolve", "resolve")] {
        let case = CASES.iter().find(|case| case.name == name).context("there is such a case")?;
        let by_services =
            [10, 100, 1000, 10_000].map(|services| (services, Size { services, endpoints: 10, tasks: 1 }));
        grows(bounds, kind, "services", case, &by_services);
        let by_tasks = [1, 10, 100, 1000].map(|tasks| (tasks, Size { services: 100, endpoints: 10, tasks }));
        grows(bounds, kind, "tasks", case, &by_tasks);
    }
    Ok(())
}

fn grows(bounds: &mut Bounds, kind: &str, of: &str, case: &Case, sizes: &[(usize, Size)]) {
    let mut decisions: Vec<_> = sizes.iter().map(|(count, size)| (*count, (case.make)(&World::new(*size)))).collect();
    let mut best = vec![f64::INFINITY; decisions.len()];
    // In turns, so that a disturbance strikes all alike.
    for _ in 0..20 {
        for ((_, decide), best) in decisions.iter_mut().zip(&mut best) {
            *best = best.min(nanoseconds(10_000, decide));
        }
    }
    for ((count, _), best) in decisions.iter().zip(&best) {
        figure(&format!("scale_{kind}_{count}_{of}"), *best, "ns");
    }
    if let (Some(first), Some(last)) = (best.first(), best.last()) {
        bounds.at_most(&format!("scale_{kind}_{of}_growth"), last / first, FLAT);
    }
}

fn nanoseconds(times: u32, mut decide: impl FnMut()) -> f64 {
    let began = Instant::now();
    for _ in 0..times {
        decide();
    }
    began.elapsed().as_secs_f64() * 1e9 / f64::from(times)
}

/// One endpoint among 50,000 moves: time and bytes until the writes for the kernel are there, beside a small world's.
fn update(bounds: &mut Bounds) {
    let small = Size { services: 10, endpoints: 10, tasks: MANY.tasks };
    for (what, size) in [("100", small), ("50000", MANY)] {
        let heap = Region::new(HEAP);
        let world = World::new(size);
        figure(&format!("scale_sources_of_{what}_kb"), kept(&heap), "kB");
        let heap = Region::new(HEAP);
        let began = Instant::now();
        let before = world.merged(&Merged::default());
        let writes = dataplane::diff(&Default::default(), &dataplane::image(&before.snapshot)).len();
        figure(&format!("scale_first_of_{what}_ms"), began.elapsed().as_secs_f64() * 1e3, "ms");
        figure(&format!("scale_first_of_{what}_writes"), writes as f64, "writes");
        figure(&format!("scale_snapshot_of_{what}_kb"), kept(&heap), "kB");
        let moved = world.with_one_moved();
        let one = || {
            let after = moved.merged(&before);
            let (from, to) = dataplane::around(&before.snapshot, &after.snapshot);
            dataplane::diff(&from, &to)
        };
        let heap = Region::new(HEAP);
        let writes = one().len();
        let bytes = heap.change().bytes_allocated as f64;
        let best = (0..50).map(|_| nanoseconds(1, || drop(one()))).fold(f64::INFINITY, f64::min);
        figure(&format!("scale_update_of_{what}_us"), best / 1e3, "us");
        figure(&format!("scale_update_of_{what}_bytes"), bytes, "bytes");
        figure(&format!("scale_update_of_{what}_writes"), writes as f64, "writes");
        bounds.at_most(&format!("scale_update_of_{what}_us"), best / 1e3, UPDATE_MS * 1e3);
        bounds.at_most(&format!("scale_update_of_{what}_bytes"), bytes, 256.0 * 1024.0);
    }
}

/// What is still held, in kilobytes.
fn kept(heap: &Region<'_, System>) -> f64 {
    let change = heap.change();
    change.bytes_allocated.saturating_sub(change.bytes_deallocated) as f64 / 1e3
}

/// Accepts and holds whatever comes.
fn serve(port: &str) -> Result<bool> {
    let listener = TcpListener::bind(("0.0.0.0", port.parse()?)).context("cannot listen")?;
    let mut held = Vec::new();
    loop {
        held.push(listener.accept().context("cannot accept")?);
    }
}

/// Opens connections, one after the other, says so, and holds them until its input ends.
fn open(target: &str, count: &str) -> Result<bool> {
    let mut held = Vec::new();
    for _ in 0..count.parse()? {
        let stream = TcpStream::connect(target).with_context(|| format!("cannot connect to {target}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        held.push(stream);
    }
    println!("open {}", held.len());
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(true)
}
