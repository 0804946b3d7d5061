//! The bpf(2) calls that aya does not expose: update and detach a link, look up and delete in one.
//!
//! Numbers and layouts from <linux/bpf.h>. Knows nothing of which program or map it is handed.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::Pod;
use nix::libc;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// `union bpf_attr` as BPF_LINK_UPDATE reads it.
#[repr(C)]
#[derive(Default)]
struct LinkUpdate {
    link: u32,
    new_program: u32,
    flags: u32,
    old_program: u32,
}

/// `union bpf_attr` as BPF_LINK_DETACH reads it.
#[repr(C)]
#[derive(Default)]
struct LinkDetach {
    link: u32,
}

/// `union bpf_attr` as BPF_OBJ_GET reads it.
#[repr(C)]
#[derive(Default)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `union bpf_attr` as the element commands read it.
#[repr(C)]
#[derive(Default)]
struct Element {
    map: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn fd(of: &impl AsFd) -> io::Result<u32> {
    u32::try_from(of.as_fd().as_raw_fd()).map_err(io::Error::other)
}

fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` lives across the call and its size is given; pointers inside it are the caller's.
    let code = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(code) }
}

/// Opens what is pinned at `path`.
///
/// # Errors
/// Nothing is, or it is not on a BPF filesystem.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = bpf(BPF_OBJ_GET, &Object { path: path.as_ptr() as u64, ..Object::default() })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts `program` in the place of whatever `link` runs, without a moment in which nothing runs.
///
/// # Errors
/// The kernel refuses: not a link, not of the same type.
pub(super) fn update_link(link: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    let attr = LinkUpdate { link: fd(link)?, new_program: fd(program)?, ..LinkUpdate::default() };
    bpf(BPF_LINK_UPDATE, &attr).map(drop)
}

/// Takes the program of `link` off its hook before it returns. A link that merely loses its last pin is detached by the
/// kernel some time later.
///
/// # Errors
/// The kernel refuses: not a link that can be detached.
pub(super) fn detach_link(link: &impl AsFd) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &LinkDetach { link: fd(link)? }).map(drop)
}

/// Takes an element out of a hash map whose key and value are `K` and `V`. `None`: there is none.
///
/// # Errors
/// The kernel has no such command for this map (before Linux 5.14).
pub(super) fn take<K: Pod, V: Pod + Default>(map: &impl AsFd, key: &K) -> io::Result<Option<V>> {
    let mut value = V::default();
    let attr = Element {
        map: fd(map)?,
        key: std::ptr::from_ref(key) as u64,
        value: std::ptr::from_mut(&mut value) as u64,
        ..Element::default()
    };
    match bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &attr) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds, the clock of `bpf_ktime_get_ns`.
pub(super) fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let now = now.expect("CLOCK_MONOTONIC exists on every Linux");
    let (seconds, nanos) = (now.tv_sec().unsigned_abs(), now.tv_nsec().unsigned_abs());
    seconds * 1_000_000_000 + nanos
}
