//! The machine's cgroup2 tree: find it, make and remove the subtree of one cluster.
//!
//! It must not know hosts or tasks.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Mount point of the machine's cgroup2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` where it is hybrid.
///
/// # Errors
/// There is none.
pub(crate) fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    mounts
        .lines()
        .filter(|line| line.contains(" - cgroup2 "))
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .next()
        .context("no cgroup2 hierarchy is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup")
}

/// Makes a cgroup and hands it the controllers of its parent, as far as they can be had.
pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir(path)
        .with_context(|| format!("cannot make the cgroup {}; is this process root?", path.display()))?;
    let has = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    for controller in has.split_whitespace() {
        // A controller in use by another hierarchy is refused; the lab needs none of them.
        fs::write(path.join("cgroup.subtree_control"), format!("+{controller}")).ok();
    }
    Ok(())
}

/// A command prefix that joins a cgroup before it becomes the command.
pub(crate) fn join(cgroup: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""]).arg(cgroup);
    command
}

/// Moves a process.
pub(crate) fn adopt(path: &Path, pid: u32) -> Result<()> {
    fs::write(path.join("cgroup.procs"), pid.to_string())
        .with_context(|| format!("cannot move pid {pid} to the cgroup {}", path.display()))
}

/// Pids in this cgroup and below it.
pub(crate) fn pids(path: &Path) -> Vec<u32> {
    directories(path)
        .iter()
        .flat_map(|each| {
            let text = fs::read_to_string(each.join("cgroup.procs")).unwrap_or_default();
            text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<u32>>()
        })
        .collect()
}

/// Kills what is left in the subtree and removes it.
///
/// # Errors
/// Something in it will not die within ten seconds.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while path.is_dir() {
        // Since Linux 5.14; where it fails nothing is in it or the next attempt says so.
        fs::write(path.join("cgroup.kill"), "1").ok();
        // Children first.
        for each in directories(path).iter().rev() {
            match fs::remove_dir(each) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if Instant::now() > deadline => {
                    bail!("cannot remove the cgroup {}: {error}; pids in it: {:?}", each.display(), pids(each));
                }
                Err(_busy) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }
    Ok(())
}

/// The directory and all below it, parents first.
pub(crate) fn directories(path: &Path) -> Vec<PathBuf> {
    let mut found = vec![path.to_owned()];
    let mut at = 0;
    while at < found.len() {
        if let Ok(entries) = fs::read_dir(&found[at]) {
            let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            found.extend(below.map(|entry| entry.path()).collect::<Vec<_>>());
        }
        at += 1;
    }
    found
}
