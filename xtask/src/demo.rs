//! `cargo xtask demo`: two ECS hosts in this machine, real containers, and the mesh between them, with proof.
//!
//! `demo/supervise.rs` keeps Ctrl-C from leaving anything; `demo/play.rs` is the play, step by step. It must not know
//! how hosts are made (`mesh-lab`) or what the agent does inside: it is a user with a terminal.

mod agents;
mod build;
mod clients;
mod faults;
mod plain;
mod play;
mod proof;
mod show;
mod supervise;
mod tasks;

use std::{ffi::OsString, path::PathBuf};

use anyhow::Result;

use crate::packages;

/// What the hosts, their containers and the proof are made of; Docker is wanted besides, but can be done without.
const NEEDS: [packages::Need; 9] = [
    packages::BPFTOOL,
    packages::BUSYBOX,
    packages::CURL,
    packages::DNSMASQ,
    packages::IP,
    packages::IPTABLES,
    packages::NGINX,
    packages::REDIS_CLI,
    packages::TCPDUMP,
];

/// Arguments of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Use this agent instead of building one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Build the agent with optimisation (takes minutes the first time)
    #[arg(long)]
    release: bool,
    /// Stop after a part: the hosts and tasks, the proof without a mesh, or the mesh without faults
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Run the tasks in plain namespaces, as where dockerd cannot run
    #[arg(long)]
    no_docker: bool,
    /// Keep the hosts at the end, or where a step failed, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Set by the demo itself: play, watched by another process
    #[arg(long, hide = true)]
    on_stage: bool,
}

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Part {
    Lab,
    Off,
    Mesh,
    All,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Lab => "lab",
            Self::Off => "off",
            Self::Mesh => "mesh",
            Self::All => "all",
        }
    }
}

/// Runs the demo. `false`: something was not as promised, which was said, or Ctrl-C came; everything is removed.
///
/// # Errors
/// The machine cannot be set up, a build fails, or something is left behind.
pub fn run(args: Args) -> Result<bool> {
    let part = args.only.unwrap_or(Part::All);
    if args.on_stage {
        supervise::unblock_signals()?;
        return play::play(args.agent.as_deref(), part, args.no_docker, args.keep);
    }
    packages::ensure(&NEEDS)?;
    if !args.no_docker
        && let Err(error) = packages::ensure(&[packages::DOCKER])
    {
        println!("Docker cannot be installed: {error:#}");
    }
    mesh_lab::preflight()?;
    let agent = match (&args.agent, part) {
        (Some(agent), _) => Some(agent.canonicalize()?),
        (None, Part::Lab | Part::Off) => None,
        (None, Part::Mesh | Part::All) => Some(build::agent(args.release)?),
    };
    let mut arguments: Vec<OsString> = vec!["demo".into(), "--on-stage".into(), "--only".into(), part.name().into()];
    if let Some(agent) = agent {
        arguments.extend(["--agent".into(), agent.into_os_string()]);
    }
    arguments.extend(args.no_docker.then(|| "--no-docker".into()));
    arguments.extend(args.keep.then(|| "--keep".into()));
    supervise::watch(&arguments)
}
