//! What the kernel's text files say: kernel release, mounts, capabilities, port ranges. Pure.
//!
//! Must not know what a finding is, nor read a file.

use std::path::PathBuf;

/// A mount of a cgroup2 hierarchy, from `/proc/self/mountinfo` (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// Which directory of the hierarchy is mounted; `/` is the root as this cgroup namespace sees it.
    pub(super) root: String,
    pub(super) point: PathBuf,
}

/// Major and minor number of a kernel release such as `6.1.112-124.190.amzn2023.x86_64`.
pub(super) fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// All cgroup2 mounts, in the order in which they were made.
pub(super) fn cgroup2_mounts(mountinfo: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        // Optional fields stand between the mount options and a lone hyphen; the file system type follows it.
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        let (root, point) = (left.nth(3)?, left.next()?);
        (right.split(' ').next()? == "cgroup2").then(|| Mount { root: unescape(root), point: unescape(point).into() })
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// The mount points, the one that shows most of the hierarchy first. `true` marks a mount of the true root.
pub(super) fn by_completeness(mounts: Vec<(bool, Mount)>) -> Vec<PathBuf> {
    let rank = |(whole, mount): (bool, Mount)| {
        // Seen from a cgroup namespace, `/..` lies above its root.
        let above = mount.root.matches("..").count();
        let below = mount.root.split('/').filter(|part| !part.is_empty() && *part != "..").count();
        (!whole, std::cmp::Reverse(above), below, mount.point.components().count(), mount.point)
    };
    let mut ranked: Vec<_> = mounts.into_iter().map(rank).collect();
    ranked.sort();
    let mut points: Vec<_> = ranked.into_iter().map(|(.., point)| point).collect();
    points.dedup();
    points
}

/// The effective capabilities of `/proc/self/status`, one bit each.
pub(super) fn effective_capabilities(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

/// `net.ipv4.ip_local_port_range`: first and last ephemeral port.
pub(super) fn port_range(text: &str) -> Option<(u16, u16)> {
    let mut words = text.split_whitespace();
    let range = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    words.next().is_none().then_some(range)
}

/// `net.ipv4.ip_local_reserved_ports`: single ports and ranges, separated by commas; empty where none is reserved.
pub(super) fn reserved_ports(text: &str) -> Option<Vec<(u16, u16)>> {
    let range = |item: &str| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    text.trim().split(',').filter(|item| !item.is_empty()).map(range).collect()
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        let check = |text, expected| assert_eq!(release(text), expected, "{text}");
        check("6.1.112-124.190.amzn2023.x86_64\n", Some((6, 1)));
        check("5.15", Some((5, 15)));
        check("6.18.44-fc", Some((6, 18)));
        check("6", None);
        check("", None);
        check("linux", None);
        check("99999999999.1", None);
    }

    #[test]
    fn cgroup2_is_found_among_other_mounts() {
        let hybrid = "\
            31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mounts(hybrid), [Mount { root: "/".into(), point: "/sys/fs/cgroup/unified".into() }]);
        let unified = "\
            29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 master:4 - cgroup2 cgroup2 rw,nsdelegate\n\
            90 23 0:26 /../.. /mnt/a\\040b rw - cgroup2 none rw\n";
        assert_eq!(
            cgroup2_mounts(unified),
            [
                Mount { root: "/".into(), point: "/sys/fs/cgroup".into() },
                Mount { root: "/../..".into(), point: "/mnt/a b".into() },
            ]
        );
        assert_eq!(cgroup2_mounts("nonsense\n\n1 2 - cgroup2\n"), []);
    }

    #[test]
    fn the_mount_nearest_to_the_root_is_first() {
        let mount = |whole, root: &str, point: &str| (whole, Mount { root: root.into(), point: point.into() });
        let check = |mounts, expected: &[&str]| {
            let expected: Vec<_> = expected.iter().map(PathBuf::from).collect();
            assert_eq!(by_completeness(mounts), expected);
        };
        check(vec![], &[]);
        check(vec![mount(false, "/", "/a"), mount(true, "/", "/b/c")], &["/b/c", "/a"]);
        check(vec![mount(false, "/system.slice", "/a"), mount(false, "/", "/b/c")], &["/b/c", "/a"]);
        check(vec![mount(false, "/", "/a"), mount(false, "/../..", "/b/c")], &["/b/c", "/a"]);
        check(vec![mount(true, "/", "/b/c"), mount(true, "/", "/a"), mount(true, "/", "/a")], &["/a", "/b/c"]);
    }

    #[test]
    fn escapes() {
        let check = |field, expected| assert_eq!(unescape(field), expected);
        check("/a\\011b\\134", "/a\tb\\");
        check("/a\\", "/a\\");
        check("/a\\9xy", "/a\\9xy");
        check("/\\303\\251", "/é");
    }

    #[test]
    fn capabilities() {
        let status = "Name:\tcat\nCapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n";
        assert_eq!(effective_capabilities(status), Some(0x1ff_ffff_ffff));
        assert_eq!(effective_capabilities("CapEff:\tzz\n"), None);
        assert_eq!(effective_capabilities(""), None);
    }

    #[test]
    fn ports() {
        assert_eq!(port_range("32768\t60999\n"), Some((32768, 60999)));
        assert_eq!(port_range("32768"), None);
        assert_eq!(port_range("1 2 3"), None);
        assert_eq!(reserved_ports("\n"), Some(vec![]));
        assert_eq!(reserved_ports("8080,15000-15053\n"), Some(vec![(8080, 8080), (15000, 15053)]));
        assert_eq!(reserved_ports("8080,x"), None);
    }
}
