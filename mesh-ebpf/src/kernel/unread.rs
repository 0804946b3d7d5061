//! What an application had not read when it closed a connection that the agent had opened to it: told to the agent before
//! the reset is, which such a close sends.
//!
//! A close throws away what waits in the receive queue, and what was thrown away was never copied to anybody: `copied_seq`
//! stays behind `rcv_nxt` (`__tcp_close` in the kernel's `net/ipv4/tcp.c`). The state changes before the reset is sent, so
//! the hook runs in between. Must not know what was sent.

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{bpf_sock, tcp_sock},
    helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_skc_to_tcp_sock},
    programs::SockOpsContext,
};
use mesh_common::{
    addr::Addr,
    maps::{Close, CloseKey, SocketLayout},
};

use super::{
    connect::knobs,
    lifecycle::{local_ip, remote},
    maps::{CLOSES, NAMESPACES},
};

/// Known to the verifier, which checks each field that is read against the kernel's own types, and leaves all of this out
/// where nothing is known.
#[unsafe(no_mangle)]
static SOCKET_LAYOUT: Global<SocketLayout> = Global::new(SocketLayout { copied_seq: 0, queued: 0, socket: 0 });

/// Whether the connection that was just accepted may be one of the agent's to an application: both ends are in one enrolled
/// namespace, and it is not the agent that accepts it.
#[inline(always)]
pub fn concerns(ctx: &SockOpsContext) -> bool {
    if SOCKET_LAYOUT.load().copied_seq == 0 || local_ip(ctx.ops) != remote(ctx).ip {
        return false;
    }
    let Some(knobs) = knobs() else { return false };
    let Some(sock) = sock(ctx) else { return false };
    // SAFETY: not null; the verifier checks the offset.
    if unsafe { (*sock).mark } == knobs.mark {
        return false;
    }
    // SAFETY: the helper accepts this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: only whether there is one.
    unsafe { NAMESPACES.get(netns) }.is_some()
}

/// The connection is over. Notes what the application had read, if there was more and it can read no more.
#[inline(always)]
pub fn note(ctx: &SockOpsContext) {
    let layout = SOCKET_LAYOUT.load();
    if layout.copied_seq == 0 {
        return;
    }
    let Some(sock) = sock(ctx) else { return };
    // SAFETY: the verifier knows the socket as one, and not null.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sock.cast()) };
    if tcp.is_null() {
        return;
    }
    // SAFETY: valid context.
    let (received, bytes) = unsafe { ((*ctx.ops).rcv_nxt, (*ctx.ops).bytes_received) };
    // SAFETY: not null, and the verifier knows what is at the offset.
    let unread = received.wrapping_sub(unsafe { field::<u32>(tcp, layout.copied_seq) });
    if unread == 0 {
        return;
    }
    // A connection that broke otherwise keeps its queue, and its holder may read it today or tomorrow. One that nobody had
    // accepted has no holder, and ends with its listener.
    // SAFETY: as above.
    let closed = unsafe { field::<u32>(tcp, layout.queued) } == 0;
    // SAFETY: as above.
    if !closed && unsafe { field::<u64>(tcp, layout.socket) } != 0 {
        return;
    }
    let key = CloseKey {
        // SAFETY: the helper accepts this context.
        netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        client: remote(ctx),
        server: Addr::new(local_ip(ctx.ops), ctx.local_port() as u16),
    };
    // Both counts hold the end of the other direction as one more, so it falls out.
    // SAFETY: no arguments.
    let close = Close { taken: bytes.wrapping_sub(u64::from(unread)), at: unsafe { bpf_ktime_get_ns() } };
    // Without it the agent knows no more than without this hook.
    let _ = CLOSES.insert(key, close, 0);
}

#[inline(always)]
fn sock(ctx: &SockOpsContext) -> Option<*mut bpf_sock> {
    // SAFETY: valid context.
    let sock = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    (!sock.is_null()).then_some(sock)
}

/// What is so many octets behind the beginning of `tcp`.
///
/// # Safety
/// `tcp` must be a socket that the verifier accepts, and the kernel have a `T` there.
#[inline(always)]
unsafe fn field<T: Copy>(tcp: *mut tcp_sock, offset: u32) -> T {
    // SAFETY: the caller vouches for it.
    unsafe { tcp.cast::<u8>().add(offset as usize).cast::<T>().read_volatile() }
}
