//! Finding a Rust compiler that can build for the kernel. It looks at the machine and installs nothing.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::TARGET;
use crate::process;

/// What to tell a person whose machine has no suitable compiler.
pub const REMEDIES: &str = "\
no Rust compiler on this machine that is recent enough has the `core` library for the kernel's target
(bpfel-unknown-none). Either
    rustup toolchain install nightly --component rust-src
or, on Debian,
    apt-get install --no-install-recommends rustc-web libstd-rust-web-dev-bpf
(`cargo xtask build-ebpf --install` does the second for you). A compiler elsewhere is named by EBPF_RUSTC.";

/// The oldest release that the workspace builds with.
const OLDEST: &str = env!("CARGO_PKG_RUST_VERSION");

/// The LLVM versions for which the linker has bindings.
const LINKER_KNOWS_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// A compiler that can build kernel programs.
pub struct Toolchain {
    /// The compiler itself, never rustup's proxy.
    pub rustc: PathBuf,
    /// Its LLVM, major version.
    pub llvm: u32,
    /// How `core` comes about.
    pub core: CoreLibrary,
    /// Where the standard library's source is named in debug information, as the compiler knows it…
    pub source_link: PathBuf,
    /// …and what that resolves to.
    pub source: PathBuf,
    version: String,
}

/// Where `core` for the kernel's target comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoreLibrary {
    /// It came with the compiler.
    Prebuilt,
    /// Cargo builds it, from the compiler's own sources.
    FromSource,
}

impl Toolchain {
    /// The first suitable compiler: `$EBPF_RUSTC`, rustup's nightly, rustup's default, the system's.
    ///
    /// # Errors
    /// When `$EBPF_RUSTC` is set and unsuitable: we do not quietly take another than the one asked for.
    pub fn find() -> Result<Option<Self>> {
        if let Some(asked) = env::var_os("EBPF_RUSTC").filter(|asked| !asked.is_empty()) {
            let asked = PathBuf::from(asked);
            let found = Self::probe(&asked).with_context(|| format!("EBPF_RUSTC={} does not run", asked.display()))?;
            if found.is_none() {
                bail!(
                    "EBPF_RUSTC={}: it has neither `core` for {TARGET} nor rust-src, or is older than Rust {OLDEST}, \
                     or has an LLVM outside {LINKER_KNOWS_LLVM:?}",
                    asked.display()
                );
            }
            return Ok(found);
        }
        let candidates = [rustup_which(Some("nightly")), rustup_which(None), Some(PathBuf::from("/usr/bin/rustc"))];
        // A candidate that does not even run is as good as none.
        Ok(candidates.into_iter().flatten().find_map(|rustc| Self::probe(&rustc).ok().flatten()))
    }

    /// What this compiler can do for us; nothing when it cannot build for the kernel.
    fn probe(rustc: &Path) -> Result<Option<Self>> {
        let version = process::output(process::clean(rustc).arg("-vV"))?;
        let sysroot = process::output(process::clean(rustc).args(["--print", "sysroot"]))?;
        let rustlib = Path::new(sysroot.trim()).join("lib").join("rustlib");
        let source_link = rustlib.join("src").join("rust");
        let source = source_link.canonicalize().unwrap_or_else(|_| source_link.clone());
        let core = if rustlib.join(TARGET).join("lib").is_dir() {
            CoreLibrary::Prebuilt
        } else if source.join("library").join("Cargo.lock").is_file() {
            CoreLibrary::FromSource
        } else {
            return Ok(None);
        };
        let Some(llvm) = llvm_major(&version).filter(|llvm| LINKER_KNOWS_LLVM.contains(llvm)) else { return Ok(None) };
        if !is_recent(&version) {
            return Ok(None);
        }
        let version = version.lines().next().unwrap_or_default().to_owned();
        Ok(Some(Self { rustc: rustc.to_path_buf(), llvm, core, source_link, source, version }))
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = match self.core {
            CoreLibrary::Prebuilt => "prebuilt core",
            CoreLibrary::FromSource => "core built from rust-src",
        };
        write!(f, "{} at {} (LLVM {}, {core})", self.version, self.rustc.display(), self.llvm)
    }
}

/// The compiler of a rustup toolchain that is installed.
fn rustup_which(toolchain: Option<&str>) -> Option<PathBuf> {
    let mut rustup = process::clean("rustup");
    rustup.arg("which");
    if let Some(toolchain) = toolchain {
        rustup.args(["--toolchain", toolchain]);
    }
    let path = process::output(rustup.arg("rustc")).ok()?;
    Some(PathBuf::from(path.trim()))
}

/// The major version in the line `LLVM version: 22.1.4` of `rustc -vV`.
fn llvm_major(version: &str) -> Option<u32> {
    let full = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    full.split('.').next()?.trim().parse().ok()
}

/// Whether the line `release: 1.96.0` of `rustc -vV` names the oldest release that we build with, or a later one.
fn is_recent(version: &str) -> bool {
    let numbers = |text: &str| {
        let mut parts = text.split(['.', '-']).map(|part| part.trim().parse::<u32>().ok());
        Some((parts.next()??, parts.next()??))
    };
    let release = version.lines().find_map(|line| line.strip_prefix("release: ")).and_then(numbers);
    release.is_some_and(|release| Some(release) >= numbers(OLDEST))
}

#[cfg(test)]
mod tests {
    use super::{is_recent, llvm_major};

    #[test]
    fn older_compilers_are_passed_over() {
        assert!(is_recent("rustc 1.96.0 (x)\nrelease: 1.96.0\n"));
        assert!(is_recent("release: 1.97.0-nightly\n"));
        assert!(is_recent("release: 2.0.0\n"));
        assert!(!is_recent("release: 1.85.0\n"));
        assert!(!is_recent("no release\n"));
    }

    #[test]
    fn the_llvm_version_is_read_from_the_compilers_words() {
        assert_eq!(llvm_major("rustc 1.96.0\nhost: x\nLLVM version: 22.1.4\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\nLLVM version: 23\n"), Some(23));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }
}
