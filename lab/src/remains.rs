//! What a cluster has on the machine, and what of it is still there later: the proof that nothing is left.
//!
//! It must not know how things are made or removed, or it would prove only what it believes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    cgroup,
    name::{self, Claim, start_time},
    process::output,
};

const NAMESPACES: [&str; 5] = ["net", "mnt", "pid", "cgroup", "uts"];

/// Things on the machine that belong to clusters, by the names that the kernel knows them by.
#[derive(Clone, Debug, Default)]
pub struct Traces {
    /// When this was written down, in clock ticks since boot.
    at: u64,
    /// Pid and start time, because pids are reused.
    processes: BTreeMap<u32, String>,
    /// Such as `net:[4026532281]`.
    namespaces: BTreeSet<String>,
    cgroups: BTreeSet<PathBuf>,
    directories: BTreeSet<PathBuf>,
    mounts: usize,
    pins: usize,
    /// Ids of the BPF programs that the processes hold.
    programs: BTreeSet<u64>,
}

impl Traces {
    /// Traces of all clusters of one process.
    ///
    /// # Errors
    /// There is no cgroup2 hierarchy.
    pub fn of_owner(owner: u32) -> Result<Self> {
        Ok(Self::of(&name::of(owner)?))
    }

    pub(crate) fn of(claims: &[Claim]) -> Self {
        let mut traces = Self { at: ticks_now(), ..Self::default() };
        let own: Vec<String> = namespaces_of(std::process::id());
        let mut mount_namespaces = BTreeSet::new();
        let in_cgroups = claims.iter().flat_map(|claim| cgroup::pids(&claim.cgroup));
        for pid in in_cgroups {
            let Some(start) = start_time(pid) else { continue };
            traces.processes.insert(pid, start);
            let namespaces: Vec<_> = namespaces_of(pid).into_iter().filter(|each| !own.contains(each)).collect();
            if let Some(mount) = namespaces.iter().find(|each| each.starts_with("mnt"))
                && mount_namespaces.insert(mount.clone())
            {
                traces.mounts +=
                    fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default().lines().count();
                traces.pins += files_below(Path::new(&format!("/proc/{pid}/root/sys/fs/bpf")));
            }
            traces.namespaces.extend(namespaces);
        }
        traces.cgroups.extend(claims.iter().flat_map(|claim| cgroup::directories(&claim.cgroup)));
        traces.directories.extend(claims.iter().map(|claim| claim.dir.clone()));
        traces.programs = traces.processes.keys().flat_map(|pid| programs_of(*pid)).collect();
        traces
    }

    /// What of it is still on the machine when `limit` has passed, in words; returns at once when nothing is.
    #[must_use]
    pub fn left_after(&self, limit: Duration) -> Vec<String> {
        let deadline = Instant::now() + limit;
        loop {
            let left = self.left();
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What of it is on the machine now, in words; empty when nothing is.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for (pid, then) in &self.processes {
            if start_time(*pid).is_some_and(|now| now == *then) {
                left.push(format!("process {pid}"));
            }
        }
        let living = fs::read_dir("/proc").into_iter().flatten().flatten();
        for pid in living.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok())) {
            // The kernel gives the numbers of namespaces away again, so younger processes may bear the same.
            if start_time(pid).and_then(|ticks| ticks.parse::<u64>().ok()).is_none_or(|ticks| ticks > self.at) {
                continue;
            }
            let held = namespaces_of(pid).into_iter().chain(namespace_descriptors(pid));
            let ours = held.filter(|each| self.namespaces.contains(each));
            left.extend(ours.map(|each| format!("namespace {each} held by {pid}")));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for line in mounts.lines() {
            let ours = self.directories.iter().any(|each| line.contains(&*each.to_string_lossy()))
                || self.namespaces.iter().any(|each| line.contains(each.as_str()));
            if ours {
                left.push(format!("mount {line}"));
            }
        }
        left.extend(self.cgroups.iter().filter(|each| each.exists()).map(|each| format!("cgroup {}", each.display())));
        left.extend(
            self.directories.iter().filter(|each| each.exists()).map(|each| format!("directory {}", each.display())),
        );
        left.extend(self.programs_left().iter().map(|id| format!("BPF program {id}")));
        left.sort();
        left.dedup();
        left
    }
}

impl Traces {
    /// How many BPF programs the processes held.
    #[must_use]
    pub fn programs(&self) -> usize {
        self.programs.len()
    }

    /// Ids of those BPF programs that are still loaded.
    #[must_use]
    pub fn programs_left(&self) -> Vec<u64> {
        let known = programs();
        self.programs.iter().copied().filter(|id| known.contains(id)).collect()
    }
}

impl fmt::Display for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} processes, {} namespaces, {} cgroups, {} mounts, {} BPF programs, {} pins, {} directory",
            self.processes.len(),
            self.namespaces.len(),
            self.cgroups.len(),
            self.mounts,
            self.programs.len(),
            self.pins,
            self.directories.len(),
        )
    }
}

fn namespaces_of(pid: u32) -> Vec<String> {
    NAMESPACES.iter().filter_map(|kind| link(&format!("/proc/{pid}/ns/{kind}"))).collect()
}

/// Namespaces that a process holds by an open file.
fn namespace_descriptors(pid: u32) -> Vec<String> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    open.filter_map(|entry| link(&entry.path().to_string_lossy())).filter(|to| to.contains(":[")).collect()
}

fn link(path: &str) -> Option<String> {
    fs::read_link(path).ok().map(|to| to.to_string_lossy().into_owned())
}

/// `/proc/uptime` in the unit of `/proc/PID/stat`: a hundredth of a second on every architecture of Linux.
fn ticks_now() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let mut parts = text.split([' ', '.']).map(|part| part.parse::<u64>().unwrap_or(u64::MAX));
    let (seconds, hundredths) = (parts.next().unwrap_or(u64::MAX), parts.next().unwrap_or(0));
    seconds.saturating_mul(100).saturating_add(hundredths)
}

fn files_below(path: &Path) -> usize {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path()),
            // The kernel's own, there on every new bpffs.
            _ if entry.file_name().to_string_lossy().ends_with(".debug") => 0,
            _ => 1,
        })
        .sum()
}

/// Ids of the BPF programs that a process holds, itself or by a link (`/proc/PID/fdinfo`, field `prog_id`).
fn programs_of(pid: u32) -> BTreeSet<u64> {
    let open = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = open.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    let id = |text: String| text.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok());
    texts.filter_map(id).collect()
}

/// Ids of all loaded BPF programs; empty where bpftool is not installed.
fn programs() -> BTreeSet<u64> {
    let listed = output(Command::new("bpftool").args(["--json", "prog", "show"])).map(|done| done.stdout);
    let all: serde_json::Value = listed.ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    all.as_array().into_iter().flatten().filter_map(|program| program["id"].as_u64()).collect()
}
