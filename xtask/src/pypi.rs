//! Python programs that are fetched from PyPI into the target folder but never installed. It knows pip, not what the
//! programs are for.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{archive, packages, process};

/// Packages that together are a program.
pub struct Program {
    /// The first one's name is the program's.
    pub packages: &'static [(&'static str, &'static str)],
    /// What it is for, in a few words.
    pub purpose: &'static str,
}

/// Also brings botocore, and with it AWS's own descriptions of its APIs.
pub const MOTO: Program = Program {
    packages: &[("moto", "5.2.5"), ("flask", "3.1.3"), ("flask-cors", "6.0.5")],
    purpose: "AWS APIs for the tests",
};

impl Program {
    /// The folder that Python has to look into, once it is there.
    pub fn place(&self, target: &Path) -> PathBuf {
        let name: Vec<String> =
            self.packages.iter().take(1).map(|(name, version)| format!("{name}-{version}")).collect();
        target.join("tools").join(name.concat())
    }

    /// Where it is, fetched below `target` unless it is there already.
    ///
    /// # Errors
    /// pip is missing and cannot be installed, or fails.
    pub fn fetch(&self, target: &Path) -> Result<PathBuf> {
        let place = self.place(target);
        if place.is_dir() {
            return Ok(place);
        }
        packages::ensure(&[packages::PIP])?;
        let all: Vec<String> = self.packages.iter().map(|(name, version)| format!("{name}=={version}")).collect();
        println!("{} ({}): fetching it from PyPI, with what it needs, into target/tools", all.join(" "), self.purpose);
        let draft = place.with_extension("unpacking");
        archive::remove(&draft)?;
        fs::create_dir_all(&draft).with_context(|| format!("cannot make {}", draft.display()))?;
        let mut pip = process::clean("pip3");
        pip.args(["install", "--quiet", "--only-binary", ":all:", "--root-user-action", "ignore", "--target"]);
        process::output(pip.arg(&draft).args(all)).context("PyPI does not serve it")?;
        fs::rename(&draft, &place).with_context(|| format!("cannot put {} in place", place.display()))?;
        Ok(place)
    }
}
