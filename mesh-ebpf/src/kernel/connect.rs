//! Outbound: who connects where, and what becomes of it. The facts for `decide`, and its verdict carried out.

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, bpf_sock_tuple},
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_prandom_u32, bpf_ktime_get_ns,
        bpf_set_retval, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release,
    },
};
use mesh_common::{
    addr::{Addr, Ip},
    event::{Event, kind, path},
    maps::{EndpointKey, GrantKey, Knobs, Namespace, Original, counter, namespace, service},
    refusal::Refusal,
};
use mesh_ebpf::decide::{self, Choice, Class, Verdict};

use super::{
    PROCEED, REFUSE,
    context::{Family, SockAddr},
    directs,
    maps::{CGROUPS, ENDPOINTS, GRANTS, HEARTBEAT, KNOBS, NAMESPACES, SERVICES},
    report::{count, emit},
};

const ECONNREFUSED: i32 = 111;
pub const LOOPBACK4: Ip = Ip::v4([127, 0, 0, 1]);
pub const LOOPBACK6: Ip = Ip([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
/// Depth of the cgroup tree that is searched for a host-mode task, from the root.
const CGROUP_LEVELS: i32 = 8;

/// Who connects.
struct Caller {
    namespace: Namespace,
    workload: u32,
}

/// `connect()`, TCP or UDP.
#[inline(always)]
pub fn connect(sa: &SockAddr) -> i32 {
    let Some(knobs) = knobs() else { return PROCEED };
    let Some(caller) = caller(sa, knobs) else { return PROCEED };
    let dst = sa.addr();
    let tcp = sa.is_tcp();
    match decide::class(knobs, &dst, tcp) {
        Class::Pass => pass(sa),
        Class::Dns => to_resolver(sa, knobs, &caller, dst, tcp, true),
        Class::Lookup(in_virtual_range) => to_service(sa, knobs, &caller, dst, in_virtual_range),
    }
}

/// `sendto()` and `sendmsg()` on an unconnected UDP socket.
#[inline(always)]
pub fn send(sa: &SockAddr) -> i32 {
    let Some(knobs) = knobs() else { return PROCEED };
    let Some(caller) = caller(sa, knobs) else { return PROCEED };
    let dst = sa.addr();
    match decide::class(knobs, &dst, false) {
        Class::Dns => to_resolver(sa, knobs, &caller, dst, false, false),
        Class::Pass | Class::Lookup(_) => PROCEED,
    }
}

/// The settings, once an agent has written them.
#[inline(always)]
pub fn knobs() -> Option<&'static Knobs> {
    let knobs = KNOBS.get(0)?;
    (knobs.abi == mesh_common::ABI_VERSION).then_some(knobs)
}

/// The enrolled workload that the current process belongs to.
#[inline(always)]
fn caller(sa: &SockAddr, knobs: &Knobs) -> Option<Caller> {
    let cookie = sa.netns_cookie();
    // SAFETY: entries are replaced as a whole; a stale copy is as good as one look-up earlier.
    let namespace = *unsafe { NAMESPACES.get(cookie) }?;
    // SAFETY: the helper has no arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    if cgroup == knobs.agent_cgroup {
        return None;
    }
    if namespace.flags & namespace::BY_CGROUP == 0 {
        return Some(Caller { namespace, workload: namespace.workload });
    }
    let workload = workload_of_cgroup(cgroup)?;
    Some(Caller { namespace, workload })
}

/// A host-mode container's workload, also for processes in a cgroup that the container made below its own.
#[inline(always)]
fn workload_of_cgroup(cgroup: u64) -> Option<u32> {
    // SAFETY: a copied u32.
    if let Some(workload) = unsafe { CGROUPS.get(cgroup) } {
        return Some(*workload);
    }
    for level in 1..CGROUP_LEVELS {
        // SAFETY: any level is allowed; one that does not exist gives 0, which is no cgroup's id.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if ancestor == 0 {
            return None;
        }
        // SAFETY: a copied u32.
        if let Some(workload) = unsafe { CGROUPS.get(ancestor) } {
            return Some(*workload);
        }
    }
    None
}

/// Untouched; a socket that was redirected before shows its true peer again.
#[inline(always)]
fn pass(sa: &SockAddr) -> i32 {
    if let Some(original) = sa.original() {
        original.path = 0;
    }
    PROCEED
}

/// A question to a resolver goes to the agent while it lives.
#[inline(always)]
fn to_resolver(sa: &SockAddr, knobs: &Knobs, caller: &Caller, dst: Addr, tcp: bool, may_map: bool) -> i32 {
    let port = knobs.dns_port;
    let Some(to) = listener(sa, knobs, caller, &dst, port, tcp, may_map) else { return pass(sa) };
    let mut original = Original { addr: dst, workload: caller.workload, path: path::DNS, service: 0 };
    if !sa.remember(&mut original) {
        count(counter::MAP_FULL);
        return PROCEED;
    }
    count(counter::DNS);
    sa.set_addr(&to);
    PROCEED
}

#[inline(always)]
fn to_service(sa: &SockAddr, knobs: &Knobs, caller: &Caller, dst: Addr, in_virtual_range: bool) -> i32 {
    // SAFETY: entries are replaced as a whole; see `caller`.
    let service = unsafe { SERVICES.get(dst) };
    let id = service.map_or(0, |s| s.id);
    let guarded = service.is_some_and(|s| s.flags & service::GRANTED_ONLY != 0);
    // SAFETY: presence is all that is read.
    let granted = guarded && unsafe { GRANTS.get(GrantKey { workload: caller.workload, service: id }) }.is_some();
    // SAFETY: no arguments.
    let draw = unsafe { bpf_get_prandom_u32() };
    let original = Original { addr: dst, workload: caller.workload, path: 0, service: id };
    let verdict = match decide::connect(service, in_virtual_range, caller.namespace.flags, draw, granted) {
        Choice::Done(verdict) => verdict,
        Choice::Proxy(otherwise) => match listener(sa, knobs, caller, &dst, knobs.proxy_port, true, true) {
            Some(to) => return redirect(sa, original, path::PROXY, &to, counter::REDIRECTED),
            None => otherwise,
        },
    };
    let (slot, path, counter) = match verdict {
        Verdict::Pass => {
            count(counter::PASSED);
            return pass(sa);
        }
        Verdict::Refuse(refusal) => return refuse(&original, refusal),
        Verdict::Direct(slot) => (slot, path::DIRECT, counter::DIRECT),
        Verdict::FailOpen(slot) => (slot, path::FAIL_OPEN, counter::FAILED_OPEN),
    };
    // SAFETY: entries are replaced as a whole.
    let Some(endpoint) = (unsafe { ENDPOINTS.get(EndpointKey { service: id, slot }) }) else {
        return refuse(&original, Refusal::NoHealthyEndpoint);
    };
    if path == path::FAIL_OPEN {
        emit(&Event {
            kind: kind::FAILED_OPEN,
            refusal: 0,
            workload: original.workload,
            service: id,
            original: dst,
            endpoint: endpoint.addr,
            bytes_sent: 0,
            bytes_received: 0,
            srtt_us: 0,
            retransmits: 0,
        });
    }
    redirect(sa, original, path, &endpoint.addr, counter)
}

#[inline(always)]
fn redirect(sa: &SockAddr, mut original: Original, path: u32, to: &Addr, counter: u32) -> i32 {
    original.path = path;
    if !sa.set_addr(to) {
        return refuse(&original, Refusal::NoHealthyEndpoint);
    }
    // SAFETY: the context of this hook.
    let has_place = path == path::DIRECT && unsafe { directs::remember(sa.as_ptr(), &original, to) };
    if !has_place && !sa.remember(&mut original) {
        count(counter::MAP_FULL);
        return refuse(&original, Refusal::MapFull);
    }
    count(counter);
    PROCEED
}

#[inline(always)]
fn refuse(original: &Original, refusal: Refusal) -> i32 {
    count(counter::REFUSED);
    let event = Event {
        kind: kind::REFUSED,
        refusal: refusal as u32,
        workload: original.workload,
        service: original.service,
        original: original.addr,
        ..Event::default()
    };
    emit(&event);
    // SAFETY: any errno is allowed. Applications know "connection refused"; few expect EPERM from connect().
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}

/// The agent's listener in this namespace, if the agent lives: it beats, and the socket is there and bears its mark.
///
/// An IPv6 destination goes to `::1`, or in namespaces without IPv6 to `::ffff:127.0.0.1`, which `connect()` on a
/// socket that is not IPv6-only accepts; `sendmsg()` does not (`may_map`).
#[inline(always)]
fn listener(
    sa: &SockAddr,
    knobs: &Knobs,
    caller: &Caller,
    dst: &Addr,
    port: u16,
    tcp: bool,
    may_map: bool,
) -> Option<Addr> {
    let native6 = sa.family == Family::V6 && dst.ip.as_v4().is_none();
    let has6 = caller.namespace.flags & namespace::V6 != 0;
    if native6 && !has6 && !may_map {
        return None;
    }
    let beat = HEARTBEAT.get(0).copied().unwrap_or(0);
    // SAFETY: no arguments.
    if !decide::beats(unsafe { bpf_ktime_get_ns() }, beat, knobs.heartbeat_limit_ns) {
        return None;
    }
    let use6 = native6 && has6;
    let present = if use6 { listens6(sa, knobs, port, tcp) } else { listens4(sa, knobs, port, tcp) };
    present.then(|| Addr::new(if use6 { LOOPBACK6 } else { LOOPBACK4 }, port))
}

#[inline(always)]
fn listens4(sa: &SockAddr, knobs: &Knobs, port: u16, tcp: bool) -> bool {
    // SAFETY: all zeroes are a valid tuple.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    // SAFETY: the IPv4 half of the union is written before it is read.
    let v4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
    v4.daddr = u32::from_ne_bytes([127, 0, 0, 1]);
    v4.dport = port.to_be();
    let size = size_of_val(v4) as u32;
    marked(sa, knobs, &mut tuple, size, tcp)
}

#[inline(always)]
fn listens6(sa: &SockAddr, knobs: &Knobs, port: u16, tcp: bool) -> bool {
    // SAFETY: all zeroes are a valid tuple.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    // SAFETY: the IPv6 half of the union is written before it is read.
    let v6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
    v6.daddr[3] = 1u32.to_be();
    v6.dport = port.to_be();
    let size = size_of_val(v6) as u32;
    marked(sa, knobs, &mut tuple, size, tcp)
}

/// Whether a socket with the agent's mark receives what is sent to `tuple`.
#[inline(always)]
fn marked(sa: &SockAddr, knobs: &Knobs, tuple: &mut bpf_sock_tuple, size: u32, tcp: bool) -> bool {
    let here = BPF_F_CURRENT_NETNS as i64 as u64;
    let sock = if tcp {
        // SAFETY: `tuple` is initialised for `size` bytes.
        unsafe { bpf_sk_lookup_tcp(sa.as_ptr(), tuple, size, here, 0) }
    } else {
        // SAFETY: as above.
        unsafe { bpf_sk_lookup_udp(sa.as_ptr(), tuple, size, here, 0) }
    };
    if sock.is_null() {
        return false;
    }
    // SAFETY: not null, and held until the release below.
    let mark = unsafe { (*sock).mark };
    // SAFETY: releases the reference that the look-up took.
    unsafe { bpf_sk_release(sock.cast()) };
    mark == knobs.mark
}
