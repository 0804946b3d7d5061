//! Debian packages that are fetched and unpacked but never installed: from the mirror that this machine already uses,
//! also from a release that is not this machine's. It knows apt, not what the packages are for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

/// A program of another release, to be unpacked into the target folder.
pub struct Foreign {
    pub package: &'static str,
    pub suite: &'static str,
    /// Its place in the package.
    pub program: &'static str,
    /// What it is for, in a few words.
    pub purpose: &'static str,
}

/// The newest release that Debian carries.
pub const CONSUL: Foreign = Foreign {
    package: "consul",
    suite: "bullseye",
    program: "usr/bin/consul",
    purpose: "a real registry for the tests",
};

impl Foreign {
    /// Where the program is once it is there.
    pub fn place(&self, target: &Path) -> PathBuf {
        target.join("packages").join(self.package).join("root").join(self.program)
    }

    /// Where the program is, fetched below `target` unless it is there already.
    ///
    /// # Errors
    /// The mirror does not serve the suite, or apt fails.
    pub fn fetch(&self, target: &Path) -> Result<PathBuf> {
        let Self { package, suite, program, purpose } = self;
        let folder = target.join("packages").join(package);
        let found = self.place(target);
        if process::is_executable(&found) {
            return Ok(found);
        }
        println!(
            "{package} ({purpose}): fetching the package of {suite} from this machine's own mirror, into target/packages"
        );
        let apt = Apt::new(suite, &folder)?;
        process::output(apt.get().arg("update")).context("the mirror does not serve this suite")?;
        let draft = folder.join("unpacking");
        apt.unpack(package, &draft)?;
        remove(&folder.join("root"))?;
        fs::rename(&draft, folder.join("root")).with_context(|| format!("cannot put {package} in place"))?;
        remove(&apt.folder)?;
        anyhow::ensure!(process::is_executable(&found), "package {package} of {suite} did not bring {program}");
        Ok(found)
    }
}

/// apt with lists and downloads of its own: nothing on this machine's system changes.
pub struct Apt {
    pub folder: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// For packages of `suite`, below `folder`. The lists are still to be fetched, by `get` with `update`.
    pub fn new(suite: &str, folder: &Path) -> Result<Self> {
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

    pub fn get(&self) -> Command {
        self.command("apt-get")
    }

    pub fn cache(&self) -> Command {
        self.command("apt-cache")
    }

    /// Fetches a package and unpacks it into `into`, which is emptied before.
    pub fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        process::output(self.get().current_dir(&self.folder).arg("download").arg(package))?;
        let archive = fs::read_dir(&self.folder)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|kind| kind == "deb"))
            .with_context(|| format!("apt left no {package} in {}", self.folder.display()))?;
        remove(into)?;
        process::output(process::clean("dpkg").arg("-x").arg(&archive).arg(into)).map(drop)
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

/// Removes a folder, which need not be there.
pub fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::mirror_in;

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
}
