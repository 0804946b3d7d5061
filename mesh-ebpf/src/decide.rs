//! The verdicts of the connect hooks, as pure functions of plain data.
//!
//! What doubt means is decided here once: a destination that nobody registered passes untouched; a destination that is
//! registered never passes unseen.

use mesh_common::{
    addr::{Addr, Ip},
    maps::{Knobs, Service, knobs, namespace, service},
    refusal::Refusal,
};

/// What kind of destination an address is, before any map of services is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Never intercepted.
    Pass,
    /// A question to a resolver.
    Dns,
    /// Ask the services; with `true` it lies in a range that only the mesh uses.
    Lookup(bool),
}

/// What to do with a connection of an enrolled workload, as far as the maps tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Done(Verdict),
    /// To the agent's listener in this namespace while it lives; otherwise this.
    Proxy(Verdict),
}

/// What to do with a connection that the proxy does not carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    /// To the local endpoint in this slot.
    Direct(u32),
    /// To the endpoint in this slot, in plaintext, because the agent is away.
    FailOpen(u32),
    Refuse(Refusal),
}

/// What kind of destination `dst` is.
#[inline(always)]
pub fn class(knobs: &Knobs, dst: &Addr, tcp: bool) -> Class {
    if knobs.flags & knobs::DNS != 0 && dst.port() == 53 {
        return Class::Dns;
    }
    if !tcp || never_intercepted(&dst.ip) {
        return Class::Pass;
    }
    Class::Lookup(is_virtual(knobs, &dst.ip))
}

/// Loopback, unspecified, link-local (IMDS, task credentials and metadata, Amazon DNS and NTP live there), and the
/// same services over IPv6. Source: AWS documentation of IMDS, ECS task metadata and Amazon Time Sync.
#[inline(always)]
pub fn never_intercepted(ip: &Ip) -> bool {
    if let Some([a, b, _, _]) = ip.as_v4() {
        return a == 127 || a == 0 || (a == 169 && b == 254);
    }
    let ip = &ip.0;
    let link_local = ip[0] == 0xfe && ip[1] & 0xc0 == 0x80;
    let amazon = ip[0] == 0xfd && ip[1] == 0x00 && ip[2] == 0x0e && ip[3] == 0xc2;
    link_local || amazon || is_low(ip)
}

/// `::` and `::1`.
#[inline(always)]
fn is_low(ip: &[u8; 16]) -> bool {
    matches!(ip, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 | 1])
}

/// Whether the address lies in one of the two ranges of virtual addresses.
#[inline(always)]
pub fn is_virtual(knobs: &Knobs, ip: &Ip) -> bool {
    match ip.as_v4() {
        Some(v4) => {
            let (ip, net, mask) =
                (u32::from_ne_bytes(v4), u32::from_ne_bytes(knobs.vip4), u32::from_ne_bytes(knobs.vip4_mask));
            mask != 0 && ip & mask == net
        }
        None => {
            let (ip, net, mask) =
                (u128::from_ne_bytes(ip.0), u128::from_ne_bytes(knobs.vip6), u128::from_ne_bytes(knobs.vip6_mask));
            mask != 0 && ip & mask == net
        }
    }
}

/// Decides over a destination of [`Class::Lookup`]. `granted` matters only for services with `GRANTED_ONLY`; `draw` is a
/// random number. Whether the agent lives is asked afterwards, because it costs a look-up that most verdicts spare.
#[inline(always)]
pub fn connect(
    service: Option<&Service>,
    in_virtual_range: bool,
    namespace_flags: u32,
    draw: u32,
    granted: bool,
) -> Choice {
    let Some(service) = service else {
        let verdict = if in_virtual_range { Verdict::Refuse(Refusal::UnknownPort) } else { Verdict::Pass };
        return Choice::Done(verdict);
    };
    let direct = service.flags & service::OPAQUE != 0
        && service.local > 0
        && namespace_flags & namespace::DIRECT != 0
        && (service.flags & service::GRANTED_ONLY == 0 || granted);
    if direct {
        return Choice::Done(Verdict::Direct(draw % service.local));
    }
    Choice::Proxy(without_agent(service, draw, granted))
}

/// What the operator chose for the service when the agent is dead or hangs. To fail open is to do without mTLS, not
/// without the policy.
#[inline(always)]
fn without_agent(service: &Service, draw: u32, granted: bool) -> Verdict {
    if service.flags & service::FAIL_OPEN == 0 {
        return Verdict::Refuse(Refusal::AgentAwayFailClosed);
    }
    if service.flags & service::GRANTED_ONLY != 0 && !granted {
        return Verdict::Refuse(Refusal::Denied);
    }
    if service.total <= service.local {
        return Verdict::Refuse(Refusal::NoHealthyEndpoint);
    }
    Verdict::FailOpen(service.local + draw % (service.total - service.local))
}

/// How long a place in `DIRECTS` is kept for a connection whose SYN has not left, in ticks of the kernel: one minute, or
/// ten where it ticks a hundred times a second. Usually it never will leave, because there was no route.
const ABANDONED: u32 = 60_000;

/// Whether the place in `DIRECTS` that `cookie` chooses, and which `place` holds since `since`, is `cookie`'s to take.
#[inline(always)]
pub fn may_take(place: u64, since: u32, cookie: u64, now: u32) -> bool {
    place == 0 || place == cookie || (since != 0 && now.wrapping_sub(since) > ABANDONED)
}

/// Whether a heartbeat of `beat` still counts at `now`; both in nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn beats(now: u64, beat: u64, limit: u64) -> bool {
    now.saturating_sub(beat) <= limit
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::SocketAddr;

    const OPEN: Service = Service { id: 1, flags: service::FAIL_OPEN, local: 1, total: 3 };

    fn addr(text: &str) -> Addr {
        text.parse::<SocketAddr>().expect("a literal").into()
    }

    fn knobs() -> Knobs {
        Knobs {
            flags: knobs::DNS,
            vip4: [240, 240, 0, 0],
            vip4_mask: [255, 255, 0, 0],
            vip6: [0xfd, 0x65, 0x63, 0x73, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            vip6_mask: [255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ..Knobs::default()
        }
    }

    fn class_of(text: &str) -> Class {
        class(&knobs(), &addr(text), true)
    }

    #[test]
    fn the_never_list_passes() {
        for text in [
            "127.0.0.1:80",
            "127.9.9.9:15001",
            "0.0.0.0:80",
            "169.254.169.254:80",
            "169.254.170.2:80",
            "169.254.172.1:15008",
            "[::1]:80",
            "[::]:80",
            "[fe80::1]:80",
            "[febf::1]:80",
            "[fd00:ec2::254]:80",
            "[::ffff:169.254.169.254]:80",
            "[::ffff:127.0.0.1]:80",
        ] {
            assert_eq!(class_of(text), Class::Pass, "{text}");
        }
    }

    #[test]
    fn everything_else_is_looked_up() {
        for text in ["10.0.0.1:80", "169.253.0.1:80", "[fec0::1]:80", "[fd00:ec3::1]:80", "[::2]:80", "8.8.8.8:443"] {
            assert_eq!(class_of(text), Class::Lookup(false), "{text}");
        }
        for text in ["240.240.0.1:80", "240.240.255.254:1", "[fd65:6373::1]:9", "[::ffff:240.240.1.1]:80"] {
            assert_eq!(class_of(text), Class::Lookup(true), "{text}");
        }
        assert_eq!(class_of("240.241.0.1:80"), Class::Lookup(false));
    }

    #[test]
    fn port_53_is_dns_whoever_the_resolver_is() {
        for text in ["10.0.0.2:53", "169.254.169.253:53", "127.0.0.53:53", "[fd00:ec2::253]:53"] {
            assert_eq!(class_of(text), Class::Dns, "{text}");
            assert_eq!(class(&knobs(), &addr(text), false), Class::Dns, "{text}");
        }
        let off = Knobs { flags: 0, ..knobs() };
        assert_eq!(class(&off, &addr("10.0.0.2:53"), false), Class::Pass);
    }

    #[test]
    fn udp_passes() {
        assert_eq!(class(&knobs(), &addr("240.240.0.1:80"), false), Class::Pass);
    }

    #[test]
    fn unset_knobs_have_no_virtual_range() {
        assert!(!is_virtual(&Knobs::default(), &Ip::v4([0, 0, 0, 0])));
    }

    fn choice(service: Option<Service>, range: bool, flags: u32, granted: bool) -> Choice {
        connect(service.as_ref(), range, flags, 7, granted)
    }

    #[test]
    fn strangers_pass_and_unknown_ports_are_refused() {
        assert_eq!(choice(None, false, 0, true), Choice::Done(Verdict::Pass));
        assert_eq!(choice(None, true, 0, true), Choice::Done(Verdict::Refuse(Refusal::UnknownPort)));
    }

    #[test]
    fn the_proxy_while_it_lives_then_as_the_operator_chose() {
        let direct = namespace::DIRECT;
        assert_eq!(choice(Some(OPEN), true, direct, true), Choice::Proxy(Verdict::FailOpen(2)));
        let closed = Service { flags: 0, ..OPEN };
        let away = Verdict::Refuse(Refusal::AgentAwayFailClosed);
        assert_eq!(choice(Some(closed), true, direct, true), Choice::Proxy(away));
        let empty = Service { local: 0, total: 0, ..OPEN };
        let none = Verdict::Refuse(Refusal::NoHealthyEndpoint);
        assert_eq!(choice(Some(empty), true, direct, true), Choice::Proxy(none));
    }

    #[test]
    fn opaque_and_local_is_direct() {
        let opaque = Service { flags: service::OPAQUE, local: 2, total: 4, ..OPEN };
        assert_eq!(choice(Some(opaque), true, namespace::DIRECT, true), Choice::Done(Verdict::Direct(1)));
        assert!(matches!(choice(Some(opaque), true, 0, true), Choice::Proxy(_)), "awsvpc goes through the agent");
        let remote = Service { local: 0, ..opaque };
        assert!(matches!(choice(Some(remote), true, namespace::DIRECT, true), Choice::Proxy(_)));
    }

    #[test]
    fn a_guarded_service_is_direct_only_for_the_granted() {
        let guarded = Service { flags: service::OPAQUE | service::GRANTED_ONLY, ..OPEN };
        assert_eq!(choice(Some(guarded), true, namespace::DIRECT, true), Choice::Done(Verdict::Direct(0)));
        let away = Verdict::Refuse(Refusal::AgentAwayFailClosed);
        assert_eq!(choice(Some(guarded), true, namespace::DIRECT, false), Choice::Proxy(away));
    }

    #[test]
    fn the_policy_holds_while_the_agent_is_away() {
        let guarded = Service { flags: service::FAIL_OPEN | service::GRANTED_ONLY, ..OPEN };
        assert_eq!(choice(Some(guarded), true, 0, true), Choice::Proxy(Verdict::FailOpen(2)));
        assert_eq!(choice(Some(guarded), true, 0, false), Choice::Proxy(Verdict::Refuse(Refusal::Denied)));
        let closed = Service { flags: service::GRANTED_ONLY, ..OPEN };
        let away = Verdict::Refuse(Refusal::AgentAwayFailClosed);
        assert_eq!(choice(Some(closed), true, 0, false), Choice::Proxy(away), "the operator's choice comes first");
    }

    #[test]
    fn every_slot_is_inside_its_part() {
        for draw in 0..50 {
            for (local, total) in [(0, 1), (1, 2), (3, 7)] {
                let service = Service { id: 1, flags: service::OPAQUE | service::FAIL_OPEN, local, total };
                match connect(Some(&service), true, namespace::DIRECT, draw, true) {
                    Choice::Done(Verdict::Direct(slot)) => assert!(slot < local),
                    Choice::Proxy(Verdict::FailOpen(slot)) => assert!((local..total).contains(&slot)),
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_place_is_taken_when_it_is_free_or_its_own_or_abandoned() {
        let now = 7_u32;
        let long_ago = now.wrapping_sub(ABANDONED + 1);
        assert!(may_take(0, 0, 5, now));
        assert!(may_take(5, 0, 5, now), "the same socket connects again");
        assert!(!may_take(6, 0, 5, now), "a living connection's");
        assert!(!may_take(6, now.wrapping_sub(ABANDONED), 5, now), "its SYN may be about to leave");
        assert!(may_take(6, long_ago, 5, now));
    }

    #[test]
    fn a_heartbeat_grows_old() {
        assert!(beats(10, 5, 5));
        assert!(!beats(11, 5, 5));
        assert!(beats(3, 5, 0), "a beat written after `now` was read");
    }
}
