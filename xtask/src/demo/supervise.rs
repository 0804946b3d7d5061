//! Keeps Ctrl-C, a termination and a crash from leaving anything: the play runs in a child, this process watches.
//!
//! The child and all that it starts die with it by the kernel's own hand (parent-death signals, pid namespaces), so
//! this process only removes directories afterwards, and looks. It must not know the play.

use std::{
    env,
    ffi::OsString,
    os::unix::process::CommandExt as _,
    process::{Child, Command},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use mesh_lab::Traces;
use nix::{
    sys::signal::{SigSet, Signal, killpg},
    unistd::Pid,
};

/// Plays in a child with these arguments until it ends or a signal comes; says whether all was well.
///
/// # Errors
/// The child cannot be started, or something of it is left.
pub(super) fn watch(arguments: &[OsString]) -> Result<bool> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
    // Held from here on, so none is lost between the start of the child and the wait.
    signals.thread_block().context("cannot hold signals back")?;
    let mut child = start(arguments)?;
    loop {
        let signal = signals.wait().context("cannot wait for signals")?;
        if signal != Signal::SIGCHLD {
            return stop(&mut child, signal);
        }
        if let Some(status) = child.try_wait().context("cannot wait for the demo")? {
            clean(child.id(), &Traces::of_owner(child.id())?)?;
            return Ok(status.success());
        }
    }
}

/// The child's part of it: signals reach it again.
///
/// # Errors
/// The kernel refuses.
pub(super) fn unblock_signals() -> Result<()> {
    SigSet::all().thread_unblock().context("cannot let signals through")
}

fn start(arguments: &[OsString]) -> Result<Child> {
    let this = env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(this).args(arguments);
    // A group of its own: Ctrl-C comes to this process alone, which then ends the child in order.
    command.process_group(0).spawn().context("cannot start the demo's own process; is util-linux installed?")
}

fn stop(child: &mut Child, signal: Signal) -> Result<bool> {
    println!("\n{signal}: removing everything …");
    let traces = Traces::of_owner(child.id())?;
    println!("  had {traces}");
    // The whole group: a `docker run` or `tar` that it waits for just now must not go on alone.
    let group = Pid::from_raw(i32::try_from(child.id()).context("a pid fits")?);
    killpg(group, Signal::SIGKILL).context("cannot end the demo's own processes")?;
    child.wait().context("cannot wait for the demo's own process")?;
    clean(child.id(), &traces)?;
    println!("  nothing is left");
    Ok(false)
}

fn clean(owner: u32, traces: &Traces) -> Result<()> {
    mesh_lab::sweep_of(owner)?;
    // A namespace full of processes takes the kernel a moment.
    let left = traces.left_after(Duration::from_secs(10));
    if !left.is_empty() {
        bail!("left behind: {}", left.join("; "));
    }
    Ok(())
}
