//! Other kernels: Debian's own packages, taken from the mirror that this machine already uses and unpacked, never
//! installed. It knows where they lie and which modules they have, not what will run on them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

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
    process::output(apt.get().current_dir(&apt.folder).arg("download").arg(&package))?;
    let archive = fs::read_dir(&apt.folder)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|kind| kind == "deb"))
        .with_context(|| format!("apt left no {package} in {}", apt.folder.display()))?;
    let draft = folder.join("unpacking");
    remove(&draft)?;
    process::output(process::clean("dpkg").arg("-x").arg(&archive).arg(&draft))?;
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

/// apt with lists and downloads of its own: nothing on this machine's system changes.
struct Apt {
    folder: PathBuf,
    options: Vec<String>,
}

impl Apt {
    fn new(suite: &str, folder: &Path) -> Result<Self> {
        let folder = folder.join("apt");
        remove(&folder)?;
        for part in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(folder.join(part)).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let sources = folder.join("sources.list");
        fs::write(&sources, format!("deb {} {suite} main\n", mirror()?)).context("cannot write a list of sources")?;
        fs::write(folder.join("status"), "").context("cannot write a list of packages")?;
        let at = folder.display();
        let options = vec![
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={at}/lists"),
            format!("Dir::State::Status={at}/status"),
            format!("Dir::Cache={at}"),
            // Its helper user cannot read into a private build folder.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "APT::Update::Error-Mode=any".to_owned(),
        ];
        Ok(Self { folder, options })
    }

    fn get(&self) -> Command {
        self.command("apt-get")
    }

    fn cache(&self) -> Command {
        self.command("apt-cache")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = process::clean(program);
        command.arg("-q");
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }
}

/// The address of the Debian archive that this machine's own apt uses.
fn mirror() -> Result<String> {
    let folder = Path::new("/etc/apt/sources.list.d");
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    files.extend(fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()));
    let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    texts
        .filter_map(|text| mirror_in(&text))
        .next()
        .context("no source in /etc/apt serves a Debian release (bookworm, trixie…) from its `main` part")
}

/// The first archive of a Debian release in a file of sources, of either form.
fn mirror_in(text: &str) -> Option<String> {
    let releases = ["bullseye", "bookworm", "trixie", "forky", "stable", "oldstable", "testing", "sid", "unstable"];
    let one_line = text.lines().filter_map(|line| line.trim().strip_prefix("deb ")).find_map(|line| {
        // `deb [options] address suite component…`
        let line = line.trim();
        let line = line.strip_prefix('[').map_or(line, |rest| rest.split_once(']').map_or("", |(_, rest)| rest));
        let mut words = line.split_whitespace();
        let (address, suite) = (words.next()?, words.next()?);
        (releases.contains(&suite) && words.any(|component| component == "main")).then(|| address.to_owned())
    });
    one_line.or_else(|| {
        text.split("\n\n").find_map(|stanza| {
            let field = |name: &str| {
                let lines = stanza.lines().filter(|line| !line.starts_with('#'));
                lines.filter_map(|line| line.split_once(':')).find(|(key, _)| key.eq_ignore_ascii_case(name))
            };
            let (_, suites) = field("Suites")?;
            let (_, components) = field("Components")?;
            let (_, addresses) = field("URIs")?;
            let serves = suites.split_whitespace().any(|suite| releases.contains(&suite));
            let main = components.split_whitespace().any(|component| component == "main");
            (serves && main).then(|| addresses.split_whitespace().next().map(str::to_owned)).flatten()
        })
    })
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

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{image_package, load_order, mirror_in};

    #[test]
    fn the_mirror_is_found_in_both_forms_of_source_files() {
        let one_line =
            "# deb http://old bookworm main\ndeb [arch=amd64 trusted=yes] http://mirror/debian bookworm main contrib\n";
        assert_eq!(mirror_in(one_line).as_deref(), Some("http://mirror/debian"));
        let stanzas = "Types: deb\nURIs: http://other/x\nSuites: nodistro\nComponents: main\n\n\
                       Types: deb\n# URIs: http://commented\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n\
                       Components: main\n";
        assert_eq!(mirror_in(stanzas).as_deref(), Some("http://mirror/debian"));
        assert_eq!(mirror_in("deb http://security bookworm-security main\n"), None);
    }

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
