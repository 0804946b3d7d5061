//! `cleanup`: removes what an agent that was killed left in the kernel, when no agent is to follow it.
//!
//! Must not know what is pinned; `sys::bpf` does.

use std::{os::unix::net::UnixStream, path::PathBuf};

use super::{Out, Outcome, config};
use crate::sys::bpf::Pins;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration file of the agent that left something; without it the default places are looked at.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Detaches the programs and frees the maps. [`Outcome::Bad`] while an agent runs: that one needs them.
///
/// # Errors
/// The configuration has faults, or a pin cannot be removed.
pub fn run(args: &Args, out: &mut Out) -> anyhow::Result<Outcome> {
    let config = match &args.config {
        Some(file) => config::load(file)?,
        None => config::defaults()?,
    };
    if UnixStream::connect(&config.admin.socket).is_ok() {
        out.line("an agent is running; stop it, and it removes everything itself")?;
        return Ok(Outcome::Bad);
    }
    Pins::new(config.kernel.pin_dir.clone()).remove()?;
    out.line(format!("nothing is left below {}", config.kernel.pin_dir.display()))?;
    Ok(Outcome::Good)
}
