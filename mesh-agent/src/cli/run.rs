//! `run`: the daemon.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};
use tokio::signal::unix::{SignalKind, signal};

use super::{check, config, notify::Notify};
use crate::{
    agent,
    sys::{
        memory,
        probe::{self, Settings, Verdict},
    },
    telemetry::{self, Telemetry},
};

/// For everything but connections, which have threads of their own: news of tasks and services, DNS, administration. Two,
/// so that a long piece of work does not hold up DNS.
const CONTROL_THREADS: usize = 2;

/// For the last access lines to be written when the agent ends.
const LAST_LINES: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration file; `mesh-agent config default` prints one.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Runs the agent until it is told to stop, by SIGTERM or SIGINT.
///
/// # Errors
/// The configuration has faults, or the agent cannot start.
pub fn run(args: Args) -> anyhow::Result<()> {
    memory::return_large_blocks();
    let_through()?;
    let config = config::load(&args.config)?;
    telemetry::init(&config.log)?;
    preflight(&check::settings(&config))?;
    let telemetry = Telemetry::new(&config.log).context("cannot start the access log")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let notify = Arc::new(Notify::from_env());
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let stop = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            notify.stopping();
        };
        let ready = {
            let notify = notify.clone();
            move || {
                tracing::info!("ready");
                notify.ready();
            }
        };
        let access = telemetry.access.clone();
        let ended = agent::run(config, telemetry, ready, stop).await;
        access.flush(LAST_LINES);
        Ok(ended?)
    })
}

/// Signals that whoever started the agent had held back: a held-back SIGTERM would never end it. To be called before there
/// are threads, which inherit what is held back (`signal(7)`).
fn let_through() -> anyhow::Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_unblock().context("cannot let SIGTERM, SIGINT and SIGHUP through")
}

/// Refuses to start on a host that cannot run the agent, before anything is attached. Docker may come later.
fn preflight(settings: &Settings) -> anyhow::Result<()> {
    let findings = probe::all(settings);
    let failed = findings.iter().filter(|finding| finding.verdict == Verdict::Fail && finding.name != probe::DOCKER);
    let lines: String = failed.map(|finding| format!("\n  {finding}")).collect();
    anyhow::ensure!(lines.is_empty(), "this host cannot run the agent (`mesh-agent check` shows everything):{lines}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_the_parent_held_back_gets_through() {
        let held = SigSet::from_iter([Signal::SIGTERM]);
        held.thread_block().unwrap();
        assert!(SigSet::thread_get_mask().unwrap().contains(Signal::SIGTERM));
        let_through().unwrap();
        assert!(!SigSet::thread_get_mask().unwrap().contains(Signal::SIGTERM));
    }
}
