//! Key, value, name and capacity of every BPF map. The image of the snapshot that the hooks read, in one list.
//!
//! Integers are in host order: kernel and agent share the machine. Addresses are [`Addr`], in network order. No
//! padding anywhere, because hash keys are compared byte by byte. Must not know who writes or reads a map when.

use crate::addr::{Addr, Ip};

/// Most namespaces (about: tasks in bridge or awsvpc mode) of one host.
pub const MAX_NAMESPACES: u32 = 4096;
/// Most containers in host network mode.
pub const MAX_CGROUPS: u32 = 16384;
/// Most service addresses: two families per service port, and one per known endpoint.
pub const MAX_SERVICES: u32 = 262_144;
/// Most endpoints that the kernel can fall back to or connect to directly.
pub const MAX_ENDPOINTS: u32 = 262_144;
/// Most (workload, service) pairs of services whose policy does not admit everybody.
pub const MAX_GRANTS: u32 = 262_144;
/// Most connections between `connect()` and the agent's `accept()`.
pub const MAX_FLOWS: u32 = 65_536;
/// Direct connections whose original destination has a place of its own; what is more is kept with the socket. A power
/// of two, because the lowest bits of a socket's cookie choose the place.
pub const MAX_DIRECTS: u32 = 16_384;
/// Most connections that applications have closed unread, and that the agent has not asked about yet.
pub const MAX_CLOSES: u32 = 4096;
/// Size of the ring buffer of [`crate::event::Event`]s, in bytes.
pub const EVENTS_BYTES: u32 = 256 * 1024;

/// `KNOBS[0]`: the settings that every hook reads first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Knobs {
    /// [`crate::ABI_VERSION`] of whoever wrote this; zero until the agent is ready, and then every hook passes.
    pub abi: u32,
    /// [`knobs`] bits.
    pub flags: u32,
    /// cgroup id of the agent itself: what it connects to is never intercepted.
    pub agent_cgroup: u64,
    /// A heartbeat older than this means that the agent hangs. Nanoseconds.
    pub heartbeat_limit_ns: u64,
    /// Prefix of the virtual addresses; a port of them that no service has is refused.
    pub vip4: [u8; 4],
    pub vip4_mask: [u8; 4],
    pub vip6: [u8; 16],
    pub vip6_mask: [u8; 16],
    /// The agent's listeners in each namespace; host order.
    pub proxy_port: u16,
    pub dns_port: u16,
    /// `SO_MARK` of the agent's listeners. A task without CAP_NET_ADMIN cannot forge it.
    pub mark: u32,
}

/// Bits of [`Knobs::flags`].
pub mod knobs {
    /// Send port 53 of enrolled tasks to the agent.
    pub const DNS: u32 = 1;
}

/// `HEARTBEAT[0]`: `CLOCK_MONOTONIC` in nanoseconds, as `bpf_ktime_get_ns` reads it.
pub type Heartbeat = u64;

/// Value of `NAMESPACES`, keyed by network namespace cookie (u64): who lives there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// The one workload of this namespace; with [`namespace::BY_CGROUP`] look in `CGROUPS` (u64 cgroup id → u32).
    pub workload: u32,
    /// [`namespace`] bits.
    pub flags: u32,
}

/// Bits of [`Namespace::flags`].
pub mod namespace {
    /// The host's namespace: workloads are told apart by cgroup.
    pub const BY_CGROUP: u32 = 1;
    /// The agent listens on `::1` too; otherwise IPv6 sockets are sent to `::ffff:127.0.0.1`.
    pub const V6: u32 = 1 << 1;
    /// Local endpoints can be reached from here by their own address.
    pub const DIRECT: u32 = 1 << 2;
}

/// Value of `SERVICES`, keyed by [`Addr`]: a virtual address and port, or a known endpoint's own address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Number of this service port: the first half of an `ENDPOINTS` key.
    pub id: u32,
    /// [`service`] bits.
    pub flags: u32,
    /// Slots `0..local` are endpoints of this host, by the address that other local tasks can use.
    pub local: u32,
    /// Slots `local..total` are all healthy endpoints by an address that any task can use without the mesh.
    pub total: u32,
}

/// Bits of [`Service::flags`].
pub mod service {
    /// A byte stream: no request needs to be seen, so a local endpoint may be connected to directly.
    pub const OPAQUE: u32 = 1;
    /// With the agent dead or hung, connect to an endpoint in plaintext; without this bit, refuse.
    pub const FAIL_OPEN: u32 = 1 << 1;
    /// Not everybody may call it: a connection that the agent does not carry needs an entry in `GRANTS`.
    pub const GRANTED_ONLY: u32 = 1 << 2;
}

/// Key of `ENDPOINTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointKey {
    pub service: u32,
    pub slot: u32,
}

/// Value of `ENDPOINTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    pub addr: Addr,
}

/// Key of `GRANTS` (value u32, always 1): this workload may call this service.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrantKey {
    pub workload: u32,
    pub service: u32,
}

/// What a redirected socket had asked for: value of the socket storage `ORIGINALS`, of `FLOWS` and of `QUERIES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Original {
    /// The destination that the application named.
    pub addr: Addr,
    /// The workload that named it.
    pub workload: u32,
    /// [`crate::event::path`] number: what was done with the connection.
    pub path: u32,
    /// Number of the service port.
    pub service: u32,
}

/// Value of `DIRECTS`: a direct connection, in the place that its socket's cookie chooses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direct {
    /// The socket's; 0: the place is free.
    pub cookie: u64,
    pub original: Original,
    /// Where the connection went.
    pub endpoint: Addr,
    /// When the place was taken, in ticks; 0 once the SYN leaves.
    pub since: u32,
}

/// Key of `FLOWS` (TCP) and `QUERIES` (UDP): a client socket as the agent's listener sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Network namespace cookie.
    pub netns: u64,
    pub ip: Ip,
    /// Host order, widened so that there is no padding.
    pub port: u64,
}

/// Key of `CLOSES`: a connection of which both ends are in one namespace, as the one to an application that the agent opens.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CloseKey {
    /// Network namespace cookie.
    pub netns: u64,
    /// Who connected.
    pub client: Addr,
    /// Who accepted.
    pub server: Addr,
}

/// Value of `CLOSES`: how an application left a connection that it closed with something unread in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Close {
    /// So many octets it had read, of all that it was ever sent on this connection.
    pub taken: u64,
    /// When; as [`Heartbeat`].
    pub at: u64,
}

/// Where this kernel keeps what no helper tells, in octets from the beginning of its `struct tcp_sock`. Written into the
/// programs when they are loaded; all zero where it is not known, and then they do not look.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketLayout {
    /// `u32 copied_seq`: what the application has read.
    pub copied_seq: u32,
    /// `u32 sk_receive_queue.qlen`: how many segments wait for it.
    pub queued: u32,
    /// `struct socket *sk_socket`: what it holds; null before it has accepted the connection.
    pub socket: u32,
}

/// Indices of the per-CPU array `COUNTERS` (u64): what the hooks did.
pub mod counter {
    pub const REDIRECTED: u32 = 0;
    pub const DIRECT: u32 = 1;
    pub const FAILED_OPEN: u32 = 2;
    pub const REFUSED: u32 = 3;
    pub const DNS: u32 = 4;
    /// A map had no room; the connection was refused.
    pub const MAP_FULL: u32 = 5;
    /// The ring buffer had no room; the event is lost, the verdict stands.
    pub const EVENT_LOST: u32 = 6;
    pub const PASSED: u32 = 7;
    /// How many counters there are.
    pub const COUNT: u32 = 8;
}
