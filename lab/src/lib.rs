//! A small ECS cluster in one machine: hosts with a real dockerd each, on one network, for the demo and the tests.
//!
//! Each host is a set of namespaces (network, mount, pid, uts, cgroup) with a cgroup2 tree, a bpffs, an `/etc`, a
//! `/run` and a `/var/lib` of its own. Nothing is made outside of them but one cgroup directory and one temporary
//! directory, both named after the process that made them, so that [`sweep`] can tell whose they are.
//!
//! It knows Docker, ECS's shapes and Linux. It must not know the mesh: no port, name or file of the agent.

mod capture;
mod cgroup;
mod cluster;
mod dockerd;
mod engine;
mod host;
mod image;
pub mod load;
mod name;
mod pcap;
mod process;
mod remains;
pub mod serve;
mod standin;
mod task;
mod vpc;

pub use capture::Capture;
pub use cluster::{Cluster, preflight};
pub use host::Host;
pub use image::Image;
pub use name::{sweep, sweep_of};
pub use pcap::{Pcap, StreamKind, StreamSummary};
pub use process::{Output, Process, output, run};
pub use remains::Traces;
pub use task::{Mode, Published, Task, TaskSpec};
pub use vpc::{HOST_ADDRESSES, RESOLVER, Vpc};

/// Debian packages that the lab needs. Their services need not (and should not) run on the machine itself.
pub const PACKAGES: &[&str] = &[
    "bash",
    "bpftool",
    "busybox-static",
    "curl",
    "dnsmasq-base",
    "docker.io",
    "iproute2",
    "iptables",
    "nginx",
    "procps",
    "redis-tools",
    "tar",
    "tcpdump",
    "util-linux",
];
