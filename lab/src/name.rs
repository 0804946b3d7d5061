//! Names that say whose a thing is, and the removal of what dead owners left.
//!
//! A cluster is called `em<pid>-<n>`; its temporary directory holds the owner's start time, because pids are reused.
//! It must not know what a cluster consists of beyond its directory and its cgroup.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};

use crate::cgroup;

const PREFIX: &str = "em";
const OWNER: &str = "owner";

/// What a cluster holds outside of its namespaces.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) cgroup: PathBuf,
}

impl Claim {
    /// Takes a new name and makes the directory and the cgroup.
    pub(crate) fn take() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let pid = process::id();
        let claim = Self::named(format!("{PREFIX}{pid}-{}", COUNT.fetch_add(1, Ordering::Relaxed)))?;
        fs::create_dir_all(&claim.dir).with_context(|| format!("cannot make {}", claim.dir.display()))?;
        fs::write(claim.dir.join(OWNER), start_time(pid).unwrap_or_default()).context("cannot write the owner file")?;
        cgroup::create(&claim.cgroup)?;
        Ok(claim)
    }

    fn named(name: String) -> Result<Self> {
        Ok(Self { dir: std::env::temp_dir().join(&name), cgroup: cgroup::root()?.join(&name), name })
    }

    /// Kills what is in the cgroup, removes it and the directory.
    pub(crate) fn release(&self) -> Result<()> {
        cgroup::remove(&self.cgroup)?;
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.dir.display()))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Removes what clusters of dead processes left, and returns their names.
///
/// # Errors
/// Something cannot be removed.
pub fn sweep() -> Result<Vec<String>> {
    sweep_where(|pid, dir| {
        start_time(pid).is_none_or(|now| fs::read_to_string(dir.join(OWNER)).is_ok_and(|then| then != now))
    })
}

/// Removes the clusters of one process, which must have ended or be this one, and returns their names.
///
/// # Errors
/// Something cannot be removed.
pub fn sweep_of(owner: u32) -> Result<Vec<String>> {
    sweep_where(|pid, _| pid == owner)
}

/// Names of the clusters of a process that have a cgroup or a directory.
pub(crate) fn of(owner: u32) -> Result<Vec<Claim>> {
    let mut claims = all()?;
    claims.retain(|(pid, _)| *pid == owner);
    Ok(claims.into_iter().map(|(_, claim)| claim).collect())
}

fn sweep_where(dead: impl Fn(u32, &Path) -> bool) -> Result<Vec<String>> {
    let mut swept = Vec::new();
    for (pid, claim) in all()? {
        if dead(pid, &claim.dir) {
            claim.release()?;
            swept.push(claim.name);
        }
    }
    Ok(swept)
}

fn all() -> Result<Vec<(u32, Claim)>> {
    let mut names: Vec<String> = [cgroup::root()?, std::env::temp_dir()]
        .iter()
        .filter_map(|place| fs::read_dir(place).ok())
        .flat_map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()))
        .collect();
    names.sort();
    names.dedup();
    let owned = names.into_iter().filter_map(|name| Some((owner_of(&name)?, name)));
    owned.map(|(pid, name)| Ok((pid, Claim::named(name)?))).collect()
}

fn owner_of(name: &str) -> Option<u32> {
    let (pid, count) = name.strip_prefix(PREFIX)?.split_once('-')?;
    count.parse::<u32>().ok()?;
    pid.parse().ok()
}

/// When a process started, in clock ticks since boot (`/proc/PID/stat`, field 22); `None` when there is none, or only
/// its exit status waits for a parent: such a one holds nothing.
pub(crate) fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the command in brackets, may hold spaces.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let (state, start) = (fields.first()?, fields.get(19)?);
    (*state != "Z").then(|| (*start).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_owner_and_a_strangers_does_not() {
        assert_eq!(owner_of("em412-3"), Some(412));
        for other in ["em412", "em-3", "emacs-3", "em412-x", "xem412-3", "em4 12-3"] {
            assert_eq!(owner_of(other), None, "{other}");
        }
    }

    #[test]
    fn only_living_processes_have_a_start_time() {
        assert!(start_time(process::id()).is_some_and(|ticks| ticks.parse::<u64>().is_ok()));
        assert_eq!(start_time(u32::MAX), None);
    }
}
