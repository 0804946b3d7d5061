//! What the kernel must offer and allow: its release, capabilities, BPF, cgroup2 and bpffs.
//!
//! Must not know what the programs do.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{is_map_supported, is_program_supported},
};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};

use super::{
    Finding,
    parse::{self, Mount},
    read,
};
use crate::sys::btf;

const OLDEST: (u32, u32) = (5, 15);
const RECOMMENDED: (u32, u32) = (6, 1);

/// Capability numbers of capabilities(7), and what each is for.
const NEEDED: [(u32, &str, &str); 2] = [
    (21, "CAP_SYS_ADMIN", "enters the tasks' network namespaces and loads the programs"),
    (12, "CAP_NET_ADMIN", "attaches the programs and marks the agent's sockets"),
];
const PTRACE: u32 = 19;

/// The inode of the root directory of every kernfs hierarchy; a cgroup namespace's root has another.
const TRUE_ROOT: u64 = 1;

pub(super) fn release() -> Finding {
    let name = "kernel";
    let text = match read("/proc/sys/kernel/osrelease") {
        Ok(text) => text,
        Err(error) => return Finding::fail(name, error, "mount /proc"),
    };
    let found = format!("Linux {}", text.trim());
    match parse::release(&text) {
        Some(release) if release >= RECOMMENDED => Finding::ok(name, found),
        Some(release) if release >= OLDEST => {
            Finding::warn(name, found, "6.1 or newer is recommended: use the ECS AMI of Amazon Linux 2023")
        }
        Some(_) | None => {
            Finding::fail(name, found, "5.15 or newer is needed, 6.1 recommended: use the ECS AMI of Amazon Linux 2023")
        }
    }
}

pub(super) fn capabilities() -> Finding {
    let name = "capabilities";
    let held = read("/proc/self/status").and_then(|status| {
        parse::effective_capabilities(&status).ok_or_else(|| "no CapEff in /proc/self/status".to_owned())
    });
    let held = match held {
        Ok(held) => held,
        Err(error) => return Finding::fail(name, error, "mount /proc"),
    };
    let has = |bit: u32| held & (1 << bit) != 0;
    let missing: Vec<_> =
        NEEDED.iter().filter(|(bit, ..)| !has(*bit)).map(|(_, name, purpose)| format!("{name} ({purpose})")).collect();
    if !missing.is_empty() {
        return Finding::fail(
            name,
            format!("missing {}", missing.join(", ")),
            "run as root, or give the unit AmbientCapabilities= and the container --cap-add with these",
        );
    }
    if !has(PTRACE) {
        return Finding::warn(
            name,
            "missing CAP_SYS_PTRACE",
            "add it: without it a task whose user is not root cannot be entered by its process id",
        );
    }
    Finding::ok(name, "CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_SYS_PTRACE")
}

/// Loads trivial programs of the types that the hooks have, and makes empty maps of the rarer types.
pub(super) fn bpf() -> Finding {
    let name = "BPF";
    let programs = [("cgroup/sock_addr", ProgramType::CgroupSockAddr), ("sock_ops", ProgramType::SockOps)];
    let maps = [("ring buffer", MapType::RingBuf), ("socket storage", MapType::SkStorage)];
    let programs = programs.map(|(what, kind)| (what, is_program_supported(kind).map_err(|e| chain(&e))));
    let maps = maps.map(|(what, kind)| (what, is_map_supported(kind).map_err(|e| chain(&e))));
    for (what, supported) in programs.into_iter().chain(maps) {
        match supported {
            Ok(true) => {}
            Ok(false) => {
                return Finding::fail(
                    name,
                    format!("this kernel has no {what}"),
                    "it needs CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF: use a kernel of a distribution",
                );
            }
            Err(error) => {
                return Finding::fail(
                    name,
                    format!("cannot load {what}: {error}"),
                    "run as root; in a container allow bpf(2) in the seccomp profile; kernel lockdown must not be \
                     `confidentiality`",
                );
            }
        }
    }
    Finding::ok(name, "programs load, maps can be made")
}

pub(super) fn btf() -> Finding {
    let name = "BTF";
    match btf::socket_layout() {
        Ok(_) => Finding::ok(name, btf::PATH),
        Err(error) => Finding::warn(
            name,
            format!("{}; {}", chain(&error), btf::WITHOUT),
            "mount sysfs at /sys, or use a kernel of a distribution, with CONFIG_DEBUG_INFO_BTF",
        ),
    }
}

/// The mount point of the cgroup2 hierarchy to attach to: the one nearest to the true root, where there are several.
///
/// # Errors
/// There is none; the text says so.
pub fn cgroup2_root() -> Result<PathBuf, String> {
    let mountinfo = read("/proc/self/mountinfo")?;
    let (best, _) = choose(parse::cgroup2_mounts(&mountinfo));
    best.ok_or_else(|| "no cgroup2 file system is mounted".into())
}

pub(super) fn cgroup2(configured: Option<&Path>) -> Finding {
    let name = "cgroup2";
    if let Some(path) = configured {
        return match is_on(path, CGROUP2_SUPER_MAGIC) {
            Ok(true) => Finding::ok(name, format!("{} (as configured)", path.display())),
            Ok(false) => Finding::fail(
                name,
                format!("{} is no cgroup2 file system", path.display()),
                "correct `kernel.cgroup_root`, or leave it out",
            ),
            Err(error) => Finding::fail(
                name,
                format!("cannot look at {}: {error}", path.display()),
                "correct `kernel.cgroup_root`, or leave it out",
            ),
        };
    }
    let mounts = match read("/proc/self/mountinfo") {
        Ok(text) => parse::cgroup2_mounts(&text),
        Err(error) => return Finding::fail(name, error, "mount /proc"),
    };
    match choose(mounts) {
        (Some(best), 0) => Finding::ok(name, best.display().to_string()),
        (Some(best), others) => {
            Finding::ok(name, format!("{} ({others} more mounted; this one is nearest to the root)", best.display()))
        }
        (None, _) => Finding::fail(
            name,
            "no cgroup2 file system is mounted",
            "mount -t cgroup2 none /sys/fs/cgroup (or /sys/fs/cgroup/unified beside cgroup v1)",
        ),
    }
}

pub(super) fn bpffs(pin_dir: &Path) -> Finding {
    let name = "bpffs";
    let remedy = "mount -t bpf bpf /sys/fs/bpf, or set `kernel.pin_dir` to a directory on a bpffs";
    let existing = pin_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match is_on(existing, BPF_FS_MAGIC) {
        Ok(true) => Finding::ok(name, format!("mounted, pins go to {}", pin_dir.display())),
        Ok(false) => Finding::fail(name, format!("{} is not on a bpffs", pin_dir.display()), remedy),
        Err(error) => Finding::fail(name, format!("cannot look at {}: {error}", existing.display()), remedy),
    }
}

pub(super) fn pins(pin_dir: &Path, running: bool) -> Finding {
    let name = "pins";
    let entries = match fs::read_dir(pin_dir) {
        Ok(entries) => entries.count(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => {
            let found = format!("cannot list {}: {error}", pin_dir.display());
            return Finding::fail(name, found, "run as root");
        }
    };
    match entries {
        0 => Finding::ok(name, "none"),
        _ if running => Finding::ok(name, format!("{entries} of the running agent")),
        _ => Finding::warn(
            name,
            format!("{entries} in {} of an agent that was killed", pin_dir.display()),
            "none needed: `mesh-agent run` takes care of them at its start",
        ),
    }
}

/// The best mount, and how many others can be used.
fn choose(mounts: Vec<Mount>) -> (Option<PathBuf>, usize) {
    // A mount may be hidden under another one: only what is at the mount point now counts.
    let usable = mounts.into_iter().filter(|mount| is_on(&mount.point, CGROUP2_SUPER_MAGIC).unwrap_or(false));
    let whole = |mount: &Mount| fs::metadata(&mount.point).is_ok_and(|found| found.ino() == TRUE_ROOT);
    let ranked = parse::by_completeness(usable.map(|mount| (whole(&mount), mount)).collect());
    let others = ranked.len().saturating_sub(1);
    (ranked.into_iter().next(), others)
}

fn is_on(path: &Path, kind: FsType) -> nix::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == kind)
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
