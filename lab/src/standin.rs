//! Where dockerd cannot run: containers in plain namespaces, in cgroups of ECS's shape, with Docker's API in front.
//!
//! It shows the mesh the same things in the same order as dockerd does: `create` event, cgroup, namespace file, first
//! instruction of the app, `start` event. It must not know tasks.

mod api;
mod network;
mod record;

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use self::record::{Book, Record, State};
use crate::{
    cgroup,
    engine::{ContainerSpec, Network},
    host::Host,
    image::Image,
    process::{self, Process, run},
    task::new_id,
    vpc::RESOLVER,
};

const INIT: &str = include_str!("standin/container.sh");

/// The stand-in for one host's dockerd.
#[derive(Debug)]
pub(crate) struct StandIn {
    dir: PathBuf,
    book: Mutex<Book>,
    /// Held so that they die with the host.
    processes: Mutex<BTreeMap<String, Process>>,
    images: Mutex<BTreeMap<String, PathBuf>>,
}

impl StandIn {
    /// Makes the host's bridge and answers on its Docker socket.
    pub(crate) fn up(host: &Host) -> Result<Arc<Self>> {
        let dir = host.dir().join("containers");
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        process::write_program(&dir.join("init"), INIT)?;
        network::up(host)?;
        let standin =
            Arc::new(Self { dir, book: Mutex::default(), processes: Mutex::default(), images: Mutex::default() });
        api::serve(&host.dir().join("run/docker.sock"), &standin)?;
        Ok(standin)
    }

    pub(crate) fn import(&self, image: &Image) {
        lock(&self.images).insert(image.name().to_owned(), image.root().to_owned());
    }

    pub(crate) fn start(&self, host: &Host, spec: &ContainerSpec) -> Result<String> {
        let id = new_id()? + &new_id()?;
        let root = self.unpack(&id, &spec.image)?;
        self.book().add(Record::new(&id, spec));

        // The cgroup before any process of the container.
        let group = host.cgroup().join(spec.cgroup_parent.trim_start_matches('/')).join(format!("docker-{id}.scope"));
        fs::create_dir_all(&group).with_context(|| format!("cannot make the cgroup {}", group.display()))?;
        let mut command = self.enter(host, &group, &spec.network)?;
        command.args(["unshare", "--mount", "--pid", "--uts", "--cgroup", "--fork", "--kill-child"]);
        if spec.network.is_own() {
            command.arg("--net");
        }
        command.arg("--").arg(self.dir.join("init")).arg(&root).arg(&id[..12]).args(&spec.command);
        let process = Process::start(&command, true, &self.dir.join(format!("{id}.log")))?;
        let (outer, inner) = first_process(&process)?;

        let (address, ports) = match spec.network {
            Network::Bridge => network::join(host, inner, &spec.ports)?,
            Network::None | Network::Host | Network::Of(_) => (None, Vec::new()),
        };
        let netns = format!("/run/docker/netns/{}", &id[..12]);
        if spec.network.is_own() {
            host.run(&["mkdir", "-p", "/run/docker/netns"])?;
            host.run(&["touch", &netns])?;
            host.run(&["mount", "--bind", &format!("/proc/{inner}/ns/net"), &netns])?;
        }
        lock(&self.processes).insert(id.clone(), process);
        self.book().placed(&id, outer, inner, address, ports, &netns);

        // What the first process waits for; opening it waits for the first process.
        let mut go = fs::File::options().write(true).open(root.with_extension("go")).context("cannot open the gate")?;
        go.write_all(b"go\n").context("cannot open the gate")?;
        self.book().started(&id);
        Ok(id)
    }

    pub(crate) fn stop(&self, host: &Host, id: &str, grace: Duration) -> Result<()> {
        let mut process = lock(&self.processes).remove(id).with_context(|| format!("no container {id}"))?;
        let outer = self.book().find(id)?.outer;
        self.book().event(id, "kill", &[("signal", "15")]);
        let term = nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(outer)?), Signal::SIGTERM);
        term.with_context(|| format!("cannot stop {id}"))?;
        let deadline = Instant::now() + grace;
        let status = process.wait(deadline.saturating_duration_since(Instant::now())).ok();
        process.kill();
        let code = status.and_then(|status| status.code()).unwrap_or(137);
        self.book().ended(id, code);
        let record = self.book().find(id)?;
        network::leave(host, &record);
        if record.spec.network.is_own() {
            host.run(&["umount", &record.netns])?;
            host.run(&["rm", &record.netns])?;
        }
        cgroup::remove(
            &host.cgroup().join(record.spec.cgroup_parent.trim_start_matches('/')).join(format!("docker-{id}.scope")),
        )?;
        self.book().removed(id);
        fs::remove_dir_all(self.root(id)).with_context(|| format!("cannot remove the files of {id}"))
    }

    pub(crate) fn pid(&self, id: &str) -> Result<u32> {
        Ok(self.book().find(id)?.inner)
    }

    pub(crate) fn published(&self, id: &str) -> Result<Vec<(u16, u16)>> {
        Ok(self.book().find(id)?.published)
    }

    pub(crate) fn command(&self, host: &Host, id: &str, argv: &[&str]) -> Result<Command> {
        let record = self.book().find(id)?;
        anyhow::ensure!(record.state == State::Running, "container {id} is not running");
        let group = host.cgroup().join(record.spec.cgroup_parent.trim_start_matches('/'));
        let mut command = cgroup::join(&group.join(format!("docker-{id}.scope")));
        command
            .args(["nsenter", "-t", &record.outer.to_string(), "-m", "-n", "-u", "-p", "-C", "-r", "-w", "--"])
            .args(argv);
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        Ok(command)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.book)
    }

    fn root(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// The image's files, shared by hard links but for those that differ, and the gate.
    fn unpack(&self, id: &str, image: &str) -> Result<PathBuf> {
        let from = lock(&self.images).get(image).cloned().with_context(|| format!("no image {image}"))?;
        let root = self.root(id);
        run(Command::new("cp").arg("-al").arg(from).arg(&root))?;
        for (file, text) in [
            ("resolv.conf", format!("nameserver {RESOLVER}\n")),
            ("hosts", format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {}\n", &id[..12])),
        ] {
            let path = root.join("etc").join(file);
            // Links to the image's file, where it has one.
            fs::remove_file(&path).ok();
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        run(Command::new("mkfifo").arg(root.with_extension("go")))?;
        Ok(root)
    }

    /// A command prefix that enters the host, or the network of another container of it.
    fn enter(&self, host: &Host, group: &Path, network: &Network) -> Result<Command> {
        let net = match network {
            Network::Of(other) => self.book().find(other)?.outer,
            Network::Bridge | Network::None | Network::Host => host.pid(),
        };
        let mut command = cgroup::join(group);
        command.args(["nsenter", "-t", &host.pid().to_string(), "-m", "-u", "-p", "-C"]);
        command.arg(format!("--net=/proc/{net}/ns/net")).arg("--");
        Ok(command)
    }
}

/// Pids of the container's first process, as this process and as the host sees it.
fn first_process(process: &Process) -> Result<(u32, u32)> {
    let waits = process.pid()?;
    let outer = process::only_child(waits, Duration::from_secs(5))
        .with_context(|| format!("the container did not start: {}", process.last_words()))?;
    let status =
        fs::read_to_string(format!("/proc/{outer}/status")).context("the container's first process has ended")?;
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).context("the kernel has no NSpid")?;
    // Ours, the host's, the container's own.
    let own_depth = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let own_depth =
        own_depth.lines().find_map(|line| line.strip_prefix("NSpid:").map(|pids| pids.split_whitespace().count()));
    let inner = pids.split_whitespace().nth(own_depth.unwrap_or(1)).context("the container is in no pid namespace")?;
    Ok((outer, inner.parse().context("a pid is a number")?))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
