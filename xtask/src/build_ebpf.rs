//! `build-ebpf`: from Rust source to the kernel object, with whatever suitable compiler the machine has.
//! It knows nothing of what the programs do; the agent's build script embeds what it leaves behind.

mod linker;
mod toolchain;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{packages, process, workspace};
use toolchain::{CoreLibrary, Toolchain};

const TARGET: &str = "bpfel-unknown-none";

#[derive(clap::Args)]
pub struct Args {
    /// Install what is missing (Debian, root) instead of only naming it
    #[arg(long)]
    install: bool,
    /// Build twice, the second time from a copy of the sources elsewhere, and compare every byte
    #[arg(long)]
    check_reproducible: bool,
}

/// The command as the user gives it.
pub fn run(args: &Args) -> Result<()> {
    if args.install {
        packages::ensure(&[packages::CC, packages::LIBC_DEV])?;
    }
    let object = if args.install { ensure()? } else { build(&find()?)? };
    if args.check_reproducible {
        check_reproducible(&object)?;
    }
    Ok(())
}

/// Builds the object, installing a compiler for it first where there is none. Returns where the object is.
pub fn ensure() -> Result<PathBuf> {
    let toolchain = match Toolchain::find()? {
        Some(toolchain) => toolchain,
        None => {
            // What is there of them already may be of an older release than the archive has.
            packages::renew(&[packages::EBPF_RUSTC, packages::EBPF_CORE])?;
            find()?
        }
    };
    build(&toolchain)
}

fn find() -> Result<Toolchain> {
    match Toolchain::find()? {
        Some(toolchain) => Ok(toolchain),
        None => bail!("{}", toolchain::REMEDIES),
    }
}

fn build(toolchain: &Toolchain) -> Result<PathBuf> {
    println!("kernel programs: {toolchain}");
    let linker = linker::ensure(toolchain)?;
    let out = workspace::target().join("ebpf");
    let built = compile(toolchain, &linker, &workspace::root(), &out)?;
    let object = workspace::ebpf_object();
    replace(&built, &object)?;
    let size = object.metadata().with_context(|| format!("cannot read {}", object.display()))?.len();
    println!("kernel object: {} ({} KiB)", object.display(), size.div_ceil(1024));
    Ok(object)
}

/// Compiles the package at `root` into `out`; returns cargo's own copy of the object.
fn compile(toolchain: &Toolchain, linker: &Path, root: &Path, out: &Path) -> Result<PathBuf> {
    let bin = linker.parent().context("the linker has no folder")?;
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(std::iter::once(bin.to_path_buf()).chain(env::split_paths(&path)))
        .context("PATH holds a folder that cannot be written in it")?;
    let mut cargo = process::clean_cargo();
    cargo
        .current_dir(root)
        .args(["build", "--release", "--package", "mesh-ebpf", "--bin", "mesh-ebpf", "--target", TARGET])
        .arg("--target-dir")
        .arg(out)
        .env("PATH", path)
        .env("RUSTC", &toolchain.rustc)
        // Unit separator between flags, so that a folder with a space in its name stays one flag.
        .env("CARGO_ENCODED_RUSTFLAGS", flags(toolchain, root).join("\u{1f}"));
    if root.join("Cargo.lock").exists() {
        cargo.arg("--locked");
    }
    match toolchain.core {
        // Only the crates that use unstable features of the BPF target are let to.
        CoreLibrary::Prebuilt => cargo.env("RUSTC_BOOTSTRAP", "aya_ebpf,mesh_ebpf"),
        CoreLibrary::FromSource => cargo.env("RUSTC_BOOTSTRAP", "1").args(["-Z", "build-std=core"]),
    };
    process::run(&mut cargo).context("the kernel programs do not build")?;
    Ok(out.join(TARGET).join("release").join("mesh-ebpf"))
}

/// BTF from debug information, and no path of this machine in it: the object is the same wherever it is built.
fn flags(toolchain: &Toolchain, root: &Path) -> Vec<String> {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let mut remap = vec![(root.to_path_buf(), "/src"), (toolchain.source_link.clone(), "/rust")];
    remap.push((toolchain.source.clone(), "/rust"));
    remap.extend(cargo_home.map(|home| (home, "/cargo")));
    let mut flags = vec!["-Cdebuginfo=2".to_owned(), "-Clink-arg=--btf".to_owned()];
    flags.extend(remap.iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())));
    flags
}

/// Puts a copy of `from` at `to` in one step, and leaves `to` alone when nothing changed: the agent is then not rebuilt.
fn replace(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let draft = to.with_extension("o.new");
    fs::write(&draft, new).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, to).with_context(|| format!("cannot write {}", to.display()))
}

/// Builds again from a copy of the sources in another folder, from nothing, and compares.
fn check_reproducible(first: &Path) -> Result<()> {
    let toolchain = find()?;
    let linker = linker::ensure(&toolchain)?;
    let elsewhere = workspace::target().join("reproducible");
    if elsewhere.exists() {
        fs::remove_dir_all(&elsewhere).with_context(|| format!("cannot clear {}", elsewhere.display()))?;
    }
    let copy = elsewhere.join("sources of another checkout");
    copy_sources(&workspace::root(), &copy)?;
    let second = compile(&toolchain, &linker, &copy, &elsewhere.join("out"))?;
    let same = fs::read(first)? == fs::read(&second)?;
    if !same {
        bail!("not reproducible: {} and {} differ", first.display(), second.display());
    }
    fs::remove_dir_all(&elsewhere).with_context(|| format!("cannot clear {}", elsewhere.display()))?;
    println!("reproducible: a second build elsewhere gave the same bytes");
    Ok(())
}

/// Copies what cargo needs to read the workspace, without build folders and history.
fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        let (source, copy) = (entry.path(), to.join(entry.file_name()));
        if entry.file_name() == ".git" || source == workspace::target() || entry.file_name() == "target" {
            continue;
        }
        match entry.file_type()?.is_dir() {
            true => copy_sources(&source, &copy)?,
            false => drop(fs::copy(&source, &copy).with_context(|| format!("cannot copy {}", source.display()))?),
        }
    }
    Ok(())
}
