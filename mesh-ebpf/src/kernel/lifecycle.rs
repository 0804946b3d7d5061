//! TCP from SYN to close: where a redirected connection was meant to go, told to the agent before it can accept; what a
//! direct connection carried, told when it ends; and what an application closed unread.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops,
    },
    helpers::bpf_get_netns_cookie,
    programs::SockOpsContext,
};
use mesh_common::{
    addr::{Addr, Ip},
    event::{Event, kind, path},
    maps::{FlowKey, Original, counter},
};

use super::{
    context::original_of,
    directs,
    maps::FLOWS,
    report::{count, emit},
    unread,
};

const AF_INET: u32 = 2;
/// Of <linux/tcp_states.h>.
const FIN_WAIT1: u32 = 4;
const FIN_WAIT2: u32 = 5;
const TIME_WAIT: u32 = 6;
const CLOSE: u32 = 7;
const CLOSING: u32 = 11;

#[inline(always)]
pub fn socket_operation(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB if unread::concerns(ctx) => watch(ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == CLOSE => closed(ctx, ctx.arg(0)),
        _ => {}
    }
}

/// Before the SYN leaves: the source address and port are chosen.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    // SAFETY: the context of this hook.
    if unsafe { directs::leaves(ctx.as_ptr(), &remote(ctx)) } {
        return watch(ctx);
    }
    let Some(original) = original(ctx) else { return };
    match original.path {
        path::PROXY | path::DNS => {
            if FLOWS.insert(flow_key(ctx), original, 0).is_err() {
                // The agent will find no record, refuse the connection and say so.
                count(counter::MAP_FULL);
            }
        }
        path::DIRECT => {}
        _ => return,
    }
    watch(ctx);
}

/// Asks to be called when the connection changes its state.
#[inline(always)]
fn watch(ctx: &SockOpsContext) {
    // Failing only loses the clean-up of a connection that ends before it is accepted, one statistic, or a request that
    // could have been sent again.
    let _ = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
}

#[inline(always)]
fn closed(ctx: &SockOpsContext, before: u32) {
    // SAFETY: the context of this hook.
    if let Some(direct) = unsafe { directs::of(ctx.as_ptr()) } {
        report(ctx, &direct.original, direct.endpoint);
        directs::free(direct);
        return;
    }
    let Some(original) = original(ctx) else { return unread::note(ctx) };
    match original.path {
        // The client has said all it had to say and left; the agent may not have accepted yet, and has to deliver that.
        path::PROXY | path::DNS if matches!(before, FIN_WAIT1 | FIN_WAIT2 | TIME_WAIT | CLOSING) => {}
        path::PROXY | path::DNS => {
            // Usually gone: the agent removes it when it accepts.
            let _ = FLOWS.remove(flow_key(ctx));
        }
        path::DIRECT => report(ctx, &original, remote(ctx)),
        _ => {}
    }
}

/// Tells the agent what a direct connection carried.
#[inline(always)]
fn report(ctx: &SockOpsContext, original: &Original, endpoint: Addr) {
    let ops = ctx.ops;
    // SAFETY: valid context, here and below; the verifier checks each offset.
    let (bytes_sent, bytes_received) = unsafe { ((*ops).bytes_acked, (*ops).bytes_received) };
    // SAFETY: as above.
    let (srtt_us, retransmits) = unsafe { ((*ops).srtt_us, (*ops).total_retrans) };
    emit(&Event {
        kind: kind::DIRECT_CLOSED,
        refusal: 0,
        workload: original.workload,
        service: original.service,
        original: original.addr,
        endpoint,
        bytes_sent,
        bytes_received,
        // The kernel keeps eight times the value.
        srtt_us: srtt_us >> 3,
        retransmits,
    });
}

#[inline(always)]
fn original(ctx: &SockOpsContext) -> Option<Original> {
    // SAFETY: valid context.
    let sock = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sock.is_null() {
        return None;
    }
    // SAFETY: not null.
    unsafe { original_of(sock, None).as_ref() }.copied()
}

/// The client as the agent's listener will see it.
#[inline(always)]
fn flow_key(ctx: &SockOpsContext) -> FlowKey {
    // SAFETY: the helper accepts this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    FlowKey { netns, ip: local_ip(ctx.ops), port: u64::from(ctx.local_port()) }
}

#[inline(always)]
pub fn local_ip(ops: *mut bpf_sock_ops) -> Ip {
    // SAFETY: valid context, here and below.
    if unsafe { (*ops).family } == AF_INET {
        // SAFETY: as above.
        return Ip::v4(unsafe { (*ops).local_ip4 }.to_ne_bytes());
    }
    // SAFETY: as above; volatile keeps each access four bytes wide, as the verifier wants it.
    ip_of(core::array::from_fn(|i| unsafe { (&raw const (*ops).local_ip6[i]).read_volatile() }))
}

#[inline(always)]
pub fn remote(ctx: &SockOpsContext) -> Addr {
    let ops = ctx.ops;
    // SAFETY: valid context, here and below.
    let ip = if unsafe { (*ops).family } == AF_INET {
        // SAFETY: as above.
        Ip::v4(unsafe { (*ops).remote_ip4 }.to_ne_bytes())
    } else {
        // SAFETY: as in `local_ip`.
        ip_of(core::array::from_fn(|i| unsafe { (&raw const (*ops).remote_ip6[i]).read_volatile() }))
    };
    // Network order in the low or high half, depending on the machine's byte order: a be32 of the port.
    Addr::new(ip, u32::from_be(ctx.remote_port()) as u16)
}

#[inline(always)]
fn ip_of(words: [u32; 4]) -> Ip {
    let mut ip = [0; 16];
    for (bytes, word) in ip.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *bytes = word.to_ne_bytes();
    }
    Ip(ip)
}
