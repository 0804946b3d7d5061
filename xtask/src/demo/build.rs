//! The agent for the demo, built with the kernel object in it.
//!
//! It must not know how the object is made.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context as _, Result};

use crate::{build_ebpf, packages, process, workspace};

/// Builds the kernel object and the agent, and returns the agent's path.
///
/// # Errors
/// A build fails; what it said is on the terminal.
pub(super) fn agent(release: bool) -> Result<PathBuf> {
    packages::ensure(&[packages::CC, packages::LIBC_DEV])?;
    let begun = Instant::now();
    let (profile, folder) = if release { ("release", "release") } else { ("dev", "debug") };
    println!("Building the kernel object and the agent ({profile} profile; the first time takes minutes) …");
    build_ebpf::ensure()?;
    let mut cargo = process::cargo();
    cargo.current_dir(workspace::root());
    process::run(cargo.args(["build", "--package", "mesh-agent", "--bin", "mesh-agent", "--profile", profile]))?;
    println!("Built in {:.1} s.\n", begun.elapsed().as_secs_f32());
    let agent = workspace::target().join(folder).join("mesh-agent");
    agent.canonicalize().with_context(|| format!("the build made no {}", agent.display()))
}
