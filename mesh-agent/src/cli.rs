//! The command line: subcommands, exit codes, and the one place that writes to standard output.
//!
//! Exit codes: 0 all is well, 1 a check failed or the mesh refuses, 2 wrong usage or configuration. Must not know the
//! agent's insides: it reads the admin socket, like anybody else; only `run` starts an agent.

pub mod ca;
pub mod check;
pub mod cleanup;
pub mod client;
pub mod config;
pub mod explain;
pub mod notify;
pub mod run;
pub mod services;
pub mod status;
mod table;

use std::{
    ffi::OsString,
    fmt::Display,
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use serde::Serialize;

/// Figures of a debug build say nothing about a release, so it says which it is.
const VERSION: &str = if cfg!(debug_assertions) {
    concat!(env!("CARGO_PKG_VERSION"), " (debug build)")
} else {
    concat!(env!("CARGO_PKG_VERSION"), " (release build)")
};

/// A service mesh that lives in the host, for Amazon ECS on EC2.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version = VERSION, subcommand_required = true, arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this host.
    Run(run::Args),
    /// Look whether this host can run the agent; every failure comes with its remedy.
    Check(check::Args),
    /// Show how the running agent is.
    Status(status::Args),
    /// List services, their addresses and endpoints.
    Services(services::Args),
    /// Say what would happen to a connection now, and why.
    Explain(explain::Args),
    /// Remove what an agent that is gone left in the kernel.
    Cleanup(cleanup::Args),
    /// Make and look at the built-in certificate authority.
    Ca(ca::Args),
    /// Print or check configuration files.
    Config(config::Args),
}

/// How a command ended that could do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Exit code 0.
    Good,
    /// Exit code 1: what was asked about is not well.
    Bad,
}

/// The command line or a configuration file is wrong: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Wrong(pub String);

/// Standard output. Everything that a command prints goes through here.
#[derive(Debug)]
pub struct Out {
    /// Not locked: the access log of `run` writes there too.
    stdout: io::Stdout,
}

/// Where the admin socket is.
#[derive(Debug, clap::Args)]
pub struct Socket {
    /// Admin socket of the agent.
    #[arg(long, value_name = "PATH", default_value = "/run/ecs-mesh/admin.sock")]
    socket: PathBuf,
}

/// Runs the command line, prints errors with their causes, and tells the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        // Also help and version, which clap prints and for which it wants 0.
        Err(error) => {
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            // Where nothing can be printed any more, nothing can be said about it either.
            return if error.print().is_ok() { code.into() } else { ExitCode::SUCCESS };
        }
    };
    let mut out = Out { stdout: io::stdout() };
    let done = match args.command {
        Command::Run(args) => run::run(args).map(|()| Outcome::Good),
        Command::Check(args) => check::run(&args, &mut out),
        Command::Status(args) => status::run(&args, &mut out),
        Command::Services(args) => services::run(&args, &mut out),
        Command::Explain(args) => explain::run(&args, &mut out),
        Command::Cleanup(args) => cleanup::run(&args, &mut out),
        Command::Ca(args) => ca::run(args).map(|()| Outcome::Good),
        Command::Config(args) => config::run(&args, &mut out),
    };
    match done.and_then(|outcome| out.stdout.flush().map(|()| outcome).map_err(Into::into)) {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Bad) => ExitCode::from(1),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let code = if error.is::<Wrong>() { 2 } else { 1 };
            // Nobody listens: the exit code has to do.
            drop(writeln!(io::stderr().lock(), "mesh-agent: {error:#}"));
            ExitCode::from(code)
        }
    }
}

impl Out {
    /// Writes one line, or a text of several.
    ///
    /// # Errors
    /// Standard output takes no more; a broken pipe is a reader that has seen enough.
    pub fn line(&mut self, text: impl Display) -> anyhow::Result<()> {
        Ok(writeln!(self.stdout, "{text}")?)
    }

    /// Writes a text as it is.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub fn raw(&mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.stdout.write_all(text.as_bytes())?)
    }

    /// Writes a document as JSON.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub fn json(&mut self, document: &impl Serialize) -> anyhow::Result<()> {
        self.line(serde_json::to_string_pretty(document)?)
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn wrong_usage_is_2_and_help_is_0() {
        let code = |args: &[&str]| {
            let args = std::iter::once("mesh-agent").chain(args.iter().copied());
            Args::try_parse_from(args).map(drop).map_err(|error| error.exit_code())
        };
        assert_eq!(code(&["status"]), Ok(()));
        assert_eq!(code(&["explain", "--from", "web", "world:80"]), Ok(()));
        assert_eq!(code(&["--help"]), Err(0));
        assert_eq!(code(&["status", "--nonsense"]), Err(2));
        assert_eq!(code(&["explain", "world"]), Err(2));
        assert_eq!(code(&["run"]), Err(2));
    }

    #[test]
    fn a_broken_pipe_is_found_below_other_causes() {
        let error = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)).context("printing");
        assert!(is_broken_pipe(&error));
        assert!(!is_broken_pipe(&anyhow::anyhow!("other")));
    }
}
