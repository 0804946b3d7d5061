//! The archive that a virtual machine starts from, in the kernel's own `newc` format
//! (Documentation/driver-api/early-userspace/buffer-format.rst). It knows files and bytes, not what they are for.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path};

use anyhow::{Context, Result};

use crate::process;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Files to be, by their path without the leading slash. A folder comes before what it holds because its name does.
#[derive(Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

struct Entry {
    mode: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

impl Archive {
    /// A folder and those above it.
    pub fn folder(&mut self, path: &str) {
        let mut at = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !at.is_empty() {
                at.push('/');
            }
            at.push_str(part);
            let folder = Entry { mode: DIRECTORY | 0o755, device: (0, 0), content: Vec::new() };
            self.entries.entry(at.clone()).or_insert(folder);
        }
    }

    /// A file with this content.
    pub fn bytes(&mut self, path: &str, permissions: u32, content: Vec<u8>) {
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder);
        }
        self.entries.insert(path.to_owned(), Entry { mode: REGULAR | permissions, device: (0, 0), content });
    }

    /// A copy of a program of this machine.
    pub fn program(&mut self, from: &Path, path: &str) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.bytes(path, 0o755, content);
        Ok(())
    }

    /// Every shared library that the loader would give to `program`, each at the place where it is here.
    pub fn libraries(&mut self, program: &Path) -> Result<()> {
        let list = process::output(process::clean("ldd").arg(program))?;
        for path in library_paths(&list) {
            self.program(Path::new(path), &inner(path))?;
        }
        Ok(())
    }

    /// `/dev/console`, which the kernel opens for the first process before anything is mounted.
    pub fn console(&mut self) {
        self.folder("dev");
        let console = Entry { mode: CHARACTER_DEVICE | 0o600, device: (5, 1), content: Vec::new() };
        self.entries.insert("dev/console".to_owned(), console);
    }

    /// The archive's bytes.
    pub fn finish(self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            write(&mut out, number, path, entry);
        }
        write(&mut out, 0, "TRAILER!!!", &Entry { mode: 0, device: (0, 0), content: Vec::new() });
        out
    }
}

/// One member: a header of hexadecimal fields, the name, the content, each padded to four bytes.
fn write(out: &mut Vec<u8>, number: u32, path: &str, entry: &Entry) {
    let size = u32::try_from(entry.content.len()).expect("no file of ours has 4 GiB");
    let name = u32::try_from(path.len() + 1).expect("no path of ours has 4 GiB");
    let (major, minor) = entry.device;
    // magic, inode, mode, uid, gid, links, mtime, size, device of the file system (2), device (2), name size, checksum
    let fields = [number, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(&entry.content);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The paths in what `ldd` prints: `libc.so.6 => /lib/… (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn library_paths(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|line| {
        let line = line.split_once(" => ").map_or(line, |(_, path)| path).trim();
        let path = line.split(" (").next()?.trim();
        path.starts_with('/').then_some(path)
    })
}

/// A path of this machine as a path in the archive.
fn inner(path: &str) -> String {
    let parts = Path::new(path).components().filter_map(|part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    parts.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::{Archive, library_paths};

    #[test]
    fn an_archive_is_what_the_kernel_reads() {
        let mut archive = Archive::default();
        archive.bytes("a/b", 0o644, b"hello".to_vec());
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 3, "a folder, a file and the trailer");
        // The file: its type and permissions, then its size, then its name, padded, then its content.
        assert!(text.contains("000081A4"), "{text}");
        assert!(text.contains("00000005"), "{text}");
        assert!(text.contains("a/b\0\0\0hello\0\0\0") || text.contains("a/b\0\0\0\0hello"), "{text}");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn libraries_are_found_in_the_loaders_words() {
        let list = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tlibgone.so => not found\n";
        let found: Vec<&str> = library_paths(list).collect();
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
