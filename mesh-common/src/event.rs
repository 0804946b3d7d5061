//! What the hooks report through the ring buffer. One fixed record, so that reading cannot fail half-way.
//!
//! Must not know who reads it.

use crate::addr::Addr;

/// A report from the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// [`kind`] number.
    pub kind: u32,
    /// [`crate::refusal::Refusal`] number for [`kind::REFUSED`], otherwise 0.
    pub refusal: u32,
    pub workload: u32,
    /// Number of the service port, 0 when unknown.
    pub service: u32,
    /// The destination that the application named.
    pub original: Addr,
    /// Where the connection went: the endpoint of a direct or fail-open connection.
    pub endpoint: Addr,
    /// At close of a direct connection, as the client's socket counted them. The kernel counts sequence numbers, so a SYN
    /// or FIN adds one.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Smoothed round-trip time in microseconds, and retransmitted segments, of a direct connection.
    pub srtt_us: u32,
    pub retransmits: u32,
}

/// Values of [`Event::kind`].
pub mod kind {
    /// The hook refused a connection.
    pub const REFUSED: u32 = 1;
    /// The agent was dead or hung, and the kernel balanced by itself, in plaintext.
    pub const FAILED_OPEN: u32 = 2;
    /// A direct connection between tasks of this host has ended.
    pub const DIRECT_CLOSED: u32 = 3;
}

/// Values of [`crate::maps::Original::path`].
pub mod path {
    /// Rewritten to the agent's proxy.
    pub const PROXY: u32 = 1;
    /// Rewritten to a local endpoint.
    pub const DIRECT: u32 = 2;
    /// Rewritten to any endpoint, in plaintext.
    pub const FAIL_OPEN: u32 = 3;
    /// Rewritten to the agent's DNS server.
    pub const DNS: u32 = 4;
}

impl Event {
    /// Reads a record as it lies in the ring buffer; `None` unless the length is exactly right.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<4>();
        let words: &[[u8; 4]; 20] = words.try_into().ok()?;
        if !rest.is_empty() {
            return None;
        }
        let u32_at = |i: usize| u32::from_ne_bytes(words[i]);
        let addr_at = |i: usize| {
            let mut ip = [0; 16];
            ip.copy_from_slice(words[i..i + 4].as_flattened());
            let [a, b, _, _] = words[i + 4];
            Addr { ip: crate::addr::Ip(ip), port: [a, b], zero: [0; 2] }
        };
        let u64_at = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(words[i..i + 2].as_flattened());
            u64::from_ne_bytes(word)
        };
        Some(Self {
            kind: u32_at(0),
            refusal: u32_at(1),
            workload: u32_at(2),
            service: u32_at(3),
            original: addr_at(4),
            endpoint: addr_at(9),
            bytes_sent: u64_at(14),
            bytes_received: u64_at(16),
            srtt_us: u32_at(18),
            retransmits: u32_at(19),
        })
    }
}
