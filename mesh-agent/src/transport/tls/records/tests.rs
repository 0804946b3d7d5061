//! Our records against the TLS library's own connections, and against a peer that sends what none should.

use std::{
    io::{Read as _, Write as _},
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use bytes::BytesMut;
use proptest::prelude::*;
use rustls::{
    ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection, SupportedCipherSuite,
    client::UnbufferedClientConnection,
    crypto::{CryptoProvider, aws_lc_rs, ring},
    pki_types::{PrivatePkcs8KeyDer, ServerName},
    server::UnbufferedServerConnection,
};

use super::*;
use crate::{
    identity::{
        Leaf,
        tests::{DAY, ca, id},
    },
    transport::tls::{
        foreign::Gullible,
        handshake::{Handshake, Progress, Side},
    },
};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Client,
    Server,
}

const ROLES: [Role; 2] = [Role::Client, Role::Server];

/// Ours, whoever implements them.
const SUITES: [SupportedCipherSuite; 4] = [
    aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
    aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
    ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
];

fn provider(suite: SupportedCipherSuite) -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
    provider.cipher_suites = vec![suite];
    Arc::new(provider)
}

fn client_config(suite: SupportedCipherSuite) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider(suite))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible))
        .with_no_client_auth();
    config.enable_secret_extraction = true;
    Arc::new(config)
}

/// Sends two session tickets, as our own servers do not.
fn server_config(suite: SupportedCipherSuite) -> Arc<ServerConfig> {
    static LEAF: OnceLock<Leaf> = OnceLock::new();
    let leaf = LEAF.get_or_init(|| ca("demo.mesh").issue(&id("world"), SystemTime::now(), DAY).unwrap());
    let mut config = ServerConfig::builder_with_provider(provider(suite))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.certificate.to_vec().into()], PrivatePkcs8KeyDer::from(leaf.key.to_vec()).into())
        .unwrap();
    config.enable_secret_extraction = true;
    Arc::new(config)
}

/// Our own servers send no tickets.
fn our_server_config(suite: SupportedCipherSuite) -> Arc<ServerConfig> {
    let mut config = server_config(suite);
    Arc::make_mut(&mut config).send_tls13_tickets = 0;
    config
}

fn name() -> ServerName<'static> {
    "world.invalid".try_into().unwrap()
}

/// One end is ours, the other the library's.
struct Pair {
    ours: Records,
    received: BytesMut,
    theirs: Connection,
}

/// What our end has come upon.
#[derive(Debug, Default)]
struct Read {
    plain: Vec<u8>,
    closed: bool,
    error: Option<Error>,
}

impl Pair {
    /// They have written `early` before their handshake was done, so it comes right behind it.
    fn new(role: Role, suite: SupportedCipherSuite, early: &[u8]) -> Self {
        match role {
            Role::Client => {
                let theirs = ServerConnection::new(server_config(suite)).unwrap();
                Self::shake(
                    UnbufferedClientConnection::new(client_config(suite), name()).unwrap(),
                    theirs.into(),
                    early,
                )
            }
            Role::Server => {
                let theirs = ClientConnection::new(client_config(suite), name()).unwrap();
                let ours = UnbufferedServerConnection::new(our_server_config(suite)).unwrap();
                Self::shake(ours, theirs.into(), early)
            }
        }
    }

    fn shake<S: Side>(ours: S, mut theirs: Connection, early: &[u8]) -> Self {
        theirs.writer().write_all(early).unwrap();
        let mut ours = Handshake::new(ours, BytesMut::new());
        loop {
            let mut out = Vec::new();
            let progress = ours.advance(&mut out).unwrap();
            receive(&mut theirs, &out).unwrap();
            let mut answer = Vec::new();
            while theirs.wants_write() {
                theirs.write_tls(&mut answer).unwrap();
            }
            ours.received().extend_from_slice(&answer);
            if progress == Progress::Done {
                let (ours, received) = ours.finish().unwrap();
                return Self { ours, received, theirs };
            }
            assert!(!(out.is_empty() && answer.is_empty()), "it goes on");
        }
    }

    /// They send `data`.
    fn they_send(&mut self, mut data: &[u8]) {
        loop {
            let taken = self.theirs.writer().write(data).unwrap();
            data = &data[taken..];
            let mut sealed = Vec::new();
            while self.theirs.wants_write() {
                self.theirs.write_tls(&mut sealed).unwrap();
            }
            self.received.extend_from_slice(&sealed);
            if data.is_empty() {
                return;
            }
        }
    }

    fn we_read(&mut self) -> Read {
        read(&mut self.ours, &mut self.received)
    }

    fn we_send(&mut self, data: &[u8]) -> Vec<u8> {
        let mut rest = data;
        while !rest.is_empty() {
            // In uneven pieces, as HTTP/2 has them.
            let (a, b) = rest.split_at(rest.len() / 3);
            let taken = self.ours.seal(&[a, b]).unwrap();
            assert_eq!(taken, rest.len().min(LARGEST_WRITE));
            rest = &rest[taken..];
        }
        self.they_read().unwrap()
    }

    fn they_read(&mut self) -> Result<Vec<u8>, Error> {
        let sent = sent(&mut self.ours);
        receive(&mut self.theirs, &sent)
    }
}

/// Opens all there is.
fn read(ours: &mut Records, received: &mut BytesMut) -> Read {
    let mut read = Read::default();
    loop {
        match ours.open(received) {
            Ok(Opened::Partial) => return read,
            Ok(Opened::Plain { record, plain }) => {
                assert!(!plain.is_empty());
                read.plain.extend_from_slice(&received.split_to(record)[plain]);
            }
            Ok(Opened::Control { record }) => drop(received.split_to(record)),
            Ok(Opened::Closed) => {
                read.closed = true;
                return read;
            }
            Err(error) => {
                assert_eq!(ours.open(received), Err(error.clone()), "the same again");
                assert!(ours.seal(&[b"more"]).is_err(), "nothing after a failure");
                read.error = Some(error);
                return read;
            }
        }
    }
}

/// What is to be sent, taken in odd portions.
fn sent(ours: &mut Records) -> Vec<u8> {
    let mut all = Vec::new();
    while !ours.outgoing().is_empty() {
        let mut slices = [IoSlice::new(&[]); 2];
        let count = ours.outgoing().front(&mut slices);
        let front: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
        let taken = front.len().min(7001);
        all.extend_from_slice(&front[..taken]);
        ours.outgoing().advance(taken);
    }
    all
}

/// The library's end.
fn receive(theirs: &mut Connection, mut sealed: &[u8]) -> Result<Vec<u8>, Error> {
    let mut plain = Vec::new();
    while !sealed.is_empty() {
        match theirs.read_tls(&mut sealed) {
            Ok(0) => break,
            Ok(_) => theirs.process_new_packets()?,
            Err(error) => panic!("it takes no more: {error}"),
        };
        // Until it would have to wait.
        drop(theirs.reader().read_to_end(&mut plain));
    }
    Ok(plain)
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn what_comes_right_behind_the_handshake_is_not_lost() {
    for role in ROLES {
        for suite in SUITES {
            let early = bytes(40_000);
            let mut pair = Pair::new(role, suite, &early);
            let read = pair.we_read();
            assert_eq!((read.plain == early, read.closed, read.error), (true, false, None), "{role:?} {suite:?}");
        }
    }
}

/// What happens on a connection.
#[derive(Clone, Debug)]
enum Event {
    WeSend(usize),
    TheySend(usize),
    /// With a request for ours.
    TheyUpdate,
    WeUpdate,
}

fn event() -> impl Strategy<Value = Event> {
    let size = || prop_oneof![1..200usize, 1..80_000usize, Just(FULL), Just(FULL + 1), Just(LARGEST_WRITE)];
    prop_oneof![
        4 => size().prop_map(Event::WeSend),
        4 => size().prop_map(Event::TheySend),
        1 => Just(Event::TheyUpdate),
        1 => Just(Event::WeUpdate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn all_that_is_sent_arrives(
        role in prop::sample::select(ROLES.to_vec()),
        suite in prop::sample::select(SUITES.to_vec()),
        events in prop::collection::vec(event(), 1..12),
    ) {
        let mut pair = Pair::new(role, suite, b"");
        for event in events {
            match event {
                Event::WeSend(size) => {
                    let data = bytes(size);
                    prop_assert!(pair.we_send(&data) == data);
                }
                Event::TheySend(size) => {
                    let data = bytes(size);
                    pair.they_send(&data);
                    let read = pair.we_read();
                    prop_assert!(read.plain == data, "{:?}", read.error);
                }
                Event::TheyUpdate => pair.theirs.refresh_traffic_keys().unwrap(),
                Event::WeUpdate => drop(pair.ours.update_keys(REQUESTED)),
            }
        }
        pair.ours.close();
        pair.they_read().unwrap();
        prop_assert!(pair.theirs.process_new_packets().unwrap().peer_has_closed());
    }

    #[test]
    fn no_bytes_make_it_panic(mut junk in prop::collection::vec(any::<u8>(), 0..100), header: bool) {
        let (mut ours, _) = both();
        if header && let Some(start) = junk.first_chunk_mut::<HEADER>() {
            *start = [23, 3, 3, 0, start[0] % 100];
        }
        let believed = matches!(ours.open(&mut junk), Ok(Opened::Plain { .. }));
        prop_assert!(!believed);
    }
}

#[test]
fn our_answer_to_a_key_update_goes_before_the_next_data_and_once() {
    let mut pair = Pair::new(Role::Server, SUITES[0], b"");
    for _ in 0..3 {
        pair.theirs.refresh_traffic_keys().unwrap();
        pair.they_send(b"");
    }
    assert!(pair.we_read().error.is_none());
    assert_eq!(pair.ours.outgoing().records.len(), 1, "one answer for all three");
    assert_eq!(pair.ours.sealing.sequence, 0);
    assert_eq!(pair.we_send(b"data"), b"data");
    pair.theirs.refresh_traffic_keys().unwrap();
    pair.they_send(b"ping");
    assert_eq!(pair.we_read().plain, b"ping");
    assert_eq!(pair.ours.outgoing().records.len(), 1, "and one for the next");
    assert_eq!(pair.we_send(b"data"), b"data");
}

#[test]
fn a_key_is_replaced_before_it_is_used_up() {
    for suite in SUITES {
        let mut pair = Pair::new(Role::Client, suite, b"");
        pair.ours.sealing.limit = 5;
        for _ in 0..20 {
            let data = bytes(3 * FULL);
            assert!(pair.we_send(&data) == data);
            assert!(pair.ours.sealing.sequence < 5);
        }
        // They were asked to do the same, and had no reason to speak before.
        pair.they_send(b"answer");
        assert_eq!(pair.we_read().plain, b"answer");
    }
}

#[test]
fn every_beginning_of_a_record_waits_for_the_rest() {
    let mut pair = Pair::new(Role::Client, SUITES[2], b"");
    pair.we_read();
    let sequence = pair.ours.opening.sequence;
    pair.they_send(b"first");
    pair.they_send(b"second");
    let all = pair.received.clone();
    let first = HEADER + 5 + 17;
    for end in 0..all.len() {
        let mut part = BytesMut::from(&all[..end]);
        pair.ours.opening.sequence = sequence;
        let read = read(&mut pair.ours, &mut part);
        assert!(read.error.is_none() && !read.closed);
        assert_eq!(read.plain, if end < first { &b""[..] } else { b"first" }, "{end} bytes");
        part.extend_from_slice(&all[end..]);
        let rest = self::read(&mut pair.ours, &mut part);
        assert_eq!([read.plain, rest.plain].concat(), b"firstsecond", "{end} bytes");
    }
}

#[test]
fn every_bit_is_protected() {
    let mut pair = Pair::new(Role::Server, SUITES[0], b"");
    pair.they_send(b"they pay two thousand");
    let sealed = pair.received.clone();
    for bit in 0..sealed.len() * 8 {
        let mut flipped = sealed.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let outcome = pair.ours.open(&mut flipped);
        // The minor version is of no meaning (RFC 8446, section 5.1), nor does the library authenticate it.
        let harmless = bit / 8 == 2;
        match outcome {
            Ok(Opened::Plain { .. }) => assert!(harmless, "bit {bit}"),
            Ok(Opened::Partial) => assert!((3..HEADER).contains(&(bit / 8)), "a longer record, bit {bit}"),
            Ok(other) => panic!("bit {bit}: {other:?}"),
            Err(_) => assert!(!harmless),
        }
        // As if it had never come.
        pair.ours.failed = None;
        pair.ours.sealing.ended = false;
        pair.ours.opening.sequence = 0;
    }
    assert_eq!(pair.we_read().plain, b"they pay two thousand");
}

#[test]
fn a_bad_record_is_told_to_the_peer() {
    for role in ROLES {
        let mut pair = Pair::new(role, SUITES[1], b"");
        assert!(pair.we_read().error.is_none());
        pair.they_send(b"hello");
        *pair.received.last_mut().unwrap() ^= 1;
        assert_eq!(pair.we_read().error, Some(Error::DecryptError));
        assert_eq!(pair.they_read(), Err(Error::AlertReceived(AlertDescription::BadRecordMac)));
        // It is our last word.
        pair.ours.close();
        assert!(pair.ours.outgoing().is_empty());
    }
}

#[test]
fn closing_is_said_once_and_ends_what_is_read() {
    for role in ROLES {
        let mut pair = Pair::new(role, SUITES[0], b"");
        pair.they_send(b"last");
        pair.theirs.send_close_notify();
        pair.they_send(b"");
        pair.received.extend_from_slice(b"whatever");
        let read = pair.we_read();
        assert_eq!((read.plain.as_slice(), read.closed, read.error), (&b"last"[..], true, None));
        assert!(pair.we_read().closed, "and again");
        // Our direction is still open.
        assert_eq!(pair.we_send(b"answer"), b"answer");
        pair.ours.close();
        pair.ours.close();
        assert_eq!(pair.ours.outgoing().records.len(), 1);
        assert!(pair.ours.seal(&[b"more"]).is_err());
        pair.they_read().unwrap();
        assert!(pair.theirs.process_new_packets().unwrap().peer_has_closed());
    }
}

// What follows meets peers that send what none should.

/// A client and a server, both ours.
fn both() -> (Records, Records) {
    let suite = SUITES[2];
    let client = UnbufferedClientConnection::new(client_config(suite), name()).unwrap();
    let server = UnbufferedServerConnection::new(our_server_config(suite)).unwrap();
    let (mut client, mut server) = (Handshake::new(client, BytesMut::new()), Handshake::new(server, BytesMut::new()));
    loop {
        let mut out = Vec::new();
        let one = client.advance(&mut out).unwrap();
        server.received().extend_from_slice(&out);
        out.clear();
        let other = server.advance(&mut out).unwrap();
        client.received().extend_from_slice(&out);
        if (one, other) == (Progress::Done, Progress::Done) {
            return (client.finish().unwrap().0, server.finish().unwrap().0);
        }
    }
}

fn says(peer: &mut Records, typ: ContentType, payload: &[u8]) {
    if peer.seal_record(typ, OutboundChunks::Single(payload)).is_err() {
        panic!("the cipher fails");
    }
}

/// What our server comes upon when a client sends these records, and what it tells the client.
fn server_reads(records: &[(ContentType, &[u8])]) -> (Read, Option<Error>) {
    let (mut client, mut server) = both();
    for (typ, payload) in records {
        says(&mut client, *typ, payload);
    }
    meets(&mut client, &mut server)
}

fn client_reads(records: &[(ContentType, &[u8])]) -> (Read, Option<Error>) {
    let (mut client, mut server) = both();
    for (typ, payload) in records {
        says(&mut server, *typ, payload);
    }
    meets(&mut server, &mut client)
}

fn meets(sender: &mut Records, reader: &mut Records) -> (Read, Option<Error>) {
    let seen = read(reader, &mut BytesMut::from(sent(sender).as_slice()));
    let told = read(sender, &mut BytesMut::from(sent(reader).as_slice())).error;
    (seen, told)
}

fn told(alert: AlertDescription) -> Option<Error> {
    Some(Error::AlertReceived(alert))
}

const DATA: ContentType = ContentType::ApplicationData;
const HANDSHAKE: ContentType = ContentType::Handshake;
const ALERT: ContentType = ContentType::Alert;
const UPDATE: &[u8] = &[24, 0, 0, 1, 0];
const UPDATE_BOTH: &[u8] = &[24, 0, 0, 1, 1];

#[test]
fn what_must_not_be_sent_is_refused() {
    let unexpected = AlertDescription::UnexpectedMessage;
    let unreadable = AlertDescription::DecodeError;
    let long = bytes(FULL + 1);
    let refused: [(&str, ContentType, &[u8], AlertDescription); 17] = [
        ("too much plaintext", DATA, &long, AlertDescription::RecordOverflow),
        ("nothing but padding", ContentType::from(0), &[0; 9], unexpected),
        ("no content at all", ContentType::from(0), &[], unexpected),
        ("protected change_cipher_spec", ContentType::ChangeCipherSpec, &[1], unexpected),
        ("another content type", ContentType::Heartbeat, &[1], unexpected),
        ("an unknown content type", ContentType::from(99), &[1], unexpected),
        ("an empty alert", ALERT, &[], unreadable),
        ("a short alert", ALERT, &[2], unreadable),
        ("two alerts", ALERT, &[1, 0, 1, 0], unreadable),
        ("an empty handshake record", HANDSHAKE, &[], unexpected),
        ("a client's session ticket", HANDSHAKE, &[4, 0, 0, 1, 0], unexpected),
        ("a ClientHello", HANDSHAKE, &[1, 0, 0, 1, 0], unexpected),
        ("a message's head in part", HANDSHAKE, &UPDATE[..3], unreadable),
        ("a key update in part", HANDSHAKE, &UPDATE[..4], unreadable),
        ("a key update that is too long", HANDSHAKE, &[24, 0, 0, 2, 0, 0], unreadable),
        ("a key update of an unknown kind", HANDSHAKE, &[24, 0, 0, 1, 2], AlertDescription::IllegalParameter),
        ("something behind a key update", HANDSHAKE, &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0], unexpected),
    ];
    for (what, typ, payload, alert) in refused {
        let (seen, answer) = server_reads(&[(DATA, b"fine"), (typ, payload), (DATA, b"not opened")]);
        assert_eq!(seen.plain, b"fine", "{what}");
        assert!(seen.error.is_some(), "{what}");
        assert_eq!(answer, told(alert), "{what}: {:?}", seen.error);
    }
}

#[test]
fn what_is_not_protected_is_refused() {
    let oversized = [23, 3, 3, 0x41, 1];
    let cases: [(&[u8], AlertDescription); 6] = [
        (&[20, 3, 3, 0, 1, 1], AlertDescription::UnexpectedMessage),
        (&[21, 3, 3, 0, 2, 2, 40], AlertDescription::UnexpectedMessage),
        (&[22, 3, 3, 0, 5, 24, 0, 0, 1, 0], AlertDescription::UnexpectedMessage),
        (&oversized, AlertDescription::RecordOverflow),
        (b"GET / HTTP/1.1\r\n", AlertDescription::DecodeError),
        (&[23, 2, 0, 0, 0], AlertDescription::DecodeError),
    ];
    for (bytes, alert) in cases {
        let (mut client, mut server) = both();
        let seen = read(&mut server, &mut BytesMut::from(bytes));
        assert!(seen.error.is_some(), "{bytes:?}");
        let answer = read(&mut client, &mut BytesMut::from(sent(&mut server).as_slice()));
        assert_eq!(answer.error, told(alert), "{bytes:?}");
    }
    // The longest record waits for its content, and is then refused for that.
    let (_, mut server) = both();
    let mut longest = vec![0; HEADER + LONGEST];
    longest[..HEADER].copy_from_slice(&[23, 3, 3, 0x41, 0]);
    assert_eq!(server.open(&mut longest[..HEADER]), Ok(Opened::Partial));
    assert_eq!(server.open(&mut longest), Err(Error::DecryptError));
    let (_, mut server) = both();
    assert_eq!(server.open(&mut [23, 3, 3, 0, 4, 0, 0, 0, 0]), Err(Error::DecryptError), "shorter than a tag");
}

#[test]
fn padding_is_no_content() {
    let (seen, _) = server_reads(&[(ContentType::from(0), b"padded\x17\0\0\0"), (DATA, b" or not")]);
    assert_eq!((seen.plain.as_slice(), seen.error), (&b"padded or not"[..], None));
}

#[test]
fn records_without_content_are_taken_but_not_for_ever() {
    let empty: (ContentType, &[u8]) = (DATA, b"");
    let flood = |count: u8| vec![empty; count.into()];
    let (seen, _) = server_reads(&[flood(EMPTY_RECORDS), vec![(DATA, b"x")], flood(EMPTY_RECORDS)].concat());
    assert_eq!((seen.plain.as_slice(), seen.error), (&b"x"[..], None));
    let (seen, answer) = server_reads(&flood(EMPTY_RECORDS + 1));
    assert_eq!(seen.error, Some(PeerMisbehaved::TooManyEmptyFragments.into()));
    assert_eq!(answer, told(AlertDescription::UnexpectedMessage));
}

#[test]
fn key_updates_are_taken_but_not_for_ever() {
    for (message, request) in [(UPDATE, NOT_REQUESTED), (UPDATE_BOTH, REQUESTED)] {
        let (mut client, mut server) = both();
        for round in 0..2 {
            for _ in 0..KEY_UPDATES {
                assert!(client.update_keys(request).is_ok());
            }
            let (seen, _) = meets(&mut client, &mut server);
            assert!(seen.error.is_none(), "{message:?} in round {round}");
            assert_eq!(client.seal(&[b"x"]), Ok(1));
            assert_eq!(meets(&mut client, &mut server).0.plain, b"x");
            assert_eq!(server.seal(&[b"y"]), Ok(1));
            assert_eq!(meets(&mut server, &mut client).0.plain, b"y");
        }
        for _ in 0..=KEY_UPDATES {
            // Empty records do not count as data.
            assert!(client.update_keys(request).is_ok());
            says(&mut client, DATA, b"");
        }
        let (seen, answer) = meets(&mut client, &mut server);
        assert!(seen.error.is_some());
        assert_eq!(answer, told(AlertDescription::UnexpectedMessage));
    }
}

#[test]
fn session_tickets_are_skipped() {
    let ticket = |length: u32, content: usize| {
        let [_, a, b, c] = length.to_be_bytes();
        [vec![4, a, b, c], vec![7; content]].concat()
    };
    let (first, rest) = (ticket(20_000, 10_000), vec![7; 10_000]);
    let two = [ticket(9, 9), ticket(3, 3), UPDATE.to_vec()].concat();
    let (seen, _) = client_reads(&[(HANDSHAKE, &first), (HANDSHAKE, &rest), (DATA, b"data"), (HANDSHAKE, &two)]);
    assert_eq!((seen.plain.as_slice(), seen.error), (&b"data"[..], None));
    // Nothing stands between the parts of a message (RFC 8446, section 5.1).
    let (seen, answer) = client_reads(&[(HANDSHAKE, &first), (DATA, b"data")]);
    assert_eq!(seen.error, Some(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into()));
    assert_eq!(answer, told(AlertDescription::UnexpectedMessage));
    let (seen, _) = client_reads(&[(HANDSHAKE, &ticket(0xff_ffff, 10))]);
    assert_eq!(seen.error, Some(InvalidMessage::HandshakePayloadTooLarge.into()));
}

#[test]
fn an_alert_ends_it_and_is_not_answered() {
    for level in [1, 2, 77] {
        let (seen, answer) = server_reads(&[(ALERT, &[level, 48])]);
        assert_eq!((seen.error, answer), (told(AlertDescription::UnknownCA), None));
    }
    let cancelled: (ContentType, &[u8]) = (ALERT, &[1, 90]);
    let (seen, _) = server_reads(&[vec![cancelled; 4], vec![(ALERT, &[1, 0])]].concat());
    assert!(seen.closed && seen.error.is_none());
    assert!(server_reads(&[cancelled; 5]).0.error.is_some());
}

#[test]
fn what_is_shown_holds_no_keys() {
    let shown = format!("{:?}", both().0);
    assert_eq!(shown, "Records { suite: TLS13_AES_128_GCM_SHA256, failed: None, .. }");
}
