//! Reads a capture: is a text in it, and what do its TCP streams carry.
//!
//! Format: pcap-savefile(5), Ethernet links. It must not know how the capture was made.

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};

/// What a direction of a TCP stream carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    /// No payload.
    Empty,
    /// TLS records from the first byte to the last (RFC 8446 §5.1).
    Tls { records: usize },
    /// Anything else.
    Other,
}

/// One direction of one TCP connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSummary {
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Port of the side that accepted.
    pub server_port: u16,
    pub bytes: usize,
    pub kind: StreamKind,
}

/// A capture in memory.
#[derive(Clone, Debug)]
pub struct Pcap {
    raw: Vec<u8>,
    streams: BTreeMap<(SocketAddr, SocketAddr), Stream>,
    others: BTreeMap<String, usize>,
}

#[derive(Clone, Debug, Default)]
struct Stream {
    /// Sequence number of the first byte.
    start: Option<u32>,
    /// Payload by distance from the first byte.
    segments: BTreeMap<u32, Vec<u8>>,
    opened: bool,
}

impl Pcap {
    /// # Errors
    /// The file cannot be read or is no capture.
    pub fn read(path: &Path) -> Result<Self> {
        let raw = fs::read(path).with_context(|| format!("cannot read the capture {}", path.display()))?;
        Self::parse(raw).with_context(|| format!("{} is not a capture of an Ethernet link", path.display()))
    }

    fn parse(raw: Vec<u8>) -> Result<Self> {
        let mut pcap = Self { raw: Vec::new(), streams: BTreeMap::new(), others: BTreeMap::new() };
        let magic = word(&raw, 0).context("shorter than its header")?;
        ensure!(matches!(magic, 0xa1b2_c3d4 | 0xa1b2_3c4d), "unknown magic number {magic:x}");
        ensure!(word(&raw, 20) == Some(1), "the link is not Ethernet");
        let mut at = 24;
        // The last packet may still be on its way to the file.
        while let Some(length) = word(&raw, at + 8).and_then(|length| usize::try_from(length).ok()) {
            let Some(frame) = raw.get(at + 16..at + 16 + length) else { break };
            pcap.frame(frame);
            at += 16 + length;
        }
        pcap.raw = raw;
        Ok(pcap)
    }

    /// Whether the bytes occur anywhere in the capture.
    #[must_use]
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.raw.windows(needle.len()).any(|window| window == needle)
    }

    /// Size of the capture in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty() && self.others.is_empty()
    }

    /// Every direction of every TCP connection that carried something.
    #[must_use]
    pub fn streams(&self) -> Vec<StreamSummary> {
        let all = self.streams.iter().map(|(&(from, to), stream)| {
            let bytes = stream.bytes();
            let accepted = self.streams.get(&(to, from)).is_some_and(|other| other.opened);
            let server_port = match (stream.opened, accepted) {
                (true, _) => to.port(),
                (false, true) => from.port(),
                (false, false) => from.port().min(to.port()),
            };
            StreamSummary { from, to, server_port, bytes: bytes.len(), kind: kind_of(&bytes) }
        });
        all.filter(|each| each.kind != StreamKind::Empty).collect()
    }

    /// Packets that are not TCP, counted by what they are.
    #[must_use]
    pub fn others(&self) -> &BTreeMap<String, usize> {
        &self.others
    }

    fn frame(&mut self, frame: &[u8]) {
        let Some(kind) = half(frame, 12) else { return };
        let body = &frame[14..];
        match kind {
            0x0800 => self.ipv4(body),
            0x86dd => self.ipv6(body),
            0x0806 => self.count("arp".to_owned()),
            other => self.count(format!("ethertype {other:04x}")),
        }
    }

    fn ipv4(&mut self, packet: &[u8]) {
        let (Some(total), Some(&first), Some(&protocol)) = (half(packet, 2), packet.first(), packet.get(9)) else {
            return;
        };
        let address = |at: usize| packet.get(at..at + 4).map(|b| IpAddr::V4(Ipv4Addr::new(b[0], b[1], b[2], b[3])));
        let (Some(from), Some(to)) = (address(12), address(16)) else { return };
        // Zero where the network card would have cut it.
        let end = if total == 0 { packet.len() } else { usize::from(total).min(packet.len()) };
        let Some(body) = packet.get(usize::from(first & 15) * 4..end) else { return };
        self.segment(from, to, protocol, body);
    }

    fn ipv6(&mut self, packet: &[u8]) {
        let address = |at: usize| -> Option<IpAddr> {
            let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
            Some(Ipv6Addr::from(bytes).into())
        };
        let (Some(from), Some(to), Some(&protocol)) = (address(8), address(24), packet.get(6)) else { return };
        let length =
            half(packet, 4).filter(|&length| length > 0).map_or(packet.len(), |length| 40 + usize::from(length));
        let Some(body) = packet.get(40..length.min(packet.len())) else { return };
        self.segment(from, to, protocol, body);
    }

    fn segment(&mut self, from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) {
        match (protocol, half(body, 0), half(body, 2)) {
            (6, Some(source), Some(target)) => {
                let (Some(sequence), Some(&offset), Some(&flags)) = (long(body, 4), body.get(12), body.get(13)) else {
                    return;
                };
                let payload = body.get(usize::from(offset >> 4) * 4..).unwrap_or_default();
                let key = (SocketAddr::new(from, source), SocketAddr::new(to, target));
                self.streams.entry(key).or_default().add(sequence, flags, payload);
            }
            (17, Some(source), Some(target)) => self.count(format!("udp {}", source.min(target))),
            (1 | 58, ..) => self.count("icmp".to_owned()),
            (other, ..) => self.count(format!("ip protocol {other}")),
        }
    }

    fn count(&mut self, what: String) {
        *self.others.entry(what).or_default() += 1;
    }
}

impl Stream {
    fn add(&mut self, sequence: u32, flags: u8, payload: &[u8]) {
        const SYN: u8 = 2;
        const ACK: u8 = 16;
        if flags & SYN != 0 {
            // A port may be used again; what came before stays in `segments` only if it is the same connection.
            if self.start != Some(sequence.wrapping_add(1)) && self.segments.is_empty() {
                self.start = Some(sequence.wrapping_add(1));
            }
            self.opened |= flags & ACK == 0;
            return;
        }
        if payload.is_empty() {
            return;
        }
        let start = *self.start.get_or_insert(sequence);
        let known = self.segments.entry(sequence.wrapping_sub(start)).or_default();
        if known.len() < payload.len() {
            *known = payload.to_vec();
        }
    }

    /// The bytes in order, each once; what was not captured is left out.
    fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut next = 0_usize;
        for (&at, segment) in &self.segments {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let known = next.saturating_sub(at);
            if let Some(new) = segment.get(known..) {
                all.extend_from_slice(new);
                next = at.saturating_add(segment.len());
            }
        }
        all
    }
}

impl fmt::Display for StreamSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            StreamKind::Empty => "nothing".to_owned(),
            StreamKind::Tls { records } => format!("TLS only, {records} records"),
            StreamKind::Other => "NOT TLS".to_owned(),
        };
        write!(f, "{} -> {}: {} bytes, {what}", self.from, self.to, self.bytes)
    }
}

fn kind_of(bytes: &[u8]) -> StreamKind {
    if bytes.is_empty() {
        return StreamKind::Empty;
    }
    let (mut at, mut records) = (0, 0);
    while at < bytes.len() {
        let head = &bytes[at..bytes.len().min(at + 5)];
        let plausible = (20..=23).contains(&head[0])
            && head.get(1).is_none_or(|&major| major == 3)
            && head.get(2).is_none_or(|&minor| (1..=4).contains(&minor));
        let length = half(bytes, at + 3).map_or(0, usize::from);
        // RFC 8446 §5.2: 2^14 + 256; older versions allowed 2^14 + 2048.
        if !plausible || length > (1 << 14) + 2048 {
            return StreamKind::Other;
        }
        at += 5 + length;
        records += 1;
    }
    StreamKind::Tls { records }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The file's own headers are in the byte order of the machine that wrote it: this one.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
#[path = "pcap/tests.rs"]
mod tests;
