//! Tells the agent where the kernel object is that it embeds, and the linker in which order a release's functions come.
//! It builds nothing itself: `cargo xtask build-ebpf` does the first, with another compiler target that a build script should
//! not hide, and `cargo xtask layout` writes the second.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Within the package.
const LAYOUT: &str = "layout.txt";

fn main() {
    lay_out();
    println!("cargo::rerun-if-env-changed=MESH_EBPF_OBJECT");
    let Some(object) = object() else {
        println!("cargo::error=the kernel object (ebpf/mesh-ebpf.o in cargo's build folder) is missing");
        println!("cargo::error=build it with `cargo xtask build-ebpf`, or name another with MESH_EBPF_OBJECT");
        return;
    };
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rustc-env=MESH_EBPF_OBJECT={}", object.display());
}

/// The object named by the environment, else the one that xtask left in the build folder that we are built into.
fn object() -> Option<PathBuf> {
    if let Some(named) = env::var_os("MESH_EBPF_OBJECT") {
        return Path::new(&named).canonicalize().ok();
    }
    let out = PathBuf::from(env::var_os("OUT_DIR")?);
    // How deep OUT_DIR lies depends on the profile and on whether a target was named.
    out.ancestors().map(|folder| folder.join("ebpf").join("mesh-ebpf.o")).find(|object| object.is_file())
}

/// Has a release's linker put side by side what is run. Only for the linker that rustc brings along itself: others have other
/// options, or none.
fn lay_out() {
    println!("cargo::rerun-if-changed={LAYOUT}");
    let is = |variable: &str, value: &str| env::var(variable).is_ok_and(|found| found == value);
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let own_linker = env::var_os("RUSTC_LINKER").is_some() || flags.contains("linker") || flags.contains("fuse-ld");
    if !is("PROFILE", "release") || !is("TARGET", "x86_64-unknown-linux-gnu") || own_linker || !has_lld() {
        return;
    }
    let Ok(layout) = Path::new(LAYOUT).canonicalize() else { return };
    println!("cargo::rustc-link-arg-bin=mesh-agent=-Wl,--symbol-ordering-file={}", layout.display());
    println!("cargo::rustc-link-arg-bin=mesh-agent=-Wl,--no-warn-symbol-ordering");
    // Names hold hashes that another compiler makes otherwise.
    let list = fs::read_to_string(&layout).unwrap_or_default();
    let made_with = list.lines().find_map(|line| line.strip_prefix("# Made with: ")).unwrap_or_default();
    let version = rustc(&["--version"]);
    if version != made_with {
        println!(
            "cargo::warning=the order of functions in {LAYOUT} was made with {made_with}, not with {version}: the agent will"
        );
        println!("cargo::warning=work as well, and take about 5 MB more of memory; `cargo xtask layout` makes it anew");
    }
}

/// Whether rustc has a linker of its own, which is then what it links with.
fn has_lld() -> bool {
    let folder = rustc(&["--print", "target-libdir"]);
    Path::new(&folder).parent().is_some_and(|folder| folder.join("bin/gcc-ld/ld.lld").is_file())
}

/// What the compiler says, without the end of the line.
fn rustc(arguments: &[&str]) -> String {
    let program = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let said = Command::new(program).args(arguments).output();
    said.map(|said| String::from_utf8_lossy(&said.stdout).trim().to_owned()).unwrap_or_default()
}
