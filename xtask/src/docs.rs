//! `docs`: writes the pages that are made from code. The harness knows how they are made; this only asks it to.

use anyhow::Result;

use crate::{build_ebpf, process};

pub fn run() -> Result<()> {
    build_ebpf::ensure()?;
    let mut cargo = process::cargo();
    cargo.args(["test", "--quiet", "--workspace", "--lib", "docs::"]).env("MESH_WRITE_DOCS", "1");
    process::run(&mut cargo)
}
