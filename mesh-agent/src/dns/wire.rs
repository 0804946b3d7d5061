//! DNS messages to the core's questions, and the core's answers to messages (RFC 1035, 2308, 6891).
//!
//! The only file that names the DNS library or knows a message's bytes. Does no I/O, never trusts a length. Must not
//! know which names are ours, nor where a query came from.

use std::{iter::repeat_n, net::IpAddr, time::Duration};

use hickory_proto::{
    op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query as Asked, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR, SOA, SRV},
    },
    serialize::binary::{BinDecodable as _, BinDecoder},
};
use mesh_core::resolve::{Answer, Question};

/// Octets of a DNS header (RFC 1035 §4.1.1).
const HEADER: usize = 12;
/// What every UDP client takes (RFC 1035 §4.2.1).
const UDP_PLAIN: u16 = 512;
/// No UDP reply of ours is larger, whatever the client says it can take.
const UDP_MOST: u16 = 4096;
/// The UDP payload that we advertise (DNS flag day 2020).
const PAYLOAD: u16 = 1232;

/// The largest message on TCP: its length has 16 bits (RFC 1035 §4.2.2).
pub const TCP_MOST: usize = u16::MAX as usize;

/// What a datagram or TCP message turned out to be.
#[derive(Debug)]
pub enum Received {
    Query(Box<Query>),
    /// Not a query that can be worked on; this is to be said about it.
    Faulty(Vec<u8>),
    /// Not a query at all: to be met with silence.
    Garbage,
}

/// How a message travels: decides how long a reply may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// One question and what is needed to reply to it.
#[derive(Debug)]
pub struct Query {
    /// The name as asked, case preserved, with the final dot.
    pub name: String,
    /// What is asked in terms of the mesh; `None`: an operation or class that the mesh has no opinion on.
    pub question: Option<Question>,
    transport: Transport,
    head: Metadata,
    asked: Asked,
    edns: Option<Edns>,
    /// Header and question are sound, what follows them is not. A resolver may understand more than we do.
    malformed: bool,
}

/// Recognises a message from a client.
pub fn parse(bytes: &[u8], transport: Transport) -> Received {
    let mut decoder = BinDecoder::new(bytes);
    let Ok(Header { metadata: head, counts, .. }) = Header::read(&mut decoder) else { return Received::Garbage };
    if head.message_type == MessageType::Response {
        return Received::Garbage;
    }
    // More than one question has no meaning (RFC 9619), none has nothing to look up.
    if counts.queries != 1 {
        return faulty(&head);
    }
    let Ok(asked) = Asked::read(&mut decoder) else { return faulty(&head) };
    let (edns, malformed) = match Message::from_vec(bytes) {
        Ok(message) => (message.edns, false),
        Err(_) => (None, true),
    };
    let ours = head.op_code == OpCode::Query && asked.query_class() == DNSClass::IN;
    let question = ours.then(|| question(asked.query_type()));
    Received::Query(Box::new(Query {
        name: asked.name().to_ascii(),
        question,
        transport,
        head,
        asked,
        edns,
        malformed,
    }))
}

impl Query {
    /// The reply that carries the core's answer; `None` where the core says to forward.
    pub fn reply(&self, answer: &Answer, generation: u64) -> Option<Vec<u8>> {
        if *answer == Answer::Forward {
            return None;
        }
        if self.malformed {
            return Some(self.error(ResponseCode::FormErr));
        }
        if self.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return Some(self.error(ResponseCode::BADVERS));
        }
        if matches!(self.asked.query_type(), RecordType::AXFR | RecordType::IXFR) {
            return Some(self.error(ResponseCode::Refused));
        }
        let mut reply = self.header(ResponseCode::NoError);
        reply.metadata.authoritative = true;
        match answer {
            Answer::Forward => return None,
            Answer::NoData { ttl } => self.deny(&mut reply, *ttl, generation),
            Answer::NoSuchName { ttl } => {
                reply.metadata.response_code = ResponseCode::NXDomain;
                self.deny(&mut reply, *ttl, generation);
            }
            Answer::Addresses { ttl, addresses } => {
                for ip in addresses {
                    reply.add_answer(self.record(*ttl, address(*ip)));
                }
            }
            Answer::Services { ttl, records, addresses } => {
                let mut targets = Vec::new();
                for (priority, weight, port, target) in records {
                    if let Some(target) = absolute(target) {
                        let data = RData::SRV(SRV::new(*priority, *weight, *port, target.clone()));
                        reply.add_answer(self.record(*ttl, data));
                        if !targets.contains(&target) {
                            targets.push(target);
                        }
                    }
                }
                // Spares the question that comes next (RFC 2782).
                for (target, ip) in targets.iter().flat_map(|target| addresses.iter().map(move |ip| (target, ip))) {
                    reply.add_additional(Record::from_rdata(target.clone(), seconds(*ttl), address(*ip)));
                }
            }
            Answer::Name { ttl, name } => {
                if let Some(name) = absolute(name) {
                    reply.add_answer(self.record(*ttl, RData::PTR(PTR(name))));
                }
            }
        }
        Some(self.encode(&reply))
    }

    /// The reply that says that no answer could be had.
    pub fn server_failure(&self) -> Vec<u8> {
        self.error(ResponseCode::ServFail)
    }

    /// The reply that says that there is no such name, for this time: without an SOA nobody may keep it (RFC 2308 §5).
    pub fn not_this_time(&self) -> Vec<u8> {
        self.error(ResponseCode::NXDomain)
    }

    /// A resolver's reply as this client can take it. One that is longer than the client said, which some resolvers
    /// send, would be cut by its socket without a sign; so it is told to come back over TCP.
    pub fn fit(&self, reply: Vec<u8>) -> Vec<u8> {
        if reply.len() <= self.takes() {
            return reply;
        }
        let code = Header::read(&mut BinDecoder::new(&reply)).map_or(ResponseCode::ServFail, |head| head.response_code);
        let mut cut = self.header(code);
        cut.metadata.truncation = true;
        self.encode(&cut)
    }

    /// Whether `reply` is a reply to this question; its id is not looked at. A server that refuses may leave out the
    /// question.
    pub fn is_answered_by(&self, reply: &[u8]) -> bool {
        let mut decoder = BinDecoder::new(reply);
        let Ok(Header { metadata: head, counts, .. }) = Header::read(&mut decoder) else { return false };
        if head.message_type != MessageType::Response || head.op_code != self.head.op_code {
            return false;
        }
        if counts.queries == 0 {
            return head.response_code != ResponseCode::NoError;
        }
        // Names are compared without case: not every server gives it back.
        Asked::read(&mut decoder).is_ok_and(|asked| asked == self.asked)
    }

    /// Room for what a server sends to this client in one datagram, and for seeing that it is more than the client takes.
    /// Servers are known to exceed what they were told, so never less than what is common.
    pub fn largest_datagram(&self) -> usize {
        usize::from(self.edns.as_ref().map_or(UDP_PLAIN, Edns::max_payload).max(UDP_MOST)) + 1
    }

    /// The longest reply that the client takes.
    fn takes(&self) -> usize {
        match (self.transport, &self.edns) {
            (Transport::Tcp, _) => TCP_MOST,
            (Transport::Udp, Some(edns)) => usize::from(edns.max_payload().max(UDP_PLAIN)),
            (Transport::Udp, None) => usize::from(UDP_PLAIN),
        }
    }

    fn header(&self, code: ResponseCode) -> Message {
        let mut reply = Message::response(self.head.id, self.head.op_code);
        reply.metadata = Metadata::response_from_request(&self.head);
        // Recursion is what forwarding gives.
        reply.metadata.recursion_available = true;
        reply.metadata.response_code = code;
        reply.add_query(self.asked.clone());
        if let Some(theirs) = &self.edns {
            let mut ours = Edns::new();
            ours.set_max_payload(PAYLOAD).set_version(0).set_dnssec_ok(theirs.flags().dnssec_ok);
            reply.set_edns(ours);
        }
        reply
    }

    fn error(&self, code: ResponseCode) -> Vec<u8> {
        self.encode(&self.header(code))
    }

    /// A negative answer carries an SOA, or no resolver may cache it (RFC 2308 §3). The zone is the parent of what
    /// was asked: an ancestor is all that resolvers check.
    fn deny(&self, reply: &mut Message, ttl: Duration, generation: u64) {
        let name = self.asked.name();
        let zone = if name.num_labels() > 1 { name.base_name() } else { name.clone() };
        let under = |label: &str| zone.prepend_label(label).unwrap_or_else(|_| zone.clone());
        let seconds = seconds(ttl);
        let interval = i32::try_from(seconds).unwrap_or(i32::MAX);
        // A serial is compared within 32 bits (RFC 1982), so the generation's low half serves.
        let serial = u32::try_from(generation & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        let soa = SOA::new(under("ns"), under("hostmaster"), serial, interval, interval, interval, seconds);
        reply.add_authority(Record::from_rdata(zone, seconds, RData::SOA(soa)));
    }

    fn record(&self, ttl: Duration, data: RData) -> Record {
        Record::from_rdata(self.asked.name().clone(), seconds(ttl), data)
    }

    fn encode(&self, reply: &Message) -> Vec<u8> {
        let most = match self.transport {
            Transport::Tcp => TCP_MOST,
            Transport::Udp => self.takes().min(usize::from(UDP_MOST)),
        };
        let fits = |message: &Message| message.to_vec().map(|bytes| (bytes.len() <= most).then_some(bytes));
        let encoded = match fits(reply) {
            Ok(None) if !reply.additionals.is_empty() => {
                // What nobody asked for goes first, and is no reason to ask again (RFC 2181 §9).
                let mut less = reply.clone();
                less.additionals.clear();
                fits(&less)
            }
            other => other,
        };
        encoded
            .and_then(|bytes| bytes.map_or_else(|| reply.truncate().to_vec(), Ok))
            .unwrap_or_else(|_| bare(&self.head, ResponseCode::ServFail))
    }
}

/// Whether a resolver says that it cannot or will not answer, whoever asks in whatever way.
pub fn is_failure(reply: &[u8]) -> bool {
    Header::read(&mut BinDecoder::new(reply))
        .is_ok_and(|head| matches!(head.response_code, ResponseCode::ServFail | ResponseCode::Refused))
}

/// Lowers the time for which a denial may be kept: the TTL of its SOA, the lesser of two that count (RFC 2308 §5). The
/// rest may be signed and stays as it is, and so does all of a reply that is not sound.
pub fn forget_soon(reply: &mut [u8], most: Duration) {
    for at in soa_ttls(reply).unwrap_or_default() {
        if let Some(ttl) = reply.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<4>()) {
            *ttl = u32::from_be_bytes(*ttl).min(seconds(most)).to_be_bytes();
        }
    }
}

/// Where the TTLs of the authority section's SOA records are.
fn soa_ttls(reply: &[u8]) -> Option<Vec<usize>> {
    let mut decoder = BinDecoder::new(reply);
    let counts = Header::read(&mut decoder).ok()?.counts;
    for _ in 0..counts.queries {
        Asked::read(&mut decoder).ok()?;
    }
    let mut found = Vec::new();
    for is_authority in repeat_n(false, counts.answers.into()).chain(repeat_n(true, counts.authorities.into())) {
        Name::read(&mut decoder).ok()?;
        let of = RecordType::read(&mut decoder).ok()?;
        decoder.read_u16().ok()?;
        let at = decoder.index();
        decoder.read_u32().ok()?;
        let length = decoder.read_u16().ok()?.unverified(/*the slice is checked*/);
        decoder.read_slice(length.into()).ok()?;
        if is_authority && of == RecordType::SOA {
            found.push(at);
        }
    }
    Some(found)
}

/// A fresh message id from a cryptographic generator (RFC 5452 §9.2).
pub fn random_id() -> u16 {
    Message::query().metadata.id
}

/// The message's id; `None` when it has no header.
pub fn id(bytes: &[u8]) -> Option<u16> {
    match bytes {
        [a, b, ..] if bytes.len() >= HEADER => Some(u16::from_be_bytes([*a, *b])),
        _ => None,
    }
}

/// The message with another id and nothing else changed.
pub fn with_id(mut bytes: Vec<u8>, id: u16) -> Vec<u8> {
    if let Some(head) = bytes.get_mut(..2) {
        head.copy_from_slice(&id.to_be_bytes());
    }
    bytes
}

fn question(of: RecordType) -> Question {
    if of == RecordType::A {
        Question::A
    } else if of == RecordType::AAAA {
        Question::Aaaa
    } else if of == RecordType::SRV {
        Question::Srv
    } else if of == RecordType::PTR {
        Question::Ptr
    } else if of == RecordType::ANY {
        Question::Any
    } else {
        Question::Other
    }
}

/// A message whose question is unreadable is answered by its header alone.
fn faulty(head: &Metadata) -> Received {
    Received::Faulty(bare(head, ResponseCode::FormErr))
}

fn bare(head: &Metadata, code: ResponseCode) -> Vec<u8> {
    let mut reply = Message::response(head.id, head.op_code);
    reply.metadata = Metadata::response_from_request(head);
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.to_vec().unwrap_or_default()
}

fn address(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(v4) => RData::A(A(v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
    }
}

fn absolute(name: &str) -> Option<Name> {
    let mut name = Name::from_ascii(name).ok()?;
    name.set_fqdn(true);
    Some(name)
}

fn seconds(ttl: Duration) -> u32 {
    u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX)
}
