//! Where a container's namespace and cgroup are in the file system, found before docker says so.
//!
//! Docker answers no inspect between "start" and the app's first instruction, so waiting for it would be too late.
//! But runc's init already sits in the container's cgroup and namespace, a tenth of a second before it becomes the
//! app. Knows paths, pids and namespaces; must not know tasks.

use std::{
    fs, io,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};

use crate::sys::netns::{Netns, NetnsError};

/// Where to look.
#[derive(Clone, Debug)]
pub struct Places {
    /// Mount point of the cgroup2 hierarchy; `None`: there is none, and no cgroup is ever found.
    pub cgroup_root: Option<PathBuf>,
    /// Where docker keeps the files that `SandboxKey` names.
    pub netns_dir: PathBuf,
    /// Where containers without a parent of their own turned out to be.
    pub learnt_parent: Option<PathBuf>,
}

impl Places {
    /// Directories in which the cgroup of a container with this parent (`HostConfig.CgroupParent`) may appear.
    pub fn parents(&self, cgroup_parent: &str) -> Vec<PathBuf> {
        let Some(root) = &self.cgroup_root else { return Vec::new() };
        let given = cgroup_parent.trim_matches('/');
        if given.is_empty() {
            // cgroupfs and systemd drivers, in their defaults.
            let defaults = [root.join("system.slice"), root.join("docker")];
            return self.learnt_parent.iter().cloned().chain(defaults).collect();
        }
        let mut parents = vec![root.join(given)];
        if !given.contains('/') && given.ends_with(".slice") {
            parents.push(root.join(nested(given)));
        }
        parents
    }

    /// The container's cgroup, if it exists.
    pub fn cgroup(&self, cgroup_parent: &str, id: &str) -> Option<PathBuf> {
        self.parents(cgroup_parent)
            .into_iter()
            .flat_map(|parent| [parent.join(format!("docker-{id}.scope")), parent.join(id)])
            .find(|path| path.is_dir())
    }

    /// The cgroup of the container with this id, in or below which the process is. `None` where the cgroup2 hierarchy
    /// does not tell containers apart: with a v1 driver their processes stay where dockerd runs, or in the root, and who
    /// took that for the container's would take the whole host for it.
    pub fn cgroup_of(&self, pid: u32, id: &str) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        let path = self.cgroup_root.as_ref()?.join(of_container(path, id)?);
        path.is_dir().then_some(path)
    }

    /// The namespace of the container in `cgroup`: one that a process of it is in and that is not ours. Its path is
    /// docker's where that is there already, else the process's.
    pub fn netns(&self, cgroup: &Path) -> Option<PathBuf> {
        let own = inode(Path::new("/proc/self/ns/net")).ok()?;
        // The last process is runc's init, which becomes the app; those before it are on their way out.
        let procs = fs::read_to_string(cgroup.join("cgroup.procs")).ok()?;
        let (pid, of) = procs.lines().rev().find_map(|line| {
            let pid = line.parse::<u32>().ok().filter(|pid| *pid != 0)?;
            let of = inode(&of_pid(pid)).ok()?;
            (of != own).then_some((pid, of))
        })?;
        Some(self.docker_file(of).unwrap_or_else(|| of_pid(pid)))
    }

    /// Docker's file for the namespace with this inode.
    fn docker_file(&self, of: (u64, u64)) -> Option<PathBuf> {
        fs::read_dir(&self.netns_dir)
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| inode(path).is_ok_and(|found| found == of))
    }
}

/// The part of a cgroup's path, without the leading slash, that ends with the container's own: it may have made others
/// below.
fn of_container<'a>(path: &'a str, id: &str) -> Option<&'a Path> {
    let own = |path: &&Path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.contains(id));
    Path::new(path.trim_start_matches('/')).ancestors().filter(own).last()
}

/// The container that a process is in, by the 64 hex digits that docker's cgroups bear. Works with any driver, any
/// parent and cgroup v1.
pub fn container_of(cgroup_file: &str) -> Option<&str> {
    cgroup_file.lines().rev().find_map(|line| {
        let name = line.rsplit('/').next()?;
        let name = name.strip_prefix("docker-").unwrap_or(name);
        let name = name.strip_suffix(".scope").unwrap_or(name);
        (name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())).then_some(name)
    })
}

/// The container that the agent itself runs in, where it does.
pub fn own_container() -> Option<String> {
    container_of(&fs::read_to_string("/proc/self/cgroup").ok()?).map(str::to_owned)
}

/// The container whose processes are in the namespace that docker's `file` names, and one of them. `None` also while
/// docker has made the file but not yet mounted the namespace on it.
pub fn occupant(file: &Path) -> Option<(String, u32)> {
    let of = inode(file).ok()?;
    let (dir, own) = (inode(file.parent()?).ok()?, inode(Path::new("/proc/self/ns/net")).ok()?);
    if !is_containers(of, dir, own) {
        return None;
    }
    let mut pids: Vec<u32> =
        fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // The newest first: that is whom we look for.
    pids.sort_unstable_by(|a, b| b.cmp(a));
    let pid = pids.into_iter().find(|pid| inode(&of_pid(*pid)).is_ok_and(|found| found == of))?;
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    Some((container_of(&cgroups)?.to_owned(), pid))
}

/// Whether a file, in docker's directory `dir`, is a container's namespace. Before docker has mounted one on it, it is an
/// ordinary file like the directory; and docker has a file for the host's own namespace too, in which runc still is
/// while it prepares a container's.
fn is_containers(file: (u64, u64), dir: (u64, u64), own: (u64, u64)) -> bool {
    file.0 != dir.0 && file != own
}

/// The first address in the namespace that others can call: IPv4 before IPv6.
///
/// # Errors
/// The namespace is gone or may not be entered.
pub fn address(netns: &Path) -> Result<Option<IpAddr>, NetnsError> {
    let addresses = Netns::open(netns)?.run(|| match getifaddrs() {
        Ok(interfaces) => interfaces
            .filter(|interface| !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK))
            .filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|found| IpAddr::V4(found.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|found| IpAddr::V6(found.ip())))
            })
            .collect::<Vec<_>>(),
        Err(_) => Vec::new(),
    })?;
    let callable: Vec<IpAddr> = addresses.into_iter().filter(is_callable).collect();
    Ok(callable.iter().find(|address| address.is_ipv4()).or_else(|| callable.first()).copied())
}

/// Link-local is also what links the host with awsvpc tasks (169.254.172.0/22, amazon-ecs-agent).
fn is_callable(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !(v4.is_link_local() || v4.is_loopback() || v4.is_unspecified()),
        IpAddr::V6(v6) => !(v6.is_unicast_link_local() || v6.is_loopback() || v6.is_unspecified()),
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Whether the path to a namespace goes by a process, and ends with it.
pub fn is_passing(netns: &Path) -> bool {
    netns.starts_with("/proc")
}

fn of_pid(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn nested(slice: &str) -> PathBuf {
    let name = slice.trim_end_matches(".slice");
    let mut path = PathBuf::new();
    for (at, _) in name.match_indices('-') {
        path.push(format!("{}.slice", &name[..at]));
    }
    path.push(slice);
    path
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    const ID: &str = "3be832415f8abf651d67cac9dbc02db376b32df6366878f23d8f5e55d32a1cb2";

    #[test]
    fn a_container_is_known_by_its_cgroup() {
        let check = |file: &str, wanted: Option<&str>| assert_eq!(container_of(file), wanted, "{file}");
        check(&format!("0::/ecstasks.slice/ecstasks-1.slice/docker-{ID}.scope\n"), Some(ID));
        check(&format!("0::/docker/{ID}\n"), Some(ID));
        check(&format!("12:cpu:/ecs/1/{ID}\n1:name=systemd:/ecs/1/{ID}\n0::/\n"), Some(ID));
        check("0::/system.slice/docker.service\n", None);
        check("0::/system.slice/docker-3be832415f8a.scope\n", None);
        check("", None);
    }

    #[test]
    fn only_a_cgroup_of_its_own_is_the_containers() {
        let check =
            |path: &str, wanted: Option<&str>| assert_eq!(of_container(path, ID), wanted.map(Path::new), "{path}");
        let scope = format!("ecstasks.slice/docker-{ID}.scope");
        check(&format!("/{scope}"), Some(&scope));
        check(&format!("/{scope}/init/worker"), Some(&scope));
        check(&format!("/ecs/1/{ID}"), Some(&format!("ecs/1/{ID}")));
        check("/", None);
        check("/system.slice/containerd.service", None);
    }

    #[test]
    fn parents_follow_the_driver_that_may_be_in_use() {
        let mut places =
            Places { cgroup_root: Some("/cg".into()), netns_dir: "/run/docker/netns".into(), learnt_parent: None };
        let task = "ecstasks-0123456789abcdef.slice";
        assert_eq!(places.parents(&format!("/ecstasks.slice/{task}")), [Path::new("/cg/ecstasks.slice").join(task)]);
        assert!(places.parents(task).contains(&Path::new("/cg/ecstasks.slice").join(task)));
        assert_eq!(places.parents("/ecs/1"), [PathBuf::from("/cg/ecs/1")]);
        assert_eq!(places.parents(""), [PathBuf::from("/cg/system.slice"), PathBuf::from("/cg/docker")]);
        places.learnt_parent = Some("/cg/elsewhere".into());
        assert_eq!(places.parents("")[0], PathBuf::from("/cg/elsewhere"));
        places.cgroup_root = None;
        assert!(places.parents("").is_empty() && places.cgroup("", ID).is_none());
    }

    #[test]
    fn neither_an_unmounted_file_nor_the_hosts_own_is_a_containers() {
        let (dir, nsfs) = ((25, 7), 4);
        assert!(is_containers((nsfs, 100), dir, (nsfs, 99)));
        assert!(!is_containers((nsfs, 99), dir, (nsfs, 99)), "docker's `default`");
        assert!(!is_containers((25, 8), dir, (nsfs, 99)), "not mounted yet");
    }

    #[test]
    fn addresses_that_nobody_can_call_are_passed_over() {
        let check = |text: &str, wanted: bool| assert_eq!(is_callable(&text.parse().unwrap()), wanted, "{text}");
        check("10.0.5.7", true);
        check("169.254.172.2", false);
        check("169.254.170.2", false);
        check("127.0.0.1", false);
        check("2600:1f18::7", true);
        check("fe80::1", false);
        check("::1", false);
    }

    #[test]
    fn a_namespace_without_an_interface_has_no_address() {
        let alone = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map(|()| address(Path::new("/proc/thread-self/ns/net")))
        });
        match alone.join().unwrap() {
            Ok(address) => assert_eq!(address.unwrap(), None),
            Err(error) => {
                eprintln!("SKIPPED a_namespace_without_an_interface_has_no_address: needs CAP_SYS_ADMIN ({error})");
            }
        }
    }
}
