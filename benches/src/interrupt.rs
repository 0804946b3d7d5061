//! Ctrl-C and a termination leave nothing behind: the lab of this process is removed, then the signal does what it does.
//!
//! It must not know what runs in the lab.

use std::{process, thread};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal, raise};

/// To be called before any other thread is started: threads inherit what is held back, and only one may take it.
/// Programs that are started later get the signals as usual.
///
/// # Errors
/// The kernel refuses.
pub fn arm() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("cannot hold signals back")?;
    thread::spawn(move || -> Result<()> {
        let signal = signals.wait().context("cannot wait for signals")?;
        // All that was started dies with this process; directories and cgroups do not. What cannot be removed now is
        // removed by the next run.
        mesh_lab::sweep_of(process::id()).ok();
        signals.thread_unblock().context("cannot let signals through")?;
        raise(signal).context("cannot end")
    });
    Ok(())
}
