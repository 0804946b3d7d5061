//! What a test needs of the machine: it says so in its first line and gets an answer.
//! A test that cannot run says so aloud; one whose tier was promised (`MESH_TIERS`) fails instead.
//! It must not know what the tests do, nor install anything: `cargo xtask test` does that before.

use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;
use std::{env, fmt, fs, io, thread};

use aya::programs::ProgramType;

/// A set of tests with the same needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Network namespaces may be made and entered.
    Netns,
    /// Programs may be loaded into the running kernel and attached to a cgroup.
    Kernel,
    /// A Docker daemon may be started.
    Docker,
    /// A Consul server may be started.
    Consul,
    /// Moto may be started, AWS's APIs without AWS.
    Aws,
}

impl Tier {
    /// The name in `MESH_TIERS` and in `cargo xtask test --tier`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Netns => "netns",
            Self::Kernel => "kernel",
            Self::Docker => "docker",
            Self::Consul => "consul",
            Self::Aws => "aws",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// True when this machine has what `tier` needs. Otherwise the test must return at once: the skip has been said aloud.
///
/// # Panics
/// When the tier was promised in `MESH_TIERS`: then a test that cannot run has failed.
#[must_use = "a test whose tier is missing must return"]
pub fn require(tier: Tier) -> bool {
    let Err(lack) = probe(tier) else { return true };
    let test = thread::current().name().unwrap_or("a test").to_owned();
    assert!(!promised(tier), "{test}: the {tier} tier was promised (MESH_TIERS), but {lack}");
    say(&format!("SKIPPED {test}: needs the {tier} tier, but {lack}"));
    false
}

/// Reports a measured figure: it is printed now and shown again at the end of `cargo xtask test`.
pub fn figure(name: &str, value: f64, unit: &str) {
    say(&format!("FIGURE {name} {value:.3} {unit}"));
}

fn promised(tier: Tier) -> bool {
    env::var("MESH_TIERS").is_ok_and(|promised| promised.split(',').any(|name| name.trim() == tier.name()))
}

/// Past the test runner's capture, which would hide what a passing test says; one write, so that lines stay whole.
fn say(line: &str) {
    // The runner may have left its own line open, hence the line feed before.
    // A closed stderr is nobody's fault, and nobody is there to hear of it.
    drop(io::stderr().write_all(format!("\n{line}\n").as_bytes()));
}

/// Nothing when the tier can run, else what is missing. Asked once for each tier.
fn probe(tier: Tier) -> Result<(), String> {
    static NETNS: OnceLock<Result<(), String>> = OnceLock::new();
    static KERNEL: OnceLock<Result<(), String>> = OnceLock::new();
    static DOCKER: OnceLock<Result<(), String>> = OnceLock::new();
    match tier {
        Tier::Netns => NETNS.get_or_init(probe_netns).clone(),
        Tier::Kernel => KERNEL.get_or_init(probe_kernel).clone(),
        Tier::Docker => DOCKER.get_or_init(probe_docker).clone(),
        Tier::Consul => crate::consul::program().map(drop),
        Tier::Aws => crate::aws::place().map(drop),
    }
}

fn probe_netns() -> Result<(), String> {
    // A thread of its own: it is in the new namespace until it ends.
    let made = thread::spawn(|| nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)).join();
    match made {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("no network namespace can be made ({error}); run it as root")),
        Err(_) => Err("the probe for network namespaces panicked".to_owned()),
    }
}

fn probe_kernel() -> Result<(), String> {
    probe_netns()?;
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err("the kernel has no BTF (/sys/kernel/btf/vmlinux)".to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| format!("no /proc/self/mounts ({error})"))?;
    if !mounts.lines().any(|mount| mount.split(' ').nth(2) == Some("cgroup2")) {
        return Err("no cgroup2 is mounted".to_owned());
    }
    match aya::sys::is_program_supported(ProgramType::CgroupSockAddr) {
        Ok(true) => Ok(()),
        Ok(false) => Err("the kernel has no cgroup socket address programs".to_owned()),
        Err(error) => Err(format!("no program can be loaded into the kernel ({error}); run it as root")),
    }
}

fn probe_docker() -> Result<(), String> {
    probe_netns()?;
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    match folders.map(|folder| folder.join("dockerd")).any(|program| program.is_file()) {
        true => Ok(()),
        false => Err("dockerd is not installed (Debian: docker.io)".to_owned()),
    }
}
