//! Container images without a registry: busybox and the shared libraries of programs of this machine.
//!
//! It must not know who runs them.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::process::{output, run};

/// An image as a tar file, to be given to [`crate::Host::import`].
#[derive(Clone, Debug)]
pub struct Image {
    name: String,
    root: PathBuf,
    tar: PathBuf,
}

/// Programs of the usual image: where they are on the machine, and what they are called in the image.
///
/// `redis-check-rdb` *is* the server: it looks at the name that it is called by. So the package whose service would
/// start by itself is not needed.
const TOOLS: &[(&str, &str)] = &[
    ("/usr/bin/curl", "curl"),
    ("/usr/bin/redis-cli", "redis-cli"),
    ("/usr/bin/redis-check-rdb", "redis-server"),
    ("/usr/sbin/nginx", "nginx"),
];

impl Image {
    /// Busybox, curl, redis and nginx, called `lab/tools`.
    ///
    /// # Errors
    /// A program is not installed.
    pub fn tools(dir: &Path) -> Result<Self> {
        Self::build(dir, "lab/tools", TOOLS)
    }

    /// Busybox and the given programs (path on this machine, name in the image) with the libraries they need.
    ///
    /// # Errors
    /// A program is not installed.
    pub fn build(dir: &Path, name: &str, programs: &[(&str, &str)]) -> Result<Self> {
        let root = dir.join(format!("image-{}", name.replace('/', "-")));
        for folder in
            ["bin", "usr/bin", "etc", "tmp", "proc", "sys", "dev", "run", "var/log/nginx", "var/lib/nginx", "root"]
        {
            fs::create_dir_all(root.join(folder)).with_context(|| format!("cannot make {folder} of the image"))?;
        }
        // Debian's usual busybox is not a static one.
        let mut libraries: BTreeSet<_> = libraries_of(busybox(&root)?)?.into_iter().collect();
        for (program, called) in programs {
            copy(Path::new(program), &root.join("usr/bin").join(called))?;
            libraries.extend(libraries_of(program)?);
        }
        // Looked up at run time by older C libraries; the newer hold them.
        libraries.extend(
            libraries.iter().filter(|path| path.ends_with("libc.so.6")).cloned().collect::<Vec<_>>().iter().flat_map(
                |libc| ["libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2"].map(|each| libc.with_file_name(each)),
            ),
        );
        for library in libraries.iter().filter(|path| path.exists()) {
            let to = root.join(library.strip_prefix("/").unwrap_or(library));
            fs::create_dir_all(to.parent().context("a library is in a folder")?)
                .context("cannot make a library folder")?;
            copy(library, &to)?;
        }
        for (file, text) in [
            ("passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"),
            ("group", "root:x:0:\nnogroup:x:65534:\n"),
            ("nsswitch.conf", "hosts: files dns\n"),
        ] {
            fs::write(root.join("etc").join(file), text)
                .with_context(|| format!("cannot write {file} of the image"))?;
        }
        let tar = root.with_extension("tar");
        run(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."))?;
        Ok(Self { name: name.to_owned(), root, tar })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The unpacked files.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn tar(&self) -> &Path {
        &self.tar
    }
}

fn busybox(root: &Path) -> Result<&'static str> {
    let from = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    let from = from.context("busybox is not installed; install the package busybox-static")?;
    copy(Path::new(from), &root.join("bin/busybox"))?;
    for applet in run(Command::new(from).arg("--list"))?.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).with_context(|| format!("cannot link {applet}"))?;
    }
    Ok(from)
}

/// What `ldd` names for a program; nothing for a static one.
fn libraries_of(program: &str) -> Result<Vec<PathBuf>> {
    let listed = output(Command::new("ldd").arg(program))?.stdout;
    let words = listed.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(|word| PathBuf::from(word.trim_end_matches(':'))).collect())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}; is its package installed?", from.display()))
}
