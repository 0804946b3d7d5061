//! A server on loopback, asked by raw datagrams, by TCP and by `dig`, with resolvers behind it that are real sockets.

mod forwarding;

use std::{collections::HashSet, net::Ipv4Addr, process::Command, sync::Mutex};

use mesh_common::addr::Ip;
use mesh_core::{
    addr::Vip,
    config::{self, VipRanges},
    model::{OnAgentDeath, Protocol, Service, ServicePort, Snapshot, TlsMode},
};
use nix::sched::{CloneFlags, unshare};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Notify,
    time::Instant,
};

use super::*;
use crate::{
    dns::{DnsCounters, Originals},
    state,
    sys::netns::Netns,
};

/// Far more than any step needs.
const PATIENCE: Duration = Duration::from_secs(10);
const VIP: [u8; 4] = [240, 240, 0, 1];
const A: u16 = 1;
const SOA: u16 = 6;
const PTR: u16 = 12;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const SRV: u16 = 33;
const ANY: u16 = 255;
const OPT: u16 = 41;
const AXFR: u16 = 252;

/// A server, and what it counts. It ends when dropped.
struct Bed {
    addr: SocketAddr,
    counters: Arc<DnsCounters>,
    _serving: JoinSet<()>,
}

/// `world` with one port and `many` with a hundred.
fn snapshot() -> Snapshot {
    let service = |name: &str, last: u8, ports: std::ops::Range<u16>| {
        let ports =
            ports.map(|port| ServicePort { id: port.into(), port, protocol: Protocol::Auto, endpoints: vec![] });
        Arc::new(Service {
            name: name.parse().unwrap(),
            vip: Vip { v4: Ipv4Addr::new(240, 240, 0, last), v6: "fd65:6373:6d65:7368::1".parse().unwrap() },
            ports: ports.collect(),
            tls: TlsMode::Strict,
            on_agent_death: OnAgentDeath::Open,
            owners: None,
        })
    };
    let services = [service("world", 1, 80..81), service("many", 2, 1000..1100)];
    Snapshot {
        generation: 7,
        by_vip: services.iter().map(|service| (Ip::v4(service.vip.v4.octets()), service.name.clone())).collect(),
        services: services.into_iter().map(|service| (service.name.clone(), service)).collect(),
        ..Snapshot::default()
    }
}

fn bed(originals: Originals, fallback: &[SocketAddr], upstream_timeout: Duration) -> Bed {
    bed_in(None, originals, fallback, upstream_timeout)
}

fn bed_in(netns: Option<Arc<Netns>>, originals: Originals, fallback: &[SocketAddr], upstream_timeout: Duration) -> Bed {
    let (udp, tcp) = pair();
    serve_on(udp, tcp, netns, originals, fallback, upstream_timeout)
}

/// Sockets for UDP and TCP on the same free port.
fn pair() -> (std::net::UdpSocket, std::net::TcpListener) {
    loop {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        if let Ok(tcp) = std::net::TcpListener::bind(udp.local_addr().unwrap()) {
            udp.set_nonblocking(true).unwrap();
            tcp.set_nonblocking(true).unwrap();
            return (udp, tcp);
        }
    }
}

fn serve_on(
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
    netns: Option<Arc<Netns>>,
    originals: Originals,
    fallback: &[SocketAddr],
    upstream_timeout: Duration,
) -> Bed {
    let addr = udp.local_addr().unwrap();
    let (publisher, published) = state::publish();
    publisher.replace(snapshot());
    let counters = Arc::new(DnsCounters::default());
    let context = Context {
        published,
        config: Arc::new(config::Dns {
            port: addr.port(),
            ttl: Duration::from_secs(5),
            suffixes: vec!["mesh".into(), "service.consul".into()],
            datacenters: Vec::new(),
            vip: VipRanges { v4: "240.240.0.0/16".parse().unwrap(), v6: "fd65:6373:6d65:7368::/96".parse().unwrap() },
            search: Some(vec!["corp.test".into()]),
            ipv6: true,
            upstream_timeout,
        }),
        originals,
        netns,
        fallback: fallback.into(),
        counters: counters.clone(),
    };
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        serve(context, Listeners { udp: vec![udp], tcp: vec![tcp] }).await.unwrap();
    });
    Bed { addr, counters, _serving: serving }
}

/// A query as bytes, written by hand so that the library is not its own judge.
fn query(id: u16, name: &str, of: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(of.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

/// The query with an OPT record that allows replies of this size.
fn with_edns(mut query: Vec<u8>, size: u16) -> Vec<u8> {
    query[11] = 1;
    query.push(0);
    query.extend(OPT.to_be_bytes());
    query.extend(size.to_be_bytes());
    query.extend([0, 0, 0x80, 0, 0, 0]);
    query
}

/// What a resolver would say: the question, and a TXT record that nobody but it knows.
fn reply_to(query: &[u8]) -> Vec<u8> {
    let mut reply = query.to_vec();
    reply[2] |= 0x80;
    reply[3] = 0x80;
    reply[7] = 1;
    // Behind the question: the root label, type and class end it.
    let at = 12 + query[12..].iter().position(|octet| *octet == 0).unwrap() + 5;
    let record = [&[0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 60, 0, 4, 3][..], b"abc"].concat();
    reply.splice(at..at, record);
    reply
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn rcode(reply: &[u8]) -> u8 {
    reply[3] & 15
}

fn is_truncated(reply: &[u8]) -> bool {
    reply[2] & 2 != 0
}

fn answers(reply: &[u8]) -> u16 {
    u16_at(reply, 6)
}

async fn client() -> UdpSocket {
    UdpSocket::bind("127.0.0.1:0").await.unwrap()
}

async fn ask(addr: SocketAddr, query: &[u8]) -> Vec<u8> {
    let socket = client().await;
    socket.send_to(query, addr).await.unwrap();
    receive(&socket).await
}

async fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 65535];
    let length = timeout(PATIENCE, socket.recv(&mut buffer)).await.expect("no reply").unwrap();
    buffer.truncate(length);
    buffer
}

async fn ask_tcp(addr: SocketAddr, query: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    write_message(&mut stream, query).await.unwrap();
    timeout(PATIENCE, read_message(&mut stream)).await.unwrap().unwrap().expect("closed without a reply")
}

/// A resolver: each datagram and TCP message is handed to `respond`; what it gives is sent back, each in turn.
struct Resolver {
    addr: SocketAddr,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
    _serving: JoinSet<()>,
}

fn resolver(respond: impl Fn(&[u8], Transport) -> Vec<Vec<u8>> + Send + Sync + 'static) -> Resolver {
    let (udp, tcp) = pair();
    let (udp, tcp) = (UdpSocket::from_std(udp).unwrap(), TcpListener::from_std(tcp).unwrap());
    let addr = udp.local_addr().unwrap();
    let (heard, respond) = (Arc::<Mutex<Vec<Vec<u8>>>>::default(), Arc::new(respond));
    let mut serving = JoinSet::new();
    let (heard_udp, respond_udp) = (heard.clone(), respond.clone());
    serving.spawn(async move {
        let mut buffer = vec![0; 65535];
        loop {
            let (length, peer) = udp.recv_from(&mut buffer).await.unwrap();
            heard_udp.lock().unwrap().push(buffer[..length].to_vec());
            for reply in respond_udp(&buffer[..length], Transport::Udp) {
                udp.send_to(&reply, peer).await.unwrap();
            }
        }
    });
    let heard_tcp = heard.clone();
    serving.spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let message = read_message(&mut stream).await.unwrap().unwrap();
            heard_tcp.lock().unwrap().push(message.clone());
            for reply in respond(&message, Transport::Tcp) {
                write_message(&mut stream, &reply).await.unwrap();
            }
        }
    });
    Resolver { addr, heard, _serving: serving }
}

#[tokio::test]
async fn mesh_names_are_answered_without_any_resolver() {
    let bed = bed(Originals::Unknown, &[], PATIENCE);
    for name in ["world", "world.mesh", "world.service.consul"] {
        let asked = query(0x1234, name, A);
        let reply = ask(bed.addr, &asked).await;
        assert_eq!(u16_at(&reply, 0), 0x1234);
        // QR, AA, RD as asked, RA.
        assert_eq!((reply[2], reply[3]), (0x85, 0x80), "{name}");
        assert_eq!(answers(&reply), 1);
        assert!(reply.ends_with(&[&[0, 0, 0, 5, 0, 4][..], &VIP].concat()), "ttl 5 and the VIP: {reply:?}");
        assert_eq!(ask_tcp(bed.addr, &asked).await, reply, "the same over TCP");
    }
    assert_eq!(answers(&ask(bed.addr, &query(1, "world", ANY)).await), 2);
    let v6 = ask(bed.addr, &query(1, "world", AAAA)).await;
    assert!(v6.ends_with(&"fd65:6373:6d65:7368::1".parse::<std::net::Ipv6Addr>().unwrap().octets()));
    let srv = ask(bed.addr, &query(1, "_http._tcp.world.mesh", SRV)).await;
    assert_eq!((answers(&srv), u16_at(&srv, 10)), (1, 2), "and both addresses of the target");
    assert!(srv.windows(4).any(|part| part == VIP), "{srv:?}");
    assert!(srv.windows(6).any(|part| part == [0, 0, 0, 0, 0, 80]), "priority, weight and port: {srv:?}");
    let ptr = ask(bed.addr, &query(1, "1.0.240.240.in-addr.arpa", PTR)).await;
    assert!(ptr.ends_with(b"\x05world\x04mesh\0"), "{ptr:?}");
    assert_eq!(bed.counters.mesh.load(Ordering::Relaxed), 10);
}

#[tokio::test]
async fn the_case_of_the_question_is_given_back() {
    let bed = bed(Originals::Unknown, &[], PATIENCE);
    let asked = query(9, "WoRLd.mEsH", A);
    let reply = ask(bed.addr, &asked).await;
    assert_eq!(reply[12..asked.len()], asked[12..], "the question, octet for octet");
    assert!(reply.ends_with(&VIP));
}

#[tokio::test]
async fn denials_may_be_cached_for_a_moment() {
    let bed = bed(Originals::Unknown, &[], PATIENCE);
    let longest = format!("{}.mesh", ["x"; 124].join("."));
    assert_eq!(longest.len() + 2, 254, "one octet less than there may be, which two-octet labels cannot fill");
    for (name, of, code) in [
        ("world", TXT, 0),
        ("world.mesh", TXT, 0),
        ("_tcp.world.mesh", A, 0),
        ("nobody.mesh", A, 3),
        ("nobody.mesh", AAAA, 3),
        (&longest, A, 3),
        ("240.240.in-addr.arpa", SOA, 0),
        ("9.9.240.240.in-addr.arpa", PTR, 3),
    ] {
        let reply = ask(bed.addr, &query(1, name, of)).await;
        assert_eq!((rcode(&reply), answers(&reply), u16_at(&reply, 8)), (code, 0, 1), "{name}");
        assert!(reply.windows(4).any(|part| part == [0, 6, 0, 1]), "an SOA, type {SOA}");
        assert!(reply.ends_with(&5u32.to_be_bytes()), "negative ttl");
        assert_eq!(reply[2] & 4, 4, "authoritative");
    }
    assert_eq!(rcode(&ask_tcp(bed.addr, &query(1, "world.mesh", AXFR)).await), 5, "no zone to transfer");
}

#[tokio::test]
async fn what_is_not_ours_is_carried_verbatim() {
    let resolver = resolver(|query, _| vec![reply_to(query)]);
    let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
    let mut ids = HashSet::new();
    for n in 0..20u16 {
        // An option that nobody knows, in an OPT record, and an unassigned flag.
        let mut asked = with_edns(query(n, "Example.COM", TXT), 1400);
        asked[3] |= 0x40;
        let reply = ask(bed.addr, &asked).await;
        assert_eq!(reply, reply_to(&asked), "only the id differs on the way, and comes back");
        let heard = resolver.heard.lock().unwrap().pop().unwrap();
        assert_eq!(heard[2..], asked[2..]);
        ids.insert(u16_at(&heard, 0));
        assert_eq!(ask_tcp(bed.addr, &asked).await, reply);
    }
    assert!(ids.len() > 10, "ids are drawn anew: {ids:?}");
    assert_eq!(bed.counters.forwarded.load(Ordering::Relaxed), 40);
    // Not a lookup at all: still the asked server's business.
    let mut notify = query(3, "world", SOA);
    notify[2] = 0x20;
    let mut reply = ask(bed.addr, &notify).await;
    reply.truncate(notify.len());
    assert_eq!(reply[12..], notify[12..]);
}

#[tokio::test]
async fn forged_replies_are_passed_over() {
    let resolver = resolver(|query, _| {
        let good = reply_to(query);
        let mut other_id = good.clone();
        other_id[0] ^= 1;
        let mut other_question = good.clone();
        other_question[13] ^= 1;
        vec![other_id, other_question, query.to_vec(), vec![1, 2, 3], good]
    });
    let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
    let asked = query(5, "example.com", TXT);
    assert_eq!(ask(bed.addr, &asked).await, reply_to(&asked));
    assert_eq!(ask_tcp(bed.addr, &asked).await, reply_to(&asked));
}

#[tokio::test]
async fn a_resolver_that_is_down_fails_at_once_and_mesh_names_go_on() {
    let nobody = client().await.local_addr().unwrap();
    let bed = bed(Originals::Fixed(nobody), &[], PATIENCE * 3);
    let begun = Instant::now();
    let asked = with_edns(query(5, "example.com", A), 1232);
    for reply in [ask(bed.addr, &asked).await, ask_tcp(bed.addr, &asked).await] {
        assert_eq!((rcode(&reply), u16_at(&reply, 0), u16_at(&reply, 10)), (2, 5, 1));
    }
    assert!(begun.elapsed() < PATIENCE, "not only after the timeout");
    assert!(ask(bed.addr, &query(6, "world", A)).await.ends_with(&VIP));
    assert_eq!(bed.counters.failed.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_slow_resolver_delays_only_who_asks_it() {
    let resolver = resolver(|query, _| if query[13] == b's' { vec![] } else { vec![reply_to(query)] });
    let bed = bed(Originals::Fixed(resolver.addr), &[], Duration::from_millis(600));
    let socket = client().await;
    for n in 0..10 {
        socket.send_to(&query(100 + n, "slow.example", A), bed.addr).await.unwrap();
    }
    socket.send_to(&query(1, "quick.example", A), bed.addr).await.unwrap();
    socket.send_to(&query(2, "world", A), bed.addr).await.unwrap();
    let first = [receive(&socket).await, receive(&socket).await].map(|reply| u16_at(&reply, 0));
    assert_eq!(first.into_iter().collect::<HashSet<_>>(), [1, 2].into());
    for _ in 0..10 {
        assert_eq!(rcode(&receive(&socket).await), 2, "the slow ones are given up");
    }
}

#[tokio::test]
async fn a_reply_that_does_not_fit_is_cut_and_fits_over_tcp() {
    let bed = bed(Originals::Unknown, &[], PATIENCE);
    let asked = query(5, "many.mesh", SRV);
    let cut = ask(bed.addr, &asked).await;
    assert!(is_truncated(&cut) && cut.len() <= 512 && answers(&cut) == 0, "{cut:?}");
    let whole = ask(bed.addr, &with_edns(asked.clone(), 4096)).await;
    assert!(!is_truncated(&whole) && answers(&whole) == 100);
    assert_eq!(u16_at(&whole, 10), 3, "both addresses of the target, and an OPT record answers an OPT record");
    let less = ask(bed.addr, &with_edns(asked.clone(), u16::try_from(whole.len()).unwrap() - 1)).await;
    assert!(
        !is_truncated(&less) && answers(&less) == 100 && u16_at(&less, 10) == 1,
        "what nobody asked for goes first"
    );
    let whole = ask_tcp(bed.addr, &asked).await;
    assert!(!is_truncated(&whole) && answers(&whole) == 100);
}

#[tokio::test]
async fn a_resolvers_cut_reply_is_passed_on_and_tcp_gets_the_whole() {
    let resolver = resolver(|query, transport| {
        let mut reply = reply_to(query);
        if transport == Transport::Udp {
            reply.truncate(query.len());
            (reply[2], reply[7]) = (0x83, 0);
        }
        vec![reply]
    });
    let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
    let asked = query(5, "example.com", TXT);
    assert!(is_truncated(&ask(bed.addr, &asked).await));
    assert_eq!(ask_tcp(bed.addr, &asked).await, reply_to(&asked));
}

#[tokio::test]
async fn queries_on_one_connection_do_not_wait_for_each_other() {
    let release = Arc::new(Notify::new());
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let bed = bed(Originals::Fixed(upstream.local_addr().unwrap()), &[], PATIENCE);
    let held = release.clone();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let (mut stream, _) = upstream.accept().await.unwrap();
        let asked = read_message(&mut stream).await.unwrap().unwrap();
        held.notified().await;
        write_message(&mut stream, &reply_to(&asked)).await.unwrap();
    });
    let mut stream = TcpStream::connect(bed.addr).await.unwrap();
    let mut both = Vec::new();
    for message in [query(1, "example.com", TXT), query(2, "world", A), query(3, "many", A)] {
        both.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
        both.extend(message);
    }
    stream.write_all(&both).await.unwrap();
    // And nothing more: what was asked is still answered.
    stream.shutdown().await.unwrap();
    for wanted in [2, 3] {
        let reply = timeout(PATIENCE, read_message(&mut stream)).await.unwrap().unwrap().unwrap();
        assert_eq!(u16_at(&reply, 0), wanted);
    }
    release.notify_one();
    let reply = timeout(PATIENCE, read_message(&mut stream)).await.unwrap().unwrap().unwrap();
    assert_eq!(reply, reply_to(&query(1, "example.com", TXT)));
    assert_eq!(timeout(PATIENCE, read_message(&mut stream)).await.unwrap().unwrap(), None, "then it is closed");
}

#[tokio::test]
async fn garbage_costs_only_who_sends_it() {
    let bed = bed(Originals::Unknown, &[], PATIENCE);
    let socket = client().await;
    let mut reply = query(1, "world", A);
    reply[2] |= 0x80;
    // Silence for what is no query, FORMERR for what is a broken one.
    for silent in [&b""[..], b"x", &[0; 11], &reply] {
        socket.send_to(silent, bed.addr).await.unwrap();
    }
    let mut none = query(2, "world", A);
    none[5] = 0;
    let mut two = query(3, "world", A);
    two[5] = 2;
    let mut endless = query(4, "world", A);
    endless.truncate(14);
    let mut looping = query(5, "world", A);
    looping.splice(12..19, [0xc0, 12]);
    let mut lying = query(6, "world", A);
    lying[11] = 9;
    for (n, broken) in [none, two, endless, looping, lying].iter().enumerate() {
        socket.send_to(broken, bed.addr).await.unwrap();
        let reply = receive(&socket).await;
        assert_eq!((usize::from(u16_at(&reply, 0)), rcode(&reply)), (n + 2, 1), "{broken:?}");
    }
    let mut state = 1u64;
    for length in 0..600usize {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_be_bytes()[0]
            })
            .collect();
        socket.send_to(&bytes, bed.addr).await.unwrap();
    }
    let mut stream = TcpStream::connect(bed.addr).await.unwrap();
    stream.write_all(b"\0\x05hello and so on").await.unwrap();
    assert_eq!(timeout(PATIENCE, stream.read(&mut [0; 1])).await.unwrap().unwrap_or(0), 0, "closed");
    assert!(ask(bed.addr, &query(6, "world", A)).await.ends_with(&VIP));
}

#[tokio::test]
async fn a_thousand_at_once_are_all_answered() {
    let resolver = resolver(|query, _| vec![reply_to(query)]);
    let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
    let mut asking = JoinSet::new();
    for n in 0..1000u16 {
        let addr = bed.addr;
        asking.spawn(async move {
            let name = if n % 4 == 0 { "example.com" } else { "world" };
            let reply = ask(addr, &query(n, name, A)).await;
            assert_eq!((u16_at(&reply, 0), rcode(&reply), answers(&reply)), (n, 0, 1));
        });
    }
    while let Some(done) = asking.join_next().await {
        done.unwrap();
    }
    assert_eq!(bed.counters.mesh.load(Ordering::Relaxed), 750);
    assert_eq!(bed.counters.forwarded.load(Ordering::Relaxed), 250);
}

#[tokio::test]
async fn no_more_wait_for_a_resolver_than_the_limit() {
    let silent = client().await;
    let bed = bed(Originals::Fixed(silent.local_addr().unwrap()), &[], PATIENCE * 6);
    let socket = client().await;
    let beyond = 20;
    for n in 0..IN_FLIGHT + beyond {
        socket.send_to(&query(u16::try_from(n).unwrap(), "example.com", A), bed.addr).await.unwrap();
        if n % 64 == 63 {
            // An answer from the server means that it has read all before it.
            assert!(ask(bed.addr, &query(6, "world", A)).await.ends_with(&VIP));
        }
    }
    for _ in 0..beyond {
        assert_eq!(rcode(&receive(&socket).await), 2);
    }
    assert_eq!(bed.counters.overload.load(Ordering::Relaxed), u64::try_from(beyond).unwrap());
}

#[tokio::test]
async fn nothing_is_forwarded_to_ourselves() {
    let resolver = resolver(|query, _| vec![reply_to(query)]);
    let asked = query(5, "example.com", TXT);
    for fallback in [vec![], vec![resolver.addr]] {
        let (udp, tcp) = pair();
        let own = udp.local_addr().unwrap();
        let mut resolvers = vec![own];
        resolvers.extend(&fallback);
        let bed = serve_on(udp, tcp, None, Originals::Fixed(own), &resolvers, PATIENCE);
        let reply = ask(bed.addr, &asked).await;
        if fallback.is_empty() {
            assert_eq!(rcode(&reply), 2);
            assert_eq!(bed.counters.failed.load(Ordering::Relaxed), 1, "asked once, not in circles");
        } else {
            assert_eq!(reply, reply_to(&asked), "the host's resolvers step in");
        }
    }
}

#[tokio::test]
async fn an_unknown_original_asks_the_hosts_resolvers_in_turn() {
    let nobody = client().await.local_addr().unwrap();
    let resolver = resolver(|query, _| vec![reply_to(query)]);
    let bed = bed(Originals::Unknown, &[nobody, resolver.addr], PATIENCE);
    let asked = query(5, "example.com", TXT);
    assert_eq!(ask(bed.addr, &asked).await, reply_to(&asked));
}

/// A namespace with a resolver that only those in it can reach. The resolver's thread ends with the test's process.
fn resolver_elsewhere() -> (Netns, SocketAddr) {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        let netns = Netns::open(std::path::Path::new("/proc/thread-self/ns/net")).unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let addr = socket.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                socket.send_to(&reply_to(&buffer[..length]), peer).unwrap();
            }
        });
        (netns, addr)
    })
    .join()
    .unwrap()
}

#[tokio::test]
async fn a_tasks_resolver_is_asked_from_its_own_namespace() {
    let may = std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET)).join().unwrap();
    if let Err(error) = may {
        eprintln!("SKIPPED a_tasks_resolver_is_asked_from_its_own_namespace: needs CAP_SYS_ADMIN ({error})");
        return;
    }
    let (netns, addr) = resolver_elsewhere();
    let asked = query(5, "example.com", TXT);
    let outside = bed(Originals::Fixed(addr), &[], PATIENCE);
    assert_eq!(rcode(&ask(outside.addr, &asked).await), 2, "not reachable from here");
    let inside = bed_in(Some(Arc::new(netns)), Originals::Fixed(addr), &[], PATIENCE);
    assert_eq!(ask(inside.addr, &asked).await, reply_to(&asked));
}

#[tokio::test(flavor = "multi_thread")]
async fn dig_understands_us() {
    let resolver = resolver(|query, _| vec![reply_to(query)]);
    let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
    let dig = |arguments: &str| {
        let port = bed.addr.port().to_string();
        let output = Command::new("dig")
            .args(["@127.0.0.1", "-p", &port, "+time=5", "+tries=1"])
            .args(arguments.split_whitespace())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.contains(";; WARNING") && !text.contains("malformed"), "{arguments}: {text}");
        Ok::<_, io::Error>(text)
    };
    if let Err(error) = dig("-v") {
        eprintln!("SKIPPED dig_understands_us: dig is not installed ({error})");
        return;
    }
    let check = |arguments: &str, wanted: &str| {
        let text = dig(arguments).unwrap();
        assert!(text.contains(wanted), "{arguments}: {text}");
    };
    check("+short world.mesh A", "240.240.0.1\n");
    check("+short +tcp world.mesh A", "240.240.0.1\n");
    check("+short +noedns world AAAA", "fd65:6373:6d65:7368::1\n");
    check("+short world.service.consul SRV", "0 0 80 world.mesh.\n");
    check("+short -x 240.240.0.1", "world.mesh.\n");
    check("world.mesh TXT", "ANSWER: 0, AUTHORITY: 1");
    check("nobody.mesh A", "NXDOMAIN");
    check("world.mesh A", "flags: qr aa rd ra;");
    check("world.mesh A", "EDNS: version: 0");
    check("+edns=1 +noednsneg world.mesh A", "BADVERS");
    check("+bufsize=512 +ignore many.mesh SRV", "flags: qr aa tc rd ra;");
    check("+bufsize=512 many.mesh SRV", "ANSWER: 100");
    check("+short example.com TXT", "\"abc\"");
    check("+short +tcp +keepopen example.com TXT", "\"abc\"");
}
