//! Memory that was needed once: given back to the system.
//!
//! Must not know what it was needed for.
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "the C library's allocator has no safe interface"))]

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

/// Gives pages that are free by now back to the system. The C library keeps them for itself where something small still
/// lives behind them, which after a large document has been read is most of what it took. Costs a few milliseconds.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes no pointer, may be called at any time from any thread.
        unsafe { nix::libc::malloc_trim(0) };
    }
}
