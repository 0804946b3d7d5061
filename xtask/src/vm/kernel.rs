//! Other kernels: Debian's own packages, taken from the mirror that this machine already uses and unpacked, never
//! installed. It knows where they lie and which modules they have, not what will run on them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::archive::{Apt, remove};
use crate::process;

/// Where to look first for the series of the matrix…
const USUAL: [(&str, &str); 2] = [("6.1", "bookworm"), ("6.12", "trixie")];

/// …and for any other, or where the mirror does not serve that suite.
const SUITES: [&str; 4] = ["bookworm", "bookworm-backports", "trixie", "trixie-backports"];

/// The package that depends on the newest kernel of its suite.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel.
pub struct Kernel {
    /// As asked for: `6.1`.
    pub series: String,
    /// As it calls itself: `6.1.0-40-cloud-amd64`.
    pub release: String,
    /// The image to boot.
    pub image: PathBuf,
    /// Where its files are, and where others may be put beside them.
    pub folder: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The newest kernel of `series`, fetched into `folder` unless it is there already.
    pub fn fetch(series: &str, folder: &Path) -> Result<Self> {
        let folder = folder.join(series);
        if let Some(kernel) = Self::unpacked(series, &folder) {
            return Ok(kernel);
        }
        let mut failures = Vec::new();
        let usual = USUAL.iter().find(|(of, _)| *of == series).map(|(_, suite)| *suite);
        for suite in usual.into_iter().chain(SUITES.into_iter().filter(|suite| usual != Some(*suite))) {
            println!("kernel {series}: fetching Debian's {META_PACKAGE} of {suite} from this machine's own mirror");
            match download(series, suite, &folder) {
                Ok(()) => {
                    return Self::unpacked(series, &folder)
                        .with_context(|| format!("{} holds no kernel after unpacking", folder.display()));
                }
                Err(error) => failures.push(format!("{suite}: {error:#}")),
            }
        }
        bail!("kernel {series} cannot be had: {}", failures.join("; "))
    }

    /// What lies unpacked in `folder`, if it is whole.
    fn unpacked(series: &str, folder: &Path) -> Option<Self> {
        let root = folder.join("root");
        let (release, image) = fs::read_dir(root.join("boot")).ok()?.flatten().find_map(|entry| {
            let name = entry.file_name();
            let release = name.to_str()?.strip_prefix("vmlinuz-")?.to_owned();
            Some((release, entry.path()))
        })?;
        let modules = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(&release));
        let modules = modules.into_iter().find(|modules| modules.join("modules.dep").is_file())?;
        Some(Self { series: series.to_owned(), release, image, folder: folder.to_path_buf(), modules })
    }

    /// The wanted modules and those they need, in the order in which they can be loaded: name and plain content.
    /// What the kernel has built in is left out.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let place = self.modules.join("modules.dep");
        let dependencies = fs::read_to_string(&place).with_context(|| format!("cannot read {}", place.display()))?;
        let order = load_order(&dependencies, wanted);
        order.iter().map(|file| Ok((module_name(file).to_owned(), plain(&self.modules.join(file))?))).collect()
    }
}

/// Fetches and unpacks one suite's kernel into `folder`; it is whole once `root` is there.
fn download(series: &str, suite: &str, folder: &Path) -> Result<()> {
    let apt = Apt::new(suite, folder)?;
    process::output(apt.get().arg("update")).context("the mirror does not serve this suite")?;
    let about = process::output(apt.cache().args(["show", META_PACKAGE]))?;
    let package = image_package(&about, series)
        .with_context(|| format!("{META_PACKAGE} of {suite} depends on no kernel of {series}"))?;
    let draft = folder.join("unpacking");
    apt.unpack(&package, &draft)?;
    let release = package.trim_start_matches("linux-image-");
    let depmod = process::find("depmod").context("depmod is not installed (Debian: kmod)")?;
    // Where /lib is a link to /usr/lib in newer packages, depmod still looks in /lib.
    if !draft.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", draft.join("lib")).context("cannot link lib")?;
    }
    process::output(process::clean(depmod).arg("-b").arg(&draft).arg(release))?;
    remove(&folder.join("root"))?;
    fs::rename(&draft, folder.join("root")).context("cannot put the kernel in place")?;
    remove(&apt.folder)
}

/// The kernel of `series` in the `Depends:` line of the package that stands for the newest one.
fn image_package(about: &str, series: &str) -> Option<String> {
    let depends = about.lines().filter_map(|line| line.strip_prefix("Depends: "));
    let packages = depends.flat_map(|line| line.split(", ")).filter_map(|package| package.split_whitespace().next());
    let prefix = format!("linux-image-{series}");
    // `6.1` is not a prefix of `6.12` as a series.
    let mut images =
        packages.filter(|package| package.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with(['.', '-', '+'])));
    images.next().map(str::to_owned)
}

/// Files of `modules.dep` to load, each after those it needs.
fn load_order<'a>(dependencies: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let lines: Vec<(&str, &str)> = dependencies.lines().filter_map(|line| line.split_once(':')).collect();
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for wanted in wanted {
        let Some((file, needs)) = lines.iter().find(|(file, _)| module_name(file) == *wanted) else { continue };
        // depmod lists everything needed, nearest first, so the reverse can be loaded as it stands.
        for file in needs.split_whitespace().rev().chain([*file]) {
            if seen.insert(file) {
                order.push(file);
            }
        }
    }
    order
}

/// `kernel/drivers/net/veth.ko.xz` is `veth`.
fn module_name(file: &str) -> &str {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name)
}

/// The module without its compression.
fn plain(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|kind| kind == "xz") {
        let unpacked = process::clean("xz").arg("-dc").arg(file).output().context("cannot start xz")?;
        if !unpacked.status.success() {
            bail!("xz cannot unpack {}", file.display());
        }
        return Ok(unpacked.stdout);
    }
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::{image_package, load_order};

    #[test]
    fn the_newest_kernel_of_the_series_is_taken() {
        let about = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.12.48+deb13-cloud-amd64 (= 6.12.48-1)\n";
        assert_eq!(image_package(about, "6.12").as_deref(), Some("linux-image-6.12.48+deb13-cloud-amd64"));
        assert_eq!(image_package(about, "6.1"), None);
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let dependencies = "kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko\n\
                            kernel/net/802/stp.ko: kernel/net/llc/llc.ko\nkernel/net/llc/llc.ko:\nkernel/drivers/net/veth.ko:\n";
        let order = load_order(dependencies, &["veth", "bridge", "not-there"]);
        assert_eq!(
            order,
            [
                "kernel/drivers/net/veth.ko",
                "kernel/net/llc/llc.ko",
                "kernel/net/802/stp.ko",
                "kernel/net/bridge/bridge.ko"
            ]
        );
    }
}
