//! The kernel programs alone: loaded, attached, asked by real processes; the test plays the agent.
//!
//! Needs root and a kernel from 6.1 on; runs in the small virtual machines too, so it uses nothing but the kernel and
//! `ip`.

mod cost;
mod crowd;
mod edges;
mod unread;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::sys::{
    bpf::{Pins, Programs},
    cgroup,
    maps::{Maps, Readers},
    socket,
};
use mesh_common::{
    addr::Addr,
    event::{Event, kind, path},
    maps::{Endpoint, EndpointKey, GrantKey, Knobs, Namespace, Service, counter, knobs, namespace, service},
    refusal::Refusal,
};
use mesh_core::dataplane::Write;
use mesh_tests::{
    stage::{Space, Stage},
    tier::{self, Tier},
};

const PROXY: u16 = 15001;
pub(crate) const DNS: u16 = 15053;
const LIMIT: Duration = Duration::from_secs(5);

/// A stage with the programs attached, and one enrolled namespace.
pub(crate) struct Scene {
    maps: Maps,
    pub(crate) readers: Readers,
    programs: Programs,
    pub(crate) space: Space,
    pub(crate) stage: Stage,
}

fn addr(text: &str) -> Addr {
    text.parse::<SocketAddr>().expect("a literal").into()
}

impl Scene {
    /// `None`: programs cannot be loaded here, which has been said aloud.
    pub(crate) fn new(flags: u32) -> Result<Option<Self>> {
        Self::sized(flags, &[])
    }

    /// With smaller maps.
    fn sized(flags: u32, sizes: &[(&str, u32)]) -> Result<Option<Self>> {
        if !tier::require(Tier::Kernel) {
            return Ok(None);
        }
        let stage = Stage::new()?;
        let space = stage.space()?;
        let (mut programs, maps, readers) =
            Programs::load_sized(Pins::new(stage.pin_dir()), stage.cgroup().to_path_buf(), sizes)?;
        programs.attach()?;
        let mut scene = Self { maps, readers, programs, space, stage };
        scene.heartbeat_limit(3_600_000_000_000)?;
        scene.readers.pulse.beat()?;
        scene.maps.put_namespace(scene.space.netns.cookie(), Namespace { workload: 7, flags })?;
        Ok(Some(scene))
    }

    /// Writes the settings; an agent whose last beat is longer ago hangs.
    pub(crate) fn heartbeat_limit(&mut self, heartbeat_limit_ns: u64) -> Result<()> {
        Ok(self.maps.set_knobs(&Knobs {
            abi: mesh_common::ABI_VERSION,
            flags: knobs::DNS,
            agent_cgroup: cgroup::id(&self.stage.agent_cgroup())?,
            heartbeat_limit_ns,
            vip4: [240, 240, 0, 0],
            vip4_mask: [255, 255, 0, 0],
            vip6: [0xfd, 0x65, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            vip6_mask: [0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            proxy_port: PROXY,
            dns_port: DNS,
            mark: socket::MARK,
        })?)
    }

    /// Runs `ip` in the enrolled namespace.
    pub(crate) fn ip(&self, arguments: &str) -> Result<()> {
        let done = self.space.netns.run(|| Command::new("ip").args(arguments.split(' ')).output())??;
        ensure!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    /// What a client says that carries out a line of `client`.
    fn ask(&self, script: &str) -> Result<String> {
        self.stage.ask(&self.space, "kernel::client", script)
    }

    fn listen(&self, text: &str) -> Result<TcpListener> {
        let at: SocketAddr = text.parse()?;
        let listener = self.space.netns.run(|| socket::tcp_listener(at))??;
        listener.set_nonblocking(false)?;
        Ok(listener)
    }

    fn service(&mut self, at: &str, value: Service, endpoints: &[&str]) -> Result<()> {
        let mut writes: Vec<_> = (0u32..)
            .zip(endpoints)
            .map(|(slot, e)| Write::PutEndpoint(EndpointKey { service: value.id, slot }, Endpoint { addr: addr(e) }))
            .collect();
        writes.push(Write::PutService(addr(at), value));
        Ok(self.maps.apply(&writes)?)
    }

    /// What a client says that connects to `to` and prints what it sees.
    fn connect(&self, to: &str) -> Result<String> {
        self.stage.ask(&self.space, "kernel::client", &format!("tcp {to}"))
    }

    fn counter(&self, index: u32) -> Result<u64> {
        Ok(self.readers.counters.read()?[index as usize])
    }

    /// How many questions were sent to the agent.
    pub(crate) fn dns_questions(&self) -> Result<u64> {
        self.counter(counter::DNS)
    }

    fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(record) = self.readers.events.next() {
            events.extend(Event::from_bytes(&record));
        }
        events
    }
}

/// Accepts one connection, answers `hello`, returns the client's address.
fn greet(listener: TcpListener) -> std::thread::JoinHandle<Result<SocketAddr>> {
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept()?;
        stream.write_all(b"hello")?;
        Ok(peer)
    })
}

/// Not a test of its own: what [`Stage::client`] runs in the client process.
#[test]
#[ignore = "the client half of the tests in this file"]
fn client() -> Result<()> {
    let script = std::env::var("MESH_TEST_SCRIPT").context("only run by the other tests")?;
    std::io::stdin().read_line(&mut String::new())?;
    let words: Vec<&str> = script.split(' ').collect();
    let [verb, to, more @ ..] = words.as_slice() else { anyhow::bail!("a verb and an address, not {script}") };
    let to: SocketAddr = to.parse()?;
    let said = match (*verb, more) {
        ("tcp", []) => tcp(to),
        ("udp-connected", []) => udp(to, true),
        ("udp", []) => udp(to, false),
        ("udp-then", [then]) => edges::udp_twice(to, then.parse()?),
        ("tcp-then", [then]) => edges::tcp_twice(to, then.parse()?),
        ("nonblocking", []) => edges::nonblocking(to),
        ("break-off", []) => edges::break_off(to),
        ("say-and-leave", []) => edges::say_and_leave(to),
        ("hold", [count]) => crowd::hold(to, count.parse()?),
        ("burst", [count]) => crowd::burst(to, count.parse()?),
        ("each", [count]) => crowd::each(to, count.parse()?),
        ("time", [count]) => cost::time(to, count.parse()?),
        _ => anyhow::bail!("unknown: {script}"),
    };
    match said {
        Ok(said) => println!("said: {said}"),
        Err(error) => println!("said: {:?}", error.kind()),
    }
    Ok(())
}

fn tcp(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let peer = stream.peer_addr()?;
    Ok(format!("{text} from {peer}"))
}

fn udp(to: SocketAddr, connected: bool) -> std::io::Result<String> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("a literal");
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(LIMIT))?;
    if connected {
        socket.connect(to)?;
        socket.send(b"question")?;
    } else {
        socket.send_to(b"question", to)?;
    }
    let mut buffer = [0; 64];
    let (n, from) = socket.recv_from(&mut buffer)?;
    Ok(format!("{} from {from}", String::from_utf8_lossy(&buffer[..n])))
}

const PROXIED: Service = Service { id: 1, flags: service::FAIL_OPEN, local: 0, total: 1 };

#[test]
fn a_connection_to_a_service_reaches_the_agent_with_its_original_destination() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let proxy = greet(scene.listen("127.0.0.1:15001")?);
    assert_eq!(scene.connect("240.240.0.1:80")?, "hello from 240.240.0.1:80");
    let peer = proxy.join().expect("no panic")?;
    let cookie = scene.space.netns.cookie();
    let original = scene.readers.flows.take_tcp(cookie, peer);
    // The client has closed by now, so the hook has removed the record itself.
    assert_eq!(original, None, "a closed connection leaves no record");
    assert_eq!(scene.counter(counter::REDIRECTED)?, 1);
    Ok(())
}

#[test]
fn the_record_is_there_at_accept() -> Result<()> {
    for (listen, to) in [
        ("127.0.0.1:15001", "240.240.0.1:80"),
        ("127.0.0.1:15001", "[::ffff:240.240.0.1]:80"),
        ("[::1]:15001", "[fd65::1]:80"),
    ] {
        let v6 = if listen.starts_with('[') { namespace::V6 } else { 0 };
        let Some(mut scene) = Scene::new(v6)? else { return Ok(()) };
        scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
        scene.service("[fd65::1]:80", PROXIED, &["127.0.0.1:9"])?;
        let listener = scene.listen(listen)?;
        let client = scene.stage.client(Some(&scene.space), None, "kernel::client", &format!("tcp {to}"))?;
        let client = std::thread::spawn(|| client.go());
        let (mut stream, peer) = listener.accept()?;
        let original = scene.readers.flows.take_tcp(scene.space.netns.cookie(), peer);
        let original = original.with_context(|| format!("no record of {to} by {peer}"))?;
        assert_eq!(original.addr, addr(to));
        assert_eq!((original.workload, original.path, original.service), (7, path::PROXY, 1));
        stream.write_all(b"hello")?;
        drop(stream);
        let said = client.join().expect("no panic")?;
        assert_eq!(said, format!("hello from {to}"), "an IPv6 socket shows a mapped address in brackets");
    }
    Ok(())
}

#[test]
fn an_ipv6_service_is_reached_where_the_namespace_has_no_ipv6() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("[fd65::1]:80", PROXIED, &["127.0.0.1:9"])?;
    let proxy = greet(scene.listen("127.0.0.1:15001")?);
    assert_eq!(scene.connect("[fd65::1]:80")?, "hello from [fd65::1]:80");
    proxy.join().expect("no panic")?;
    Ok(())
}

#[test]
fn an_opaque_local_service_is_connected_directly() -> Result<()> {
    let Some(mut scene) = Scene::new(namespace::DIRECT)? else { return Ok(()) };
    let opaque = Service { id: 3, flags: service::OPAQUE, local: 1, total: 2 };
    let server = scene.listen("127.0.0.2:6379")?;
    scene.service("240.240.0.3:6379", opaque, &["127.0.0.2:6379", "127.0.0.9:9"])?;
    let server = greet(server);
    assert_eq!(scene.connect("240.240.0.3:6379")?, "hello from 240.240.0.3:6379");
    server.join().expect("no panic")?;
    assert_eq!(scene.counter(counter::DIRECT)?, 1);
    let events = scene.events();
    let [closed] = events.as_slice() else { panic!("one event: {events:?}") };
    assert_eq!((closed.kind, closed.workload, closed.service), (kind::DIRECT_CLOSED, 7, 3));
    assert_eq!(closed.endpoint, addr("127.0.0.2:6379"));
    assert_eq!(closed.bytes_received, 5 + 1, "the kernel counts the FIN's sequence number too");
    Ok(())
}

#[test]
fn a_guarded_service_needs_a_grant_to_be_direct() -> Result<()> {
    let Some(mut scene) = Scene::new(namespace::DIRECT)? else { return Ok(()) };
    let guarded = Service { id: 3, flags: service::OPAQUE | service::GRANTED_ONLY, local: 1, total: 1 };
    scene.service("240.240.0.3:6379", guarded, &["127.0.0.2:6379"])?;
    let server = scene.listen("127.0.0.2:6379")?;
    assert_eq!(scene.connect("240.240.0.3:6379")?, "ConnectionRefused", "no grant, no agent");
    scene.maps.apply(&[Write::PutGrant(GrantKey { workload: 7, service: 3 })])?;
    let server = greet(server);
    assert_eq!(scene.connect("240.240.0.3:6379")?, "hello from 240.240.0.3:6379");
    server.join().expect("no panic")?;
    Ok(())
}

#[test]
fn a_dead_or_hung_agent_fails_open_or_closed_as_the_service_says() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.3:8080"])?;
    scene.service("240.240.0.2:80", Service { id: 2, flags: 0, ..PROXIED }, &["127.0.0.3:8080"])?;
    // Dead: no listener.
    let server = greet(scene.listen("127.0.0.3:8080")?);
    assert_eq!(scene.connect("240.240.0.1:80")?, "hello from 240.240.0.1:80");
    server.join().expect("no panic")?;
    assert_eq!(scene.connect("240.240.0.2:80")?, "ConnectionRefused");
    let refusals: Vec<_> = scene.events().iter().map(|e| (e.kind, e.refusal)).collect();
    let closed = Refusal::AgentAwayFailClosed as u32;
    assert_eq!(refusals, [(kind::FAILED_OPEN, 0), (kind::REFUSED, closed)]);
    // Hung: the listener is there, the heartbeat is old.
    let _listener = scene.listen("127.0.0.1:15001")?;
    let mut knobs = Knobs {
        abi: mesh_common::ABI_VERSION,
        proxy_port: PROXY,
        dns_port: DNS,
        mark: socket::MARK,
        heartbeat_limit_ns: 0,
        ..Knobs::default()
    };
    scene.maps.set_knobs(&knobs)?;
    let server = greet(scene.listen("127.0.0.3:8080")?);
    assert_eq!(scene.connect("240.240.0.1:80")?, "hello from 240.240.0.1:80");
    server.join().expect("no panic")?;
    // A stranger's listener without the mark is not the agent.
    knobs.heartbeat_limit_ns = u64::MAX;
    knobs.mark = 1;
    scene.maps.set_knobs(&knobs)?;
    let server = greet(scene.listen("127.0.0.3:8080")?);
    assert_eq!(scene.connect("240.240.0.1:80")?, "hello from 240.240.0.1:80");
    server.join().expect("no panic")?;
    Ok(())
}

#[test]
fn an_unknown_port_of_the_virtual_range_is_refused_at_once() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    assert_eq!(scene.connect("240.240.0.1:81")?, "ConnectionRefused");
    let events = scene.events();
    assert_eq!(events.iter().map(|e| (e.refusal, e.original)).collect::<Vec<_>>(), [(1, addr("240.240.0.1:81"))]);
    Ok(())
}

#[test]
fn who_is_not_enrolled_sees_no_difference() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("127.0.0.1:8080", PROXIED, &["127.0.0.1:9"])?;
    scene.service("10.9.9.9:80", PROXIED, &["127.0.0.1:9"])?;
    let other = scene.stage.space()?;
    let _proxy = scene.listen("127.0.0.1:15001")?;
    let said = scene.stage.ask(&other, "kernel::client", "tcp 10.9.9.9:80")?;
    assert_eq!(said, "NetworkUnreachable", "an untouched connect in an empty namespace");
    // Enrolled, but loopback is never intercepted.
    let server = greet(scene.listen("127.0.0.1:8080")?);
    assert_eq!(scene.connect("127.0.0.1:8080")?, "hello from 127.0.0.1:8080");
    server.join().expect("no panic")?;
    assert_eq!(scene.counter(counter::REDIRECTED)?, 0);
    Ok(())
}

#[test]
fn host_mode_tasks_are_known_by_their_cgroup_and_those_below_it() -> Result<()> {
    let Some(mut scene) = Scene::new(namespace::BY_CGROUP)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let listener = scene.listen("127.0.0.1:15001")?;
    let ask = |scene: &Scene, below: &str| {
        scene.stage.client(Some(&scene.space), Some(below), "kernel::client", "tcp 240.240.0.1:80")
    };
    let stranger = ask(&scene, "stranger")?;
    assert_eq!(stranger.go()?, "NetworkUnreachable");
    for below in ["host-task", "host-task/inner"] {
        let client = ask(&scene, below)?;
        let task = scene.stage.cgroup().join("task/host-task");
        scene.maps.put_cgroup(cgroup::id(&task)?, 9)?;
        let proxy = std::thread::spawn({
            let listener = listener.try_clone()?;
            move || -> Result<SocketAddr> {
                let (mut stream, peer) = listener.accept()?;
                stream.write_all(b"hello")?;
                Ok(peer)
            }
        });
        assert_eq!(client.go()?, "hello from 240.240.0.1:80", "{below}");
        proxy.join().expect("no panic")?;
    }
    Ok(())
}

#[test]
fn dns_reaches_the_agent_which_learns_the_resolver_that_was_asked() -> Result<()> {
    for (listen, verb, resolver) in [
        ("127.0.0.1:15053", "udp-connected", "10.0.0.2:53"),
        ("127.0.0.1:15053", "udp", "10.0.0.2:53"),
        ("127.0.0.1:15053", "udp", "127.0.0.53:53"),
        ("127.0.0.1:15053", "udp", "169.254.169.253:53"),
        ("127.0.0.1:15053", "udp", "[::ffff:10.0.0.2]:53"),
        ("127.0.0.1:15053", "udp-connected", "[::ffff:10.0.0.2]:53"),
        ("127.0.0.1:15053", "udp-connected", "[fd00:ec2::253]:53"),
        ("[::1]:15053", "udp-connected", "[fd00:ec2::253]:53"),
        ("[::1]:15053", "udp", "[fd00:ec2::253]:53"),
    ] {
        let v6 = if listen.starts_with('[') { namespace::V6 } else { 0 };
        let Some(scene) = Scene::new(v6)? else { return Ok(()) };
        let at: SocketAddr = listen.parse()?;
        let server = scene.space.netns.run(|| socket::udp_socket(at))??;
        server.set_nonblocking(false)?;
        server.set_read_timeout(Some(LIMIT))?;
        let flows = scene.readers.flows.clone();
        let cookie = scene.space.netns.cookie();
        let answer = std::thread::spawn(move || -> Result<_> {
            let mut buffer = [0; 64];
            let (n, from) = server.recv_from(&mut buffer)?;
            anyhow::ensure!(&buffer[..n] == b"question", "what was sent");
            let original = flows.query(cookie, from);
            server.send_to(b"answer", from)?;
            Ok(original)
        });
        let said = scene.stage.ask(&scene.space, "kernel::client", &format!("{verb} {resolver}"))?;
        assert_eq!(said, format!("answer from {resolver}"), "{verb} {resolver} by {listen}");
        let original = answer.join().expect("no panic")?.with_context(|| format!("{verb} {resolver}: no record"))?;
        assert_eq!((original.addr, original.path, original.workload), (addr(resolver), path::DNS, 7));
    }
    Ok(())
}

#[test]
fn questions_go_to_their_own_resolver_while_the_agent_is_away() -> Result<()> {
    let Some(mut scene) = Scene::new(namespace::V6)? else { return Ok(()) };
    let resolver: SocketAddr = "10.53.0.1:53".parse()?;
    scene.ip("addr add 10.53.0.1/32 dev lo")?;
    let ask = |scene: &Scene, verb: &str| -> Result<()> {
        let server = scene.space.netns.run(|| UdpSocket::bind(resolver))??;
        server.set_read_timeout(Some(LIMIT))?;
        let answer = std::thread::spawn(move || -> std::io::Result<()> {
            let (_, from) = server.recv_from(&mut [0; 64])?;
            server.send_to(b"answer", from).map(drop)
        });
        assert_eq!(scene.ask(&format!("{verb} {resolver}"))?, format!("answer from {resolver}"), "{verb}");
        answer.join().expect("no panic")?;
        Ok(())
    };
    let ask_tcp = |scene: &Scene| -> Result<()> {
        let server = greet(scene.listen("10.53.0.1:53")?);
        assert_eq!(scene.connect("10.53.0.1:53")?, "hello from 10.53.0.1:53");
        server.join().expect("no panic")?;
        Ok(())
    };
    // Dead: no sockets.
    for verb in ["udp", "udp-connected"] {
        ask(&scene, verb)?;
    }
    ask_tcp(&scene)?;
    // Hung: they are there, the heartbeat is old.
    let at: SocketAddr = "127.0.0.1:15053".parse()?;
    let _udp = scene.space.netns.run(|| socket::udp_socket(at))??;
    let _tcp = scene.listen("127.0.0.1:15053")?;
    scene.heartbeat_limit(0)?;
    for verb in ["udp", "udp-connected"] {
        ask(&scene, verb)?;
    }
    ask_tcp(&scene)?;
    assert_eq!(scene.counter(counter::DNS)?, 0);
    Ok(())
}

#[test]
fn dns_over_tcp_reaches_the_agent_too() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    let proxy = greet(scene.listen("127.0.0.1:15053")?);
    assert_eq!(scene.connect("10.0.0.2:53")?, "hello from 10.0.0.2:53");
    proxy.join().expect("no panic")?;
    Ok(())
}

#[test]
fn a_second_agent_adopts_the_maps_and_swaps_the_programs() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.3:8080"])?;
    let before = scene.maps.image()?;
    assert_eq!(before.services.len(), 1);
    let pins = Pins::new(scene.stage.pin_dir());
    let (mut second, maps, _) = Programs::load(pins.clone(), scene.stage.cgroup().to_path_buf())?;
    assert!(second.adopted);
    second.attach()?;
    assert_eq!(maps.image()?, before, "the same maps");
    let server = greet(scene.listen("127.0.0.3:8080")?);
    assert_eq!(scene.connect("240.240.0.1:80")?, "hello from 240.240.0.1:80");
    server.join().expect("no panic")?;
    let Scene { programs, space, stage, .. } = scene;
    drop((second, maps));
    programs.remove()?;
    assert!(!stage.pin_dir().exists());
    let said = stage.ask(&space, "kernel::client", "tcp 240.240.0.1:80")?;
    assert_eq!(said, "NetworkUnreachable", "nothing is left");
    Ok(())
}
