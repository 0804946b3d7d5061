//! The cgroup2 hierarchy: where it is mounted, and the number that BPF knows a cgroup by.
//!
//! Knows nothing of ECS's or docker's naming.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Something about cgroups failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(
        "no cgroup2 hierarchy is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`) or boot with \
         systemd.unified_cgroup_hierarchy=1"
    )]
    NotMounted,
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} has no cgroup2 line (`0::`): the kernel runs without cgroup2")]
    NoLine { path: PathBuf },
}

/// The mount point of the cgroup2 hierarchy; of several the one whose root lies highest, and of those the first.
///
/// # Errors
/// /proc is not readable, or there is no cgroup2 mount.
pub fn root() -> Result<PathBuf, CgroupError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(|source| CgroupError::Read { path: path.into(), source })?;
    highest(&text).ok_or(CgroupError::NotMounted)
}

/// See proc_pid_mountinfo(5): the fourth field is the root within the filesystem, the fifth the mount point.
fn highest(mountinfo: &str) -> Option<PathBuf> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        filesystem.starts_with("cgroup2 ").then(|| (root.len(), PathBuf::from(point)))
    });
    mounts.min_by_key(|(length, _)| *length).map(|(_, point)| point)
}

/// The number that `bpf_get_current_cgroup_id` gives for processes of the cgroup at `path`: the directory's inode.
///
/// # Errors
/// The cgroup does not exist (any more).
pub fn id(path: &Path) -> Result<u64, CgroupError> {
    let meta = fs::metadata(path).map_err(|source| CgroupError::Read { path: path.into(), source })?;
    Ok(meta.ino())
}

/// The cgroup that a process is in, as a path below `root`. `pid` of the caller's own pid namespace.
///
/// # Errors
/// The process is gone, or has no cgroup2 line.
pub fn of_process(pid: u32, root: &Path) -> Result<PathBuf, CgroupError> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(|source| CgroupError::Read { path: path.clone(), source })?;
    let line = text.lines().find_map(|line| line.strip_prefix("0::"));
    let below = line.ok_or(CgroupError::NoLine { path })?;
    Ok(root.join(below.trim_start_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_mounts_the_highest_wins() {
        let text = "30 23 0:26 /kubepods /mnt/part rw - cgroup2 cgroup2 rw\n\
                    31 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n\
                    32 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert_eq!(highest(text), Some("/sys/fs/cgroup".into()));
        assert_eq!(highest("32 23 0:27 / /sys rw - sysfs sysfs rw\nnonsense\n"), None);
    }
}
