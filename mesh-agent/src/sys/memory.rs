//! Memory that was needed once: given back to the system.
//!
//! Must not know what it was needed for.
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "the C library's allocator has no safe interface"))]

/// Gives pages that are free by now back to the system. The C library keeps them for itself where something small still
/// lives behind them, which after a large document has been read is most of what it took. Costs a few milliseconds.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes no pointer, may be called at any time from any thread.
        unsafe { nix::libc::malloc_trim(0) };
    }
}
