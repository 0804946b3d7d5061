//! The kernel matrix: the kernel tier inside virtual machines that boot other kernels, with everything they need in
//! one archive in memory. It must not know what the tests do, only how to carry them in and what came out.

mod initrd;
mod kernel;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::test::Report;
use crate::{packages, process, workspace};
pub use kernel::Kernel;

/// Kernel modules that the tests use, where a kernel has them as modules: virtual links and bridges between tasks.
const MODULES: [&str; 4] = ["veth", "bridge", "dummy", "tun"];

/// Without hardware help a machine of two cores takes seconds to boot and some minutes at most to run the tier.
const TIME_LIMIT: Duration = Duration::from_secs(600);

/// The line by which the machine says how the tests ended; without it they did not end at all.
const MARKER: &str = "MESH-VM-RESULT ";

/// Everything that QEMU can emulate, but for CMPXCHG16B: QEMU 7.2 leaves wrong flags behind it, and the slab allocator of
/// Linux 6.12, which uses it on every allocation, dies of that with a double fault.
const CPU: &str = "max,-cx16";

const MEMORY_MIB: u64 = 1024;

/// Installs what the matrix needs.
///
/// # Errors
/// When this machine cannot run it: another processor, or packages that are missing and cannot be installed.
pub fn prepare() -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the kernel matrix is for x86-64 machines only");
    }
    packages::ensure(&[packages::QEMU, packages::BUSYBOX, packages::IP, packages::KMOD, packages::XZ])
}

/// The kernels of `series`, fetched unless they are there already.
pub fn fetch(series: &[impl AsRef<str>]) -> Result<Vec<Kernel>> {
    let folder = workspace::target().join("vm");
    series.iter().map(|series| Kernel::fetch(series.as_ref(), &folder)).collect()
}

/// Runs the kernel tier of `tests` on every one of `kernels`, at the same time where memory allows.
pub fn run(kernels: &[Kernel], tests: &Path, agent: &Path, report: &mut Report) -> Result<()> {
    let mut machines = Vec::new();
    for kernel in kernels {
        machines.push((kernel, build_initrd(kernel, tests, agent)?));
    }
    // Two machines may have twice what one has, and the rest of this machine must live.
    let at_once = if free_mib().is_some_and(|free| free < 3 * MEMORY_MIB) { 1 } else { 2 };
    for group in machines.chunks(at_once) {
        let names: Vec<&str> = group.iter().map(|(kernel, _)| kernel.release.as_str()).collect();
        println!("\n== kernel tier on {}", names.join(" and "));
        let ended: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> =
                group.iter().map(|(kernel, initrd)| (kernel, scope.spawn(move || boot(kernel, initrd)))).collect();
            running.into_iter().map(|(kernel, machine)| (kernel, machine.join())).collect()
        });
        for (kernel, ended) in ended {
            let Ok(ended) = ended else { bail!("the thread that ran {} panicked", kernel.release) };
            judge(kernel, ended, report);
        }
    }
    Ok(())
}

/// How one machine's run ended.
struct Ended {
    report: Report,
    /// The tests' own exit code, when they came to an end.
    code: Option<i32>,
    last: Vec<String>,
    took: Duration,
}

fn judge(kernel: &Kernel, ended: Result<Ended>, report: &mut Report) {
    let name = format!("kernel tier on {}", kernel.release);
    match ended {
        Err(error) => report.fault(&format!("{name}: {error:#}")),
        Ok(ended) => {
            let ran = ended.report.ran();
            match ended.code {
                Some(0) if ran == 0 => report.fault(&format!("{name}: no test belongs to it")),
                Some(0) => {}
                Some(code) => report.fault(&format!("{name}: {} failed, exit code {code}", ended.report.failed())),
                None => report.fault(&format!(
                    "{name}: the machine stopped, or {} s passed, before the tests ended. Its last words:\n    {}",
                    TIME_LIMIT.as_secs(),
                    ended.last.join("\n    ")
                )),
            }
            report.figure(&format!("vm.{}.tests", kernel.series), ran as f64, "tests");
            report.figure(&format!("vm.{}.time", kernel.series), ended.took.as_secs_f64(), "s");
            report.add(ended.report.found_on(&format!("vm.{}.", kernel.series)));
        }
    }
}

/// Boots, reads the console to its end, and returns what it said.
fn boot(kernel: &Kernel, initrd: &Path) -> Result<Ended> {
    let began = Instant::now();
    let mut machine = Machine::start(kernel, initrd)?;
    let console = machine.0.stdout.take().context("the machine has no console")?;
    let (lines, done) = (machine_lines(console, kernel.series.clone()), began + TIME_LIMIT);
    let mut code = None;
    let mut text = Vec::new();
    while let Ok(line) = lines.recv_timeout(done.saturating_duration_since(Instant::now())) {
        if let Some(said) = line.strip_prefix(MARKER) {
            code = said.trim().parse().ok();
        }
        text.push(line);
    }
    drop(machine);
    let report = Report::read(text.join("\n").as_bytes(), |_| {})?;
    let last = text.split_off(text.len().saturating_sub(20));
    Ok(Ended { report, code, last, took: began.elapsed() })
}

/// The console as lines, shown as they come with the kernel's name before them.
fn machine_lines(console: impl Read + Send + 'static, series: String) -> mpsc::Receiver<String> {
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        let shown = Report::read(console, |line| {
            if !line.is_empty() {
                println!("[{series}] {line}");
            }
            // The receiver leaves first only when time is up; the rest is then of no use.
            drop(send.send(line.to_owned()));
        });
        if let Err(error) = shown {
            println!("[{series}] console lost: {error:#}");
        }
    });
    lines
}

/// A running virtual machine, which does not outlive its value.
struct Machine(Child);

impl Machine {
    fn start(kernel: &Kernel, initrd: &Path) -> Result<Self> {
        let qemu = process::find("qemu-system-x86_64").context("qemu-system-x86_64 is not installed")?;
        // No hardware virtualisation: where it is offered inside another virtual machine it may hang the guest.
        let child = Command::new(qemu)
            .args(["-accel", "tcg", "-cpu", CPU, "-smp", "2", "-m", &MEMORY_MIB.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(initrd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start qemu")?;
        Ok(Self(child))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended by itself unless time was up; both calls then only say so.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Everything the machine needs, in one archive.
fn build_initrd(kernel: &Kernel, tests: &Path, agent: &Path) -> Result<PathBuf> {
    let mut archive = initrd::Archive::default();
    for folder in ["proc", "sys", "dev", "tmp", "run", "etc", "root", "var", "mnt", "usr/bin", "usr/sbin"] {
        archive.folder(folder);
    }
    archive.console();
    let busybox = process::find("busybox").context("busybox is not installed")?;
    archive.program(&busybox, "bin/busybox")?;
    // Debug information would triple the archive; the tests' names and line numbers are in the programs themselves.
    for (program, place) in [(tests, "tests/it"), (agent, "usr/bin/mesh-agent")] {
        let slim = kernel.folder.join(program.file_name().context("a program has no name")?);
        strip(program, &slim)?;
        archive.program(&slim, place)?;
        archive.libraries(program)?;
    }
    let ip = process::find("ip").context("ip is not installed")?;
    archive.program(&ip, "usr/sbin/ip")?;
    archive.libraries(&ip)?;
    let mut load = String::new();
    for (name, module) in kernel.modules(&MODULES)? {
        archive.bytes(&format!("modules/{name}.ko"), 0o644, module);
        load.push_str(&format!("insmod /modules/{name}.ko\n"));
    }
    archive.bytes("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n".to_vec());
    archive.bytes("etc/group", 0o644, b"root:x:0:\n".to_vec());
    archive.bytes("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n".to_vec());
    archive.bytes("init", 0o755, init(&load).into_bytes());
    let file = kernel.folder.join("initrd.cpio");
    fs::write(&file, archive.finish()).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// The first process: makes the machine look like a host, runs the tests, says how they ended, and stops the machine.
fn init(load: &str) -> String {
    format!(
        "#!/bin/busybox sh\n\
         export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root\n\
         /bin/busybox mkdir -p /sbin\n\
         /bin/busybox --install -s /bin\n\
         rm -f /bin/ip\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sysfs /sys\n\
         mount -t devtmpfs devtmpfs /dev\n\
         mkdir -p /dev/pts /dev/shm\n\
         mount -t tmpfs tmpfs /tmp\n\
         mount -t tmpfs tmpfs /run\n\
         mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         {load}\
         ip link set lo up\n\
         hostname vm\n\
         cd /tests\n\
         MESH_TIERS=netns,kernel MESH_AGENT=/usr/bin/mesh-agent RUST_BACKTRACE=1 /tests/it kernel::\n\
         code=$?\n\
         echo\n\
         echo {MARKER}$code\n\
         sync\n\
         reboot -f\n"
    )
}

/// A copy without debug information, or a plain copy where `strip` is missing.
fn strip(program: &Path, to: &Path) -> Result<()> {
    let stripped = process::output(process::clean("strip").args(["--strip-debug", "-o"]).arg(to).arg(program));
    if stripped.is_err() {
        fs::copy(program, to).with_context(|| format!("cannot copy {}", program.display()))?;
    }
    Ok(())
}

/// Memory that a new program could have, in MiB.
fn free_mib() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}
