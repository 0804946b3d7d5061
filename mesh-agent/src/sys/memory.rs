//! Memory that was needed once: given back to the system.
//!
//! Must not know what it was needed for.
#![expect(unsafe_code, reason = "the C library's allocator and madvise have no safe interface")]

use std::{ops::Range, path::Path};

/// From this size on, memory comes straight from the system and goes straight back. Far above any buffer of a connection.
#[cfg(target_env = "gnu")]
const LARGE: nix::libc::c_int = 1 << 20;

/// As much free memory may an arena keep at its end. With less (128 KiB unless told), the buffers of a fast stream
/// are taken from the system and given back for every one of its frames.
#[cfg(target_env = "gnu")]
const KEPT: nix::libc::c_int = 2 << 20;

/// Keeps the C library from raising the first of these sizes with every large block that is freed, after which it
/// would hold on to them. To be called before there are threads.
pub fn return_large_blocks() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes no pointer; an unknown parameter is refused.
        unsafe {
            nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, LARGE);
            nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, KEPT);
        }
    }
}

/// Lets go of the pages of our own program, most of which only starting needs. Those that are used come back from the page
/// cache with a minor fault each; the others are the kernel's to use for something else, which it prefers to do with pages that
/// nobody has mapped. What cannot be let go stays.
pub fn let_go_of_program() {
    let Ok(program) = std::fs::read_link("/proc/self/exe") else { return };
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for range in maps.lines().filter_map(|line| program_pages(line, &program)) {
        // SAFETY: the range is a mapping of this process that the kernel has just named, of code or constants of our own program,
        // which lives as long as the process. It is private and was never written to (it is not writable, and the dynamic linker
        // relocates nothing in code, nor in what the file begins with), so what comes back from the file is what was there.
        let _result = unsafe {
            nix::libc::madvise(std::ptr::without_provenance_mut(range.start), range.len(), nix::libc::MADV_DONTNEED)
        };
    }
}

/// The addresses of a line of `/proc/self/maps` (proc_pid_maps(5)) that maps code of `program`, or the constants with which its
/// file begins. Other constants are behind the relocated ones, which were written to before they were made read-only.
fn program_pages(line: &str, program: &Path) -> Option<Range<usize>> {
    let mut fields = line.split_whitespace();
    let (addresses, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let is_first = permissions == "r--p" && offset.bytes().all(|digit| digit == b'0');
    if Path::new(fields.nth(2)?) != program || !(permissions == "r-xp" || is_first) {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

/// Gives pages that are free by now back to the system. The C library keeps them for itself where something small still
/// lives behind them, which after a large document has been read is most of what it took. Costs a few milliseconds.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes no pointer, may be called at any time from any thread.
        unsafe { nix::libc::malloc_trim(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0a0000000-55d0a0400000 r--p 00000000 fe:00 1234                       /usr/local/bin/mesh-agent
55d0a0400000-55d0a0c00000 r-xp 00400000 fe:00 1234                       /usr/local/bin/mesh-agent
55d0a0c00000-55d0a0d00000 r--p 00c00000 fe:00 1234                       /usr/local/bin/mesh-agent
55d0a0d00000-55d0a0d10000 rw-p 00d00000 fe:00 1234                       /usr/local/bin/mesh-agent
7f0000000000-7f0000100000 r-xp 00000000 fe:00 99                         /lib/x86_64-linux-gnu/libc.so.6
7f0000200000-7f0000210000 rw-p 00000000 00:00 0
7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0                          [vdso]
";

    #[test]
    fn only_code_and_constants_that_nobody_wrote_to_are_let_go() {
        let program = Path::new("/usr/local/bin/mesh-agent");
        let pages: Vec<_> = MAPS.lines().filter_map(|line| program_pages(line, program)).collect();
        assert_eq!(pages, [0x55d0_a000_0000..0x55d0_a040_0000, 0x55d0_a040_0000..0x55d0_a0c0_0000]);
    }

    #[test]
    fn a_program_goes_on_without_its_pages() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("RssFile:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
        };
        // Touch what other tests may not have, so that there is something to let go.
        let text = std::fs::read("/proc/self/exe").unwrap().len();
        let before = resident();
        let_go_of_program();
        let after = resident();
        assert!(text > 0 && after < before, "{before} kB before, {after} kB after");
    }
}
