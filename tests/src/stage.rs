//! A stage for kernel tests: a cgroup tree, a BPF filesystem and network namespaces that are this test's own.
//!
//! The test process plays the agent, and moves into the stage's `agent` cgroup; clients are child processes in its
//! `task` cgroup (see [`Stage::client`]). Kernel tests run one at a time, because a process has one cgroup.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::sys::{cgroup, netns::Netns};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Waits for the turn of a test whose children must not start in a stage's cgroup.
pub fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module's text.
pub struct Stage {
    cgroup: PathBuf,
    home: PathBuf,
    bpffs: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

/// A network namespace with its loopback device up, which lives as long as this.
pub struct Space {
    pub netns: Netns,
    _file: File,
}

impl Stage {
    /// Makes the stage and moves this process into it.
    ///
    /// # Errors
    /// Not root, no cgroup2, or no BPF filesystem.
    pub fn new() -> Result<Self> {
        let turn = turn();
        let root = cgroup::root()?;
        let pid = std::process::id();
        let home = cgroup::of_process(pid, &root)?;
        let cgroup = root.join(format!("mesh-test-{pid}"));
        let bpffs = std::env::temp_dir().join(format!("mesh-test-{pid}-bpf"));
        let stage = Self { cgroup, home, bpffs, _turn: turn };
        for name in ["agent", "task"] {
            fs::create_dir_all(stage.cgroup.join(name)).context("make a cgroup: root is needed")?;
        }
        enter(&stage.cgroup.join("agent"), pid)?;
        fs::create_dir_all(&stage.bpffs)?;
        nix::mount::mount(Some("bpf"), &stage.bpffs, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
            .context("mount a BPF filesystem")?;
        Ok(stage)
    }

    /// The cgroup above agent and tasks, to attach programs to.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The cgroup that this process, the agent, is in.
    pub fn agent_cgroup(&self) -> PathBuf {
        self.cgroup.join("agent")
    }

    /// Where to pin.
    pub fn pin_dir(&self) -> PathBuf {
        self.bpffs.join("mesh")
    }

    /// A new network namespace; see [`Space::new`].
    ///
    /// # Errors
    /// Not root.
    pub fn space(&self) -> Result<Space> {
        Space::new()
    }

    /// Starts this test binary again as a client in `space` and the stage's `task` cgroup (or `cgroup` below it). It
    /// runs the `#[test]` named `role`, which sees `script` in `MESH_TEST_SCRIPT`, and waits for one line on standard
    /// input before it starts: [`Client::go`].
    ///
    /// # Errors
    /// The binary cannot be started or moved.
    pub fn client(&self, space: Option<&Space>, below: Option<&str>, role: &str, script: &str) -> Result<Client> {
        let task = below.map_or(self.cgroup.join("task"), |name| self.cgroup.join("task").join(name));
        fs::create_dir_all(&task)?;
        self.start(space, &task, role, script)
    }

    /// The same outside of the stage's cgroup: no program sees it.
    ///
    /// # Errors
    /// As [`Stage::client`].
    pub fn outsider(&self, space: &Space, role: &str, script: &str) -> Result<Client> {
        self.start(Some(space), &self.home, role, script)
    }

    fn start(&self, space: Option<&Space>, cgroup: &Path, role: &str, script: &str) -> Result<Client> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", role, "--nocapture", "--test-threads=1", "--include-ignored"]);
        command.env("MESH_TEST_SCRIPT", script).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = match space {
            Some(space) => space.netns.run(|| command.spawn())??,
            None => command.spawn()?,
        };
        enter(cgroup, child.id())?;
        Ok(Client(child))
    }

    /// [`Stage::client`], started at once; returns what it said after `said: ` on its standard output.
    ///
    /// # Errors
    /// The client failed.
    pub fn ask(&self, space: &Space, role: &str, script: &str) -> Result<String> {
        self.client(Some(space), None, role, script)?.go()
    }
}

impl Space {
    /// A new network namespace with its loopback device up.
    ///
    /// # Errors
    /// Not root.
    pub fn new() -> Result<Self> {
        let made = std::thread::spawn(|| -> Result<File> {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare the network namespace")?;
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
            ensure!(up.success(), "ip link set lo up: {up}");
            Ok(File::open("/proc/thread-self/ns/net")?)
        });
        let file = made.join().expect("no panic above")?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(Self { netns: Netns::open(&path)?, _file: file })
    }
}

/// A client process that waits to be told to start.
pub struct Client(Child);

impl Client {
    /// Lets it run, and waits for its end.
    ///
    /// # Errors
    /// The client failed.
    pub fn go(mut self) -> Result<String> {
        self.0.stdin.take().context("piped above")?.write_all(b"go\n")?;
        let output = self.0.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "client failed: {text}");
        let said: Vec<_> = text.lines().filter_map(|line| line.split_once("said: ").map(|(_, said)| said)).collect();
        Ok(said.join("\n"))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let mut failures = Vec::new();
        if let Err(error) = nix::mount::umount(&self.bpffs) {
            failures.push(format!("umount {}: {error}", self.bpffs.display()));
        }
        if let Err(error) = fs::remove_dir(&self.bpffs) {
            failures.push(format!("rmdir {}: {error}", self.bpffs.display()));
        }
        if let Err(error) = enter(&self.home, std::process::id()) {
            failures.push(format!("leave the cgroup: {error}"));
        }
        remove_tree(&self.cgroup, &mut failures);
        if !failures.is_empty() && !std::thread::panicking() {
            panic!("the stage could not be cleared: {failures:?}");
        }
    }
}

fn enter(cgroup: &Path, pid: u32) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, pid.to_string()).with_context(|| format!("write {}", procs.display()))
}

/// cgroups are removed leaf first; a cgroup whose last process has just ended may be busy for a moment.
fn remove_tree(dir: &Path, failures: &mut Vec<String>) {
    let children = fs::read_dir(dir).into_iter().flatten().flatten();
    for child in children.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir())) {
        remove_tree(&child.path(), failures);
    }
    let mut result = fs::remove_dir(dir);
    for _ in 0..200 {
        if !result.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::ResourceBusy) {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
        result = fs::remove_dir(dir);
    }
    if let Err(error) = result {
        failures.push(format!("rmdir {}: {error}", dir.display()));
    }
}
