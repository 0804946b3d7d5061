//! bpf-linker, made against the very libLLVM that the compiler itself loads: always the right version, no LLVM package.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::toolchain::Toolchain;
use crate::{process, workspace};

const VERSION: &str = "0.13.0";

/// The linker for `toolchain`, built from the crate registry where it is not there yet. Returns the program.
pub fn ensure(toolchain: &Toolchain) -> Result<PathBuf> {
    let tools = workspace::target().join("tools");
    let program = tools.join("bin").join("bpf-linker");
    let llvm = libllvm_of(&toolchain.rustc)
        .with_context(|| format!("{} does not load a shared libLLVM", toolchain.rustc.display()))?;
    if is_right_version(&program) && libllvm_of(&program).is_some_and(|loaded| same_file(&loaded, &llvm)) {
        return Ok(program);
    }
    println!(
        "bpf-linker {VERSION}: building it from the crate registry into {} (about a minute, once)",
        tools.display()
    );
    let lib = tools.join("lib");
    fs::create_dir_all(&lib).with_context(|| format!("cannot make {}", lib.display()))?;
    // One name for the build, and the library's own name for the program that is built.
    link(&llvm, &lib.join("libLLVM.so"))?;
    link(&llvm, &lib.join(llvm.file_name().context("libLLVM has no name")?))?;
    process::run(
        process::clean_cargo()
            .current_dir(workspace::root())
            .args(["install", "bpf-linker", "--version", VERSION, "--locked", "--force", "--no-default-features"])
            .args(["--features", &format!("llvm-{}", toolchain.llvm), "--root"])
            .arg(&tools)
            .arg("--target-dir")
            .arg(tools.join("build"))
            .env("LLVM_PREFIX", &tools)
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0"),
    )
    .context("bpf-linker does not build; it needs a C compiler (gcc, libc6-dev) and the crate registry")?;
    let build = tools.join("build");
    fs::remove_dir_all(&build).with_context(|| format!("cannot clear {}", build.display()))?;
    Ok(program)
}

fn is_right_version(program: &Path) -> bool {
    process::output(process::clean(program).arg("--version")).is_ok_and(|said| said.trim().ends_with(VERSION))
}

/// The libLLVM that the loader gives to `program`.
fn libllvm_of(program: &Path) -> Option<PathBuf> {
    let libraries = process::output(process::clean("ldd").arg(program)).ok()?;
    let line = libraries.lines().find(|line| line.trim_start().starts_with("libLLVM"))?;
    let path = line.split_once("=> ")?.1.split(" (").next()?;
    Some(PathBuf::from(path.trim())).filter(|path| path.exists())
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

fn link(to: &Path, at: &Path) -> Result<()> {
    if at.symlink_metadata().is_ok() {
        fs::remove_file(at).with_context(|| format!("cannot replace {}", at.display()))?;
    }
    symlink(to, at).with_context(|| format!("cannot link {}", at.display()))
}
