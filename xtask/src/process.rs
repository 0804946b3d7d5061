//! Running other programs: found, told apart by their errors, and never with our own cargo's private environment.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Folders that hold administrators' programs, which a plain user's `PATH` may lack.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// What cargo adds to the environment of `cargo run`, or what changes what a compiler makes.
/// An inner build must see none of it: it has another target, another compiler and flags of its own.
const OUTER_BUILD: [&str; 10] = [
    "LD_LIBRARY_PATH",
    "MAKEFLAGS",
    "MFLAGS",
    "RUSTC",
    "RUSTC_BOOTSTRAP",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTDOCFLAGS",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// Cargo's variables that say where its files and registries are: these an inner build keeps.
const CARGO_SETTINGS: [&str; 7] =
    ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_", "CARGO_BUILD_JOBS"];

/// Where `name` is, looking in `PATH` and in the administrators' folders.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_FOLDERS.iter().map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| is_executable(file))
}

/// A file that this machine would run.
pub fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The cargo that runs us, with the environment it was itself given: same toolchain, same target folder.
pub fn cargo() -> Command {
    let mut command = Command::new(cargo_program());
    command.env("RUSTUP_AUTO_INSTALL", "0");
    for (name, _) in env::vars_os() {
        // What `cargo run` told *us* about our own package would make every child rebuild.
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    command
}

/// A cargo for a build that has nothing to do with the one that runs us, but for the toolchain.
///
/// Some crates of the registry carry a `rust-toolchain.toml`, and their build scripts run `rustc` in their own folder.
/// Were the toolchain not named, rustup would obey that file and change the user's toolchains to suit it.
pub fn clean_cargo() -> Command {
    let mut command = clean(cargo_program());
    command.env_remove("CARGO");
    if let Some(toolchain) = env::var_os("RUSTUP_TOOLCHAIN") {
        command.env("RUSTUP_TOOLCHAIN", toolchain);
    }
    command
}

/// A program without the outer build's environment, under which rustup installs and updates nothing.
pub fn clean(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("RUSTUP_AUTO_INSTALL", "0");
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let cargos = name.starts_with("CARGO_") && !CARGO_SETTINGS.iter().any(|kept| name.starts_with(kept));
        if cargos || OUTER_BUILD.contains(&name) {
            command.env_remove(name);
        }
    }
    command
}

/// Runs `command` to its end with our own output; an error names the command and how it ended.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command.status().with_context(|| format!("cannot start `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Runs `command` and returns what it printed; an error holds what it said on stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output = command.output().with_context(|| format!("cannot start `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as one would type it, shortened where it is very long.
fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(300) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line,
    }
}

fn cargo_program() -> std::ffi::OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    #[test]
    fn no_inner_program_lets_rustup_change_the_users_toolchains() {
        for command in [super::cargo(), super::clean_cargo(), super::clean("rustup")] {
            let set = command.get_envs().find(|(name, _)| *name == "RUSTUP_AUTO_INSTALL");
            assert_eq!(set, Some((OsStr::new("RUSTUP_AUTO_INSTALL"), Some(OsStr::new("0")))));
        }
        // Cargo runs these tests with the toolchain named, where rustup is used at all.
        if let Some(toolchain) = std::env::var_os("RUSTUP_TOOLCHAIN") {
            let inner = super::clean_cargo();
            let named = inner.get_envs().find(|(name, _)| *name == "RUSTUP_TOOLCHAIN");
            assert_eq!(named, Some((OsStr::new("RUSTUP_TOOLCHAIN"), Some(toolchain.as_os_str()))));
        }
    }
}
