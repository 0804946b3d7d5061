//! Where things are: the workspace, its build folder, and what lives under it.

use std::env;
use std::path::{Path, PathBuf};

/// The folder of the workspace's `Cargo.toml`.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("xtask is a member folder of the workspace").to_path_buf()
}

/// Cargo's build folder: `target`, or what `CARGO_TARGET_DIR` says, always absolute.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => env::current_dir().unwrap_or_else(|_| root()).join(dir),
        None => root().join("target"),
    }
}

/// Where the kernel object is put, and where the agent's build script looks for it.
pub fn ebpf_object() -> PathBuf {
    target().join("ebpf").join("mesh-ebpf.o")
}
