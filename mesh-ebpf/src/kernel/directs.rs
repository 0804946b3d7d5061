//! What direct connections had asked for: each in the place of an array that its socket's cookie chooses.
//!
//! A place costs `connect()` a tenth of what the kernel needs to allocate storage for a socket. Who finds its place taken
//! uses that storage. A place is taken at `connect()`, confirmed when the SYN leaves, and free again when the connection is
//! closed; one that was never confirmed belongs to a connection that failed before, and is taken over after a while.

use core::{arch::asm, ffi::c_void};

use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_jiffies64};
use mesh_common::{
    addr::Addr,
    maps::{Direct, MAX_DIRECTS, Original},
};
use mesh_ebpf::decide;

use super::maps::DIRECTS;

/// Notes that the socket of `ctx` asked for `original` and goes to `endpoint`. False: the place is another's.
///
/// # Safety
/// `ctx` must be the context of the hook that runs.
#[inline(always)]
pub unsafe fn remember(ctx: *mut c_void, original: &Original, endpoint: &Addr) -> bool {
    // SAFETY: the caller vouches for `ctx`.
    let Some((place, cookie)) = (unsafe { place(ctx) }) else { return false };
    // SAFETY: no arguments. An odd number is never 0.
    let now = unsafe { bpf_jiffies64() } as u32 | 1;
    let holder = place.cookie;
    if !decide::may_take(holder, place.since, cookie, now) || !exchange(&mut place.cookie, holder, cookie) {
        return false;
    }
    place.since = now;
    place.original = *original;
    place.endpoint = *endpoint;
    true
}

/// The SYN of the socket of `ctx` leaves for `to`. Whether that is a direct connection that has a place.
///
/// # Safety
/// `ctx` must be the context of the hook that runs.
#[inline(always)]
pub unsafe fn leaves(ctx: *mut c_void, to: &Addr) -> bool {
    // SAFETY: the caller vouches for `ctx`.
    let Some(place) = (unsafe { own(ctx) }) else { return false };
    // Of an earlier connection of this socket, which found no route.
    if place.endpoint != *to {
        free(place);
        return false;
    }
    place.since = 0;
    true
}

/// The direct connection of the socket of `ctx`, once its SYN has left.
///
/// # Safety
/// `ctx` must be the context of the hook that runs.
#[inline(always)]
pub unsafe fn of(ctx: *mut c_void) -> Option<&'static mut Direct> {
    // SAFETY: the caller vouches for `ctx`.
    unsafe { own(ctx) }.filter(|place| place.since == 0)
}

/// Gives the place back. What was read of it before was read before anybody else takes it: the exchange is a barrier.
#[inline(always)]
pub fn free(place: &mut Direct) {
    let own = place.cookie;
    exchange(&mut place.cookie, own, 0);
}

/// The place that the socket of `ctx` holds.
#[inline(always)]
unsafe fn own(ctx: *mut c_void) -> Option<&'static mut Direct> {
    // SAFETY: the caller vouches for `ctx`.
    let (place, cookie) = unsafe { place(ctx) }?;
    (place.cookie == cookie).then_some(place)
}

/// The place that the socket's cookie chooses, and the cookie.
#[inline(always)]
unsafe fn place(ctx: *mut c_void) -> Option<(&'static mut Direct, u64)> {
    // SAFETY: the caller vouches for `ctx`.
    let cookie = unsafe { bpf_get_socket_cookie(ctx) };
    let place = DIRECTS.get_ptr_mut(cookie as u32 & (MAX_DIRECTS - 1))?;
    // SAFETY: an element of an array stays where it is. Others write to it only while it is not this socket's.
    Some((unsafe { &mut *place }, cookie))
}

/// Puts `new` where `old` is, in one step. False: it was not there.
#[inline(always)]
fn exchange(at: &mut u64, old: u64, new: u64) -> bool {
    let seen: u64;
    // SAFETY: `at` is valid and aligned. The standard library has no atomics for this target.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({at} + 0, r0, {new})",
            at = in(reg) core::ptr::from_mut(at),
            new = in(reg) new,
            inout("r0") old => seen,
        );
    }
    seen == old
}
