//! Namespaces that are known by processes which do not last.

use std::{
    io,
    process::{Child, Command},
};

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use super::*;

const ID: &str = "3be832415f8abf651d67cac9dbc02db376b32df6366878f23d8f5e55d32a1cb2";
const FILE: &str = "/var/run/docker/netns/3be832415f8a";

/// A folder of ours, removed with this.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// Processes in one namespace that is not ours; they are ended with this.
struct Processes(Vec<Child>);

impl Processes {
    fn start(count: usize) -> io::Result<Self> {
        let started = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let mut all = Self(Vec::new());
            for _ in 0..count {
                all.0.push(Command::new("sleep").arg("600").spawn()?);
            }
            Ok(all)
        });
        started.join().map_err(|_panicked| io::Error::other("it panicked"))?
    }

    fn end(&mut self, index: usize) {
        let child = &mut self.0[index];
        child.kill().ok();
        child.wait().ok();
    }

    fn path(&self, index: usize) -> PathBuf {
        format!("/proc/{}/ns/net", self.0[index].id()).into()
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for index in 0..self.0.len() {
            self.end(index);
        }
    }
}

fn seen(status: &str, sandbox: &str, as_of: i128) -> Seen {
    let mut answer: Value = serde_json::from_str(include_str!("../assemble/inspect.json")).unwrap();
    answer["Id"] = ID.into();
    answer["State"]["Status"] = status.into();
    answer["State"]["Running"] = (status == "running").into();
    answer["State"]["Pid"] = json!(if status == "running" { std::process::id() } else { 0 });
    answer["HostConfig"]["CgroupParent"] = "/tasks".into();
    answer["NetworkSettings"]["SandboxKey"] = sandbox.into();
    Seen::read(serde_json::from_value(answer).unwrap(), "10.0.0.1".parse().unwrap(), as_of).unwrap()
}

#[test]
fn a_namespace_is_not_lost_with_the_process_that_showed_it() {
    let mut processes = match Processes::start(2) {
        Ok(processes) => processes,
        Err(error) => {
            eprintln!("SKIPPED a_namespace_is_not_lost_with_the_process_that_showed_it: needs CAP_SYS_ADMIN ({error})");
            return;
        }
    };
    let dir = Folder(std::env::temp_dir().join(format!("ecs-mesh-known-{}", std::process::id())));
    let cgroup = dir.0.join("tasks").join(ID);
    std::fs::create_dir_all(&cgroup).unwrap();
    let members = |pid: u32| std::fs::write(cgroup.join("cgroup.procs"), format!("{pid}\n")).unwrap();
    let places =
        Places { cgroup_root: Some(dir.0.clone()), netns_dir: dir.0.join("no-files-yet"), learnt_parent: None };
    let mut known = Known::new(places, None);
    known.inspected(seen("created", "", 1));
    assert!(known.locate_cgroups());
    let netns = |known: &Known| known.tasks().first().and_then(|task| task.netns.clone());

    // The first of runc's processes shows the namespace and goes before anybody has entered it.
    members(processes.0[0].id());
    assert_eq!(known.locate_by_process(), (true, true), "found, and to be looked at again");
    assert_eq!(netns(&known), Some(processes.path(0)));
    assert_eq!(known.locate_by_process(), (false, true), "a path that still leads there stays");
    processes.end(0);
    members(processes.0[1].id());
    assert_eq!(known.locate_by_process(), (true, true));
    assert_eq!(netns(&known), Some(processes.path(1)));

    // Docker's own file lasts; nothing else is looked for after it.
    known.inspected(seen("running", FILE, 2));
    assert_eq!(netns(&known), Some(FILE.into()));
    assert_eq!(known.locate_by_process(), (false, false));
    known.inspected(seen("running", "/var/run/docker/netns/other", 3));
    assert_eq!(netns(&known), Some(FILE.into()), "a path that lasts is not given up for another");
}
