//! Tells the agent where the kernel object is that it embeds. It builds nothing itself: `cargo xtask build-ebpf` does,
//! with another compiler target that a build script should not hide.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
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
