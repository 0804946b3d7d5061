//! Which agent is measured, and how it was built: figures of one build say nothing about another.
#![allow(clippy::print_stdout, reason = "figures are worth nothing without it")]

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

/// The agent that `MESH_AGENT` names, else a release build. Says which.
///
/// # Errors
/// It does not build, or does not start.
pub fn agent() -> Result<PathBuf> {
    let program = match env::var_os("MESH_AGENT") {
        Some(path) => path.into(),
        None => release()?,
    };
    let said = Command::new(&program).arg("--version").output();
    let said = said.with_context(|| format!("cannot start {}", program.display()))?;
    println!("      measured: {}", String::from_utf8_lossy(&said.stdout).trim());
    Ok(program)
}

fn release() -> Result<PathBuf> {
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    if !build.args(["build", "--release", "--package", "mesh-agent"]).status().context("cannot start cargo")?.success()
    {
        bail!("the agent does not build");
    }
    let own = env::current_exe().context("this program has no path")?;
    Ok(own.ancestors().nth(2).context("cargo puts benchmarks into a folder")?.join("mesh-agent"))
}
