//! The preflight doctor: what this host must have before anything is attached to it, each lack with its remedy.
//!
//! Looks and asks, and changes nothing that outlives the call. `mesh-agent check` prints the findings; `run` refuses
//! to start while one of them fails. Must not know configuration files, services or certificates.

mod host;
mod kernel;
mod parse;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

pub use kernel::cgroup2_root;

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at, such as `kernel` or `port 15008/tcp`.
    pub name: String,
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do, unless all is well.
    pub remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Ok,
    /// The agent works, but something will be missed.
    Warn,
    /// The agent cannot start, or would do harm.
    Fail,
}

/// Where to look.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `None`: found in `/proc/self/mountinfo`.
    pub cgroup_root: Option<PathBuf>,
    pub pin_dir: PathBuf,
    pub docker_socket: PathBuf,
    pub ecs_agent: SocketAddr,
    /// Ports of the listeners in the tasks' namespaces; for host-mode tasks they are on the host's loopback.
    pub outbound_port: u16,
    pub dns_port: u16,
    pub tunnel_listen: SocketAddr,
    pub metrics: SocketAddr,
    /// A running agent answers here; the ports and pins that are in use are then its own.
    pub admin_socket: PathBuf,
    pub ca_bundle: Option<PathBuf>,
    pub join_token: Option<PathBuf>,
}

/// Name of the finding about the container runtime, which an agent can wait for.
pub const DOCKER: &str = "Docker";

/// Looks at everything. Takes a few seconds at most, which Docker or the ECS agent may need not to answer.
pub fn all(settings: &Settings) -> Vec<Finding> {
    let running = host::agent_runs(&settings.admin_socket);
    let mut findings = vec![
        kernel::release(),
        kernel::capabilities(),
        kernel::bpf(),
        kernel::btf(),
        kernel::cgroup2(settings.cgroup_root.as_deref()),
        kernel::bpffs(&settings.pin_dir),
        kernel::pins(&settings.pin_dir, running),
    ];
    findings.extend(host::ports(settings, running));
    findings.push(host::clock());
    findings.push(host::docker(&settings.docker_socket));
    findings.push(host::ecs_agent(settings.ecs_agent));
    let secret = |name, path: &Option<PathBuf>, rule| path.as_deref().map(|path| host::secret(name, path, rule));
    findings.extend(secret("CA bundle", &settings.ca_bundle, Verdict::Warn));
    findings.extend(secret("join token", &settings.join_token, Verdict::Fail));
    findings
}

/// Whether nothing fails.
pub fn passed(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.verdict < Verdict::Fail)
}

impl Finding {
    /// All is well.
    pub fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    /// Something will be missed.
    pub fn warn(name: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Warn, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// The agent cannot start.
    pub fn fail(name: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Fail, found: found.into(), remedy: Some(remedy.into()) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.found)?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

impl Verdict {
    /// `ok`, `warn` or `fail`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// Reads a small file of /proc or /sys; the error names it.
fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(Path::new(path)).map_err(|error| format!("cannot read {path}: {error}"))
}

#[cfg(test)]
mod tests;
