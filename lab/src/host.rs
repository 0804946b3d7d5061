//! One host: its namespaces, and commands inside them.
//!
//! It must not know Docker (`dockerd.rs`) or tasks (`task.rs`).

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cgroup,
    engine::Engine,
    name::Claim,
    process::{self, Output, Process, output, run},
    vpc::{RESOLVER, Vpc},
};

const INIT: &str = include_str!("init.sh");
/// Directories of a search path that no machine lacks; the first is the host's own.
const PATH: &str = "/run/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A host of the cluster.
#[derive(Debug)]
pub struct Host {
    name: String,
    address: Ipv4Addr,
    dir: PathBuf,
    cgroup: PathBuf,
    vpc: Arc<Vpc>,
    init: Process,
    pid: u32,
    pub(crate) engine: Engine,
}

impl Host {
    /// Makes the namespaces and the directories. Docker is not started.
    pub(crate) fn up(claim: &Claim, vpc: &Arc<Vpc>, name: &str, address: Ipv4Addr) -> Result<Self> {
        let (dir, cgroup) = (claim.dir.join(name), claim.cgroup.join(name));
        cgroup::create(&cgroup)?;
        for part in ["etc", "var-lib", "run/lab/bin", "docker-config"] {
            fs::create_dir_all(dir.join(part)).with_context(|| format!("cannot make {part} of host {name}"))?;
        }
        let hostname = format!("ip-{}", address.to_string().replace('.', "-"));
        write_etc(&dir.join("etc"), &hostname)?;
        let script = dir.join("init.sh");
        process::write_program(&script, INIT)?;
        let mut start = cgroup::join(&cgroup);
        start.args(["unshare", "--net", "--mount", "--pid", "--uts", "--cgroup", "--fork", "--kill-child", "--"]);
        start.arg(&script).arg(&dir).arg(&hostname);
        let mut init = Process::start(&start, true, &dir.join("init.log"))?;
        let pid = init.pid()?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !dir.join("run/lab.ready").exists() {
            if !init.is_alive() || Instant::now() > deadline {
                bail!("host {name} did not come up: {}", init.last_words());
            }
            thread::sleep(Duration::from_millis(2));
        }
        // The waiting parent sits in the host's root cgroup; a cgroup with processes cannot have controllers below it.
        cgroup::adopt(&cgroup.join("system.slice"), init.outer_pid())?;
        let host =
            Self { name: name.to_owned(), address, dir, cgroup, vpc: Arc::clone(vpc), init, pid, engine: Engine::None };
        host.plug(&address.to_string())?;
        Ok(host)
    }

    fn plug(&self, address: &str) -> Result<()> {
        let (length, gateway) = Vpc::subnet();
        self.vpc.plug(&format!("host-{}", self.name), self.pid, "eth0")?;
        for line in [
            "ip link set lo up".to_owned(),
            format!("ip addr add {address}/{length} dev eth0"),
            "ip link set eth0 up".to_owned(),
            format!("ip route add default via {gateway}"),
        ] {
            self.run(&line.split(' ').collect::<Vec<_>>())?;
        }
        Ok(())
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host's address on the network.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Pid of the host's first process, as this process sees it. Killing it ends the host as a power cut does.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The host's directory on the machine; `etc`, `run` and `var-lib` below it are the host's `/etc`, `/run`, `/var/lib`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The host's cgroup as the machine sees it; inside, it is `/sys/fs/cgroup`.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub(crate) fn vpc(&self) -> &Arc<Vpc> {
        &self.vpc
    }

    /// A command that runs in all of the host's namespaces and in its cgroup.
    #[must_use]
    pub fn command(&self, argv: &[&str]) -> Command {
        let mut command = cgroup::join(&self.cgroup.join("system.slice"));
        command.args(["nsenter", "-t", &self.pid.to_string(), "-m", "-n", "-u", "-p", "-C", "--"]).args(argv);
        command.env("PATH", PATH);
        command
    }

    /// Runs a command on the host to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        output(&mut self.command(argv))
    }

    /// Runs a command on the host that must succeed, and returns its standard output.
    ///
    /// # Errors
    /// It ends with another code than 0.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        run(&mut self.command(argv)).with_context(|| format!("on host {}", self.name))
    }

    /// Starts a command on the host; its output goes to `<name>.log` in the host's directory.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, name: &str, argv: &[&str]) -> Result<Process> {
        Process::start(&self.command(argv), true, &self.dir.join(format!("{name}.log")))
    }

    /// Copies a program to the host's own search path.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn install(&self, program: &Path, name: &str) -> Result<()> {
        let to = self.dir.join("run/lab/bin").join(name);
        fs::copy(program, &to)
            .map(drop)
            .with_context(|| format!("cannot copy {} to host {}", program.display(), self.name))
    }

    /// Writes a file under the host's `/etc`, and the folders above it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_etc(&self, path: &str, text: &str) -> Result<()> {
        let to = self.dir.join("etc").join(path);
        let folder = to.parent().context("a path below /etc has a parent")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        // In one step, because a program may be watching it.
        let draft = to.with_extension("draft");
        fs::write(&draft, text).with_context(|| format!("cannot write {}", draft.display()))?;
        fs::rename(&draft, &to).with_context(|| format!("cannot write {}", to.display()))
    }

    /// Ends the host at once, as a terminated instance does.
    pub fn terminate(&mut self) {
        self.init.kill();
        self.engine = Engine::None;
    }
}

/// The host's `/etc`: the machine's, but with a resolver and a hosts file that know nothing of the machine.
fn write_etc(etc: &Path, hostname: &str) -> Result<()> {
    run(Command::new("cp").args(["-a", "/etc/."]).arg(etc)).context("cannot copy /etc")?;
    // The machine's docker and container settings are not the host's.
    for (name, text) in [
        ("resolv.conf", format!("nameserver {RESOLVER}\n")),
        ("hosts", format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {hostname}\n")),
        ("hostname", format!("{hostname}\n")),
        ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n".to_owned()),
    ] {
        let path = etc.join(name);
        // It may be a link that leads out of the copy.
        fs::remove_file(&path).ok();
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    for folder in ["docker", "containerd"] {
        fs::remove_dir_all(etc.join(folder)).ok();
    }
    Ok(())
}
