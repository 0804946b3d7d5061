//! The way back: applications see the address they asked for, and the agent learns what a UDP question was meant for.

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_tuple},
    helpers::{bpf_get_current_cgroup_id, bpf_sk_lookup_udp, bpf_sk_release},
};
use mesh_common::{
    addr::{Addr, Ip},
    event::path,
    maps::{FlowKey, Knobs, Original},
};

use super::{
    connect::{LOOPBACK4, LOOPBACK6, knobs},
    context::{Family, SockAddr, original_of},
    directs,
    maps::QUERIES,
};

/// `getpeername()`: the destination that was asked for.
#[inline(always)]
pub fn peer_name(sa: &SockAddr) {
    // SAFETY: the context of this hook.
    if sa.is_tcp()
        && let Some(direct) = unsafe { directs::of(sa.as_ptr()) }
    {
        sa.set_addr(&direct.original.addr);
    } else if let Some(original) = sa.original()
        && original.path != 0
    {
        sa.set_addr(&original.addr);
    }
}

/// `recvmsg()` on UDP: an answer of the agent seems to come from the resolver that was asked; and when the agent itself
/// receives a question, the resolver that the asking socket had named is noted for it.
#[inline(always)]
pub fn receive(sa: &SockAddr) {
    let Some(knobs) = knobs() else { return };
    let from = sa.addr();
    // Only the agent has that port on loopback here; from elsewhere anybody may send from a port of this number, and must
    // not look like the resolver.
    if from.port() == knobs.dns_port && (from.ip == LOOPBACK4 || from.ip == LOOPBACK6) {
        if let Some(original) = sa.original()
            && original.path == path::DNS
        {
            sa.set_addr(&original.addr);
        }
        return;
    }
    // SAFETY: no arguments.
    if unsafe { bpf_get_current_cgroup_id() } != knobs.agent_cgroup {
        return;
    }
    let sock = sa.sock();
    // SAFETY: the context's socket is valid.
    if unsafe { (*sock).src_port } != u32::from(knobs.dns_port) {
        return;
    }
    if let Some(original) = asked(sa, knobs, &from) {
        let key = FlowKey { netns: sa.netns_cookie(), ip: from.ip, port: u64::from(from.port()) };
        // A lost entry is found missing by the agent, which then asks the host's own resolver.
        let _ = QUERIES.insert(key, original, 0);
    }
}

/// What the socket that sent from `from` had asked for.
#[inline(always)]
fn asked(sa: &SockAddr, knobs: &Knobs, from: &Addr) -> Option<Original> {
    // SAFETY: all zeroes are a valid tuple.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let port = u16::from_ne_bytes(from.port);
    let size = match (sa.family, from.ip.as_v4()) {
        (_, Some(v4)) => {
            // SAFETY: the IPv4 half of the union is written before it is read.
            let t = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
            t.saddr = u32::from_ne_bytes([127, 0, 0, 1]);
            t.sport = knobs.dns_port.to_be();
            t.daddr = u32::from_ne_bytes(v4);
            t.dport = port;
            size_of_val(t) as u32
        }
        (Family::V6, None) => {
            // SAFETY: the IPv6 half of the union is written before it is read.
            let t = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
            t.saddr[3] = 1u32.to_be();
            t.sport = knobs.dns_port.to_be();
            let Ip(ip) = from.ip;
            let (words, _) = ip.as_chunks::<4>();
            for i in 0..4 {
                t.daddr[i] = u32::from_ne_bytes(words[i]);
            }
            t.dport = port;
            size_of_val(t) as u32
        }
        (Family::V4, None) => return None,
    };
    let here = BPF_F_CURRENT_NETNS as i64 as u64;
    // The size must be a constant in each call for the verifier.
    // SAFETY: `tuple` is initialised for `size` bytes.
    let sender: *mut bpf_sock = unsafe { bpf_sk_lookup_udp(sa.as_ptr(), &raw mut tuple, size, here, 0) };
    if sender.is_null() {
        return None;
    }
    // SAFETY: not null, held until the release below.
    let original = unsafe { original_of(sender, None).as_ref() }.copied();
    // SAFETY: releases the reference that the look-up took.
    unsafe { bpf_sk_release(sender.cast()) };
    original.filter(|o| o.path == path::DNS)
}
