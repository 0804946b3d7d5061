//! Reads configuration files: `config default`, `config check`, and the reading for `run` and `check`.
//!
//! Must not know what is done with a configuration.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use mesh_core::config::{self, Config, Fault};

use super::{Out, Outcome, Wrong};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print a configuration file with every key, its default and its meaning.
    Default,
    /// Check a configuration file and name every fault.
    Check {
        /// The file.
        file: PathBuf,
    },
}

/// Runs `config …`.
///
/// # Errors
/// The file cannot be read, or has faults.
pub fn run(args: &Args, out: &mut Out) -> anyhow::Result<Outcome> {
    match &args.command {
        Command::Default => out.raw(&config::example())?,
        Command::Check { file } => {
            load(file)?;
            out.line(format_args!("{}: no faults", file.display()))?;
        }
    }
    Ok(Outcome::Good)
}

/// Reads and checks a configuration file.
///
/// # Errors
/// It cannot be read, or has faults; the text names all of them.
pub fn load(file: &Path) -> Result<Config, Wrong> {
    let text = fs::read_to_string(file).map_err(|error| {
        Wrong(format!("cannot read {}: {error}; `mesh-agent config default` prints one to start from", file.display()))
    })?;
    config::parse(&text).map_err(|faults| Wrong(describe(file, &faults)))
}

/// What holds where nobody says otherwise.
///
/// # Errors
/// The built-in example has faults.
pub fn defaults() -> Result<Config, Wrong> {
    let example = config::example();
    config::parse(&example).map_err(|faults| Wrong(describe(Path::new("the built-in example"), &faults)))
}

/// All faults of a file, one per line.
pub(super) fn describe(file: &Path, faults: &[Fault]) -> String {
    let lines: String = faults.iter().map(|fault| format!("\n  {fault}")).collect();
    let count = match faults.len() {
        1 => "one fault".to_owned(),
        more => format!("{more} faults"),
    };
    format!("{} has {count}:{lines}", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_named() {
        let fault = |path: &str| Fault { path: path.into(), problem: "is wrong".into(), remedy: "mend it".into() };
        let text = describe(Path::new("a.toml"), &[fault("dns.ttl"), fault("vip.v4")]);
        assert_eq!(text, "a.toml has 2 faults:\n  dns.ttl: is wrong; mend it\n  vip.v4: is wrong; mend it");
    }

    #[test]
    fn a_missing_file_has_a_remedy() {
        let error = load(Path::new("/nonexistent/agent.toml")).expect_err("there is no such file");
        assert!(error.0.contains("/nonexistent/agent.toml"), "{error}");
        assert!(error.0.contains("config default"), "{error}");
    }
}
