//! What `bench freshness` and `bench scale` need before they can run: programs of Debian, Consul, and our agent as it is shipped.
//!
//! It must not know what is measured.

use std::{env, process::Command};

use anyhow::Result;

use super::peers;
use crate::{archive, packages, workspace};

/// Installs and builds everything, and tells the benchmark where it is. An agent that `MESH_AGENT` names is taken as it is.
pub fn prepare(bench: &mut Command) -> Result<()> {
    packages::ensure(packages::HOSTS)?;
    packages::ensure(&[packages::DOCKER, packages::TCPDUMP])?;
    bench.env("MESH_CONSUL", archive::CONSUL.fetch(&workspace::target())?);
    if env::var_os("MESH_AGENT").is_none() {
        bench.env("MESH_AGENT", peers::agent()?);
    }
    Ok(())
}
