//! Commands: run one to its end, or keep one running that dies with us.
//!
//! Long-lived commands are started by one thread that lives as long as the process, with a parent-death signal, so
//! that even `kill -9` of the lab's owner ends them. It must not know what the commands are for.

use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// What a finished command left.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    #[must_use]
    pub fn ok(&self) -> bool {
        self.code == Some(0)
    }
}

/// Runs a command to its end and returns what it said, whatever its exit code.
///
/// # Errors
/// The program cannot be started.
pub fn output(command: &mut Command) -> Result<Output> {
    complete_path(command);
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`; is the package that holds it installed?", line(command)))?;
    Ok(Output {
        code: done.status.code(),
        stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
    })
}

/// Runs a command to its end and returns its standard output without the last newline.
///
/// # Errors
/// The program cannot be started, or ends with another code than 0: the error holds its last words.
pub fn run(command: &mut Command) -> Result<String> {
    let done = output(command)?;
    if !done.ok() {
        let said = if done.stderr.trim().is_empty() { &done.stdout } else { &done.stderr };
        bail!("`{}` ended with {:?}: {}", line(command), done.code, said.trim());
    }
    Ok(done.stdout.trim_end_matches('\n').to_owned())
}

/// Adds the administrators' folders to the search path, which a root shell made by `su` lacks.
fn complete_path(command: &mut Command) {
    if command.get_envs().all(|(key, _)| key != "PATH") {
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"));
    }
}

fn line(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    if text.len() > 400 {
        text = format!("{}…", text.chars().take(400).collect::<String>());
    }
    text
}

/// A running command. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Whether the child is an `nsenter` or `unshare` that waits for the command proper.
    wrapped: bool,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts a command in a process group of its own with both outputs in `log` (appended).
    ///
    /// `wrapped` says that the command forks once and waits, as `nsenter --pid` and `unshare --fork` do; then
    /// [`Process::pid`] is the child's.
    pub(crate) fn start(command: &Command, wrapped: bool, log: &Path) -> Result<Self> {
        let open = || File::options().create(true).append(true).open(log);
        let out = open().with_context(|| format!("cannot write the log {}", log.display()))?;
        let err = open().with_context(|| format!("cannot write the log {}", log.display()))?;
        let mut tied = Command::new("setpriv");
        tied.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            if let Some(value) = value {
                tied.env(key, value);
            }
        }
        complete_path(&mut tied);
        tied.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let name = line(command);
        let child = keeper_spawn(tied).with_context(|| format!("cannot start `{name}`"))?;
        Ok(Self { child, wrapped, name, log: log.to_owned() })
    }

    /// The command's pid as this process sees it.
    ///
    /// # Errors
    /// The command has ended.
    pub fn pid(&self) -> Result<u32> {
        let own = self.child.id();
        if !self.wrapped {
            return Ok(own);
        }
        only_child(own, Duration::from_secs(5))
            .with_context(|| format!("`{}` has ended: {}", self.name, self.last_words()))
    }

    /// Pid of the outermost process, the one that this process is the parent of.
    #[must_use]
    pub fn outer_pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the command itself.
    ///
    /// # Errors
    /// The command has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid()?;
        kill(as_pid(pid), signal).with_context(|| format!("cannot send {signal} to `{}` (pid {pid})", self.name))
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for a child")? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("`{}` did not end within {limit:?}: {}", self.name, self.last_words());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills the command and whatever waits for it, and reaps it.
    pub fn kill(&mut self) {
        if self.wrapped && self.is_alive() {
            let own = self.child.id();
            for pid in std::fs::read_to_string(format!("/proc/{own}/task/{own}/children"))
                .unwrap_or_default()
                .split_whitespace()
                .filter_map(|word| word.parse().ok())
            {
                // It may have ended by itself just now.
                kill(as_pid(pid), Signal::SIGKILL).ok();
            }
            // The waiting parent ends once the last process of the namespace has.
            self.wait(Duration::from_secs(10)).ok();
        }
        // Both fail only when it has been reaped already.
        self.child.kill().ok();
        self.child.wait().ok();
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its log, for error messages.
    #[must_use]
    pub fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The first child of a process, once it has one.
pub(crate) fn only_child(parent: u32, limit: Duration) -> Result<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let deadline = Instant::now() + limit;
    loop {
        let children = std::fs::read_to_string(&path).unwrap_or_default();
        if let Some(first) = children.split_whitespace().next() {
            return first.parse().with_context(|| format!("{path} holds {children:?}"));
        }
        if Instant::now() > deadline || !Path::new(&path).exists() {
            bail!("pid {parent} has no child");
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX))
}

type Order = (Command, mpsc::SyncSender<io::Result<Child>>);

/// A parent-death signal comes when the *thread* that made the child ends, so one thread that never ends makes all.
fn keeper_spawn(command: Command) -> io::Result<Child> {
    static KEEPER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (sender, orders) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in orders {
                // The asker waits for the answer, so it is there.
                answer.send(command.spawn()).ok();
            }
        });
        sender
    });
    let (answer, child) = mpsc::sync_channel(1);
    let gone = || io::Error::other("the thread that starts processes has ended");
    keeper.send((command, answer)).map_err(|_closed| gone())?;
    child.recv().map_err(|_closed| gone())?
}

/// Writes a file that may be executed.
pub(crate) fn write_program(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o755)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}
