//! What the hooks must leave alone, and the corners of what they must not.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use mesh_agent::sys::socket;
use mesh_common::{
    event::{kind, path},
    maps::{GrantKey, Service, counter, namespace, service},
};
use mesh_core::dataplane::Write;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, SockRef, Socket, Type};

use super::{LIMIT, PROXIED, Scene, addr, greet};

/// Connects as event loops do.
pub(super) fn nonblocking(to: SocketAddr) -> io::Result<String> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let begun = match socket.connect(&to.into()) {
        Ok(()) => "at once",
        Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => "in progress",
        Err(error) => return Err(error),
    };
    let mut asked = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    poll(&mut asked, PollTimeout::from(5000u16)).map_err(io::Error::from)?;
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    socket.set_nonblocking(false)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(LIMIT))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(format!("{begun}, {text} from {}", stream.peer_addr()?))
}

/// Connects and breaks off; says from where.
pub(super) fn break_off(to: SocketAddr) -> io::Result<String> {
    let stream = TcpStream::connect_timeout(&to, LIMIT)?;
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(stream.local_addr()?.to_string())
}

/// Connects, says something, closes; says from where.
pub(super) fn say_and_leave(to: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
    stream.write_all(b"word")?;
    Ok(stream.local_addr()?.to_string())
}

/// Waits until the kernel has nothing left to do for the client socket on `port` but to wait for the other side:
/// FIN_WAIT2 or TIME_WAIT, and no longer a whole socket (the inode is 0; proc_net_tcp.txt).
fn wait_until_left(scene: &Scene, port: u16) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let text = scene.space.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp"))??;
        let left = text.lines().filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let waits = fields.get(1)?.ends_with(&format!(":{port:04X}")) && matches!(*fields.get(3)?, "05" | "06");
            (waits && *fields.get(9)? == "0").then_some(())
        });
        if left.count() > 0 {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    anyhow::bail!("the client's socket on port {port} has not left")
}

/// Connects one UDP socket to one address after the other, and says whom it then takes for its peer.
pub(super) fn udp_twice(first: SocketAddr, then: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(first)?;
    let before = socket.peer_addr()?;
    socket.connect(then)?;
    Ok(format!("{before} then {}", socket.peer_addr()?))
}

/// Connects a socket to an address without a route, and then to another; says what it hears there, and from whom.
pub(super) fn tcp_twice(first: SocketAddr, then: SocketAddr) -> io::Result<String> {
    let socket = Socket::new(Domain::for_address(first), Type::STREAM, None)?;
    match socket.connect(&first.into()) {
        Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => {}
        other => return Err(io::Error::other(format!("{first} is reached: {other:?}"))),
    }
    socket.connect(&then.into())?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(LIMIT))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(format!("{text} from {}", stream.peer_addr()?))
}

const OPAQUE: Service = Service { id: 3, flags: service::OPAQUE, local: 1, total: 1 };

#[test]
fn a_direct_connection_without_a_place_is_remembered_with_its_socket() -> Result<()> {
    // Cookies begin at 1, so there is a place for hardly any.
    let Some(mut scene) = Scene::sized(namespace::DIRECT, &[("DIRECTS", 1)])? else { return Ok(()) };
    scene.service("240.240.0.3:6379", OPAQUE, &["127.0.0.2:6379"])?;
    for _ in 0..2 {
        let server = greet(scene.listen("127.0.0.2:6379")?);
        assert_eq!(scene.connect("240.240.0.3:6379")?, "hello from 240.240.0.3:6379");
        server.join().expect("no panic")?;
    }
    let closed: Vec<_> = scene.events().iter().map(|event| (event.kind, event.original, event.endpoint)).collect();
    assert_eq!(closed, [(kind::DIRECT_CLOSED, addr("240.240.0.3:6379"), addr("127.0.0.2:6379")); 2]);
    Ok(())
}

#[test]
fn a_socket_whose_direct_connection_failed_is_free_for_another() -> Result<()> {
    let Some(mut scene) = Scene::new(namespace::DIRECT)? else { return Ok(()) };
    scene.service("240.240.0.3:6379", OPAQUE, &["10.9.9.9:6379"])?;
    scene.service("240.240.0.4:6379", Service { id: 4, ..OPAQUE }, &["127.0.0.2:6379"])?;
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    for (then, listen) in [
        ("127.0.0.5:8080", "127.0.0.5:8080"),
        ("240.240.0.4:6379", "127.0.0.2:6379"),
        ("240.240.0.1:80", "127.0.0.1:15001"),
    ] {
        let server = greet(scene.listen(listen)?);
        assert_eq!(scene.ask(&format!("tcp-then 240.240.0.3:6379 {then}"))?, format!("hello from {then}"));
        server.join().expect("no panic")?;
    }
    let closed: Vec<_> = scene.events().iter().map(|event| (event.kind, event.service)).collect();
    assert_eq!(closed, [(kind::DIRECT_CLOSED, 4)]);
    assert_eq!(scene.counter(counter::REDIRECTED)?, 1);
    Ok(())
}

#[test]
fn a_connect_that_does_not_wait_is_intercepted_all_the_same() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let proxy = greet(scene.listen("127.0.0.1:15001")?);
    assert_eq!(scene.ask("nonblocking 240.240.0.1:80")?, "in progress, hello from 240.240.0.1:80");
    proxy.join().expect("no panic")?;
    assert_eq!(scene.ask("nonblocking 240.240.0.1:81")?, "ConnectionRefused", "at once, not later");
    Ok(())
}

#[test]
fn link_local_services_are_never_intercepted_even_when_registered() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    let _proxy = scene.listen("127.0.0.1:15001")?;
    for ip in ["169.254.169.254", "169.254.170.2"] {
        let at = format!("{ip}:80");
        scene.ip(&format!("addr add {ip}/32 dev lo"))?;
        scene.service(&at, PROXIED, &["127.0.0.1:9"])?;
        let server = greet(scene.listen(&at)?);
        assert_eq!(scene.connect(&at)?, format!("hello from {at}"));
        server.join().expect("no panic")?;
    }
    assert_eq!(scene.counter(counter::REDIRECTED)?, 0);
    Ok(())
}

#[test]
fn datagrams_that_are_no_questions_pass() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    let _proxy = scene.listen("127.0.0.1:15001")?;
    let _dns =
        scene.space.netns.run(|| socket::udp_socket("127.0.0.1:15053".parse()?).map_err(anyhow::Error::from))??;
    scene.ip("addr add 10.9.9.9/32 dev lo")?;
    scene.service("10.9.9.9:5000", PROXIED, &["127.0.0.1:9"])?;
    for verb in ["udp", "udp-connected"] {
        let server = scene.space.netns.run(|| UdpSocket::bind("10.9.9.9:5000"))??;
        server.set_read_timeout(Some(LIMIT))?;
        let answer = std::thread::spawn(move || -> io::Result<()> {
            let (_, from) = server.recv_from(&mut [0; 64])?;
            server.send_to(b"answer", from).map(drop)
        });
        assert_eq!(scene.ask(&format!("{verb} 10.9.9.9:5000"))?, "answer from 10.9.9.9:5000", "{verb}");
        answer.join().expect("no panic")?;
    }
    // A virtual address is nobody's over UDP, but to connect to it is no error.
    scene.service("[fd65::1]:80", PROXIED, &["127.0.0.1:9"])?;
    scene.ip("route add local 240.240.0.0/16 dev lo")?;
    let said = scene.ask("udp-then 10.9.9.9:53 240.240.0.1:80")?;
    assert_eq!(said, "10.9.9.9:53 then 240.240.0.1:80", "and the socket shows its true peer again");
    assert_eq!(scene.counter(counter::DNS)?, 1);
    assert_eq!(scene.counter(counter::REDIRECTED)?, 0);
    Ok(())
}

#[test]
fn an_answer_from_elsewhere_is_not_the_resolvers() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    let dns =
        scene.space.netns.run(|| socket::udp_socket("127.0.0.1:15053".parse()?).map_err(anyhow::Error::from))??;
    // Anybody can send from a port of this number.
    let stranger = scene.space.netns.run(|| UdpSocket::bind("127.0.0.5:15053"))??;
    dns.set_nonblocking(false)?;
    dns.set_read_timeout(Some(LIMIT))?;
    let answer = std::thread::spawn(move || -> io::Result<()> {
        let (_, from) = dns.recv_from(&mut [0; 64])?;
        stranger.send_to(b"lie", from).map(drop)
    });
    assert_eq!(scene.ask("udp 10.0.0.2:53")?, "lie from 127.0.0.5:15053");
    answer.join().expect("no panic")?;
    Ok(())
}

#[test]
fn who_enters_a_namespace_from_another_cgroup_is_its_task() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let proxy = greet(scene.listen("127.0.0.1:15001")?);
    let exec = scene.stage.client(Some(&scene.space), Some("exec/inner"), "kernel::client", "tcp 240.240.0.1:80")?;
    assert_eq!(exec.go()?, "hello from 240.240.0.1:80");
    proxy.join().expect("no panic")?;
    Ok(())
}

#[test]
fn the_agent_itself_is_not_intercepted_in_a_tasks_namespace() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let _proxy = scene.listen("127.0.0.1:15001")?;
    let to: SocketAddr = "240.240.0.1:80".parse()?;
    let own = scene.space.netns.run(|| TcpStream::connect_timeout(&to, LIMIT))?;
    assert_eq!(own.map(drop).map_err(|error| error.kind()), Err(io::ErrorKind::NetworkUnreachable));
    assert_eq!(scene.counter(counter::REDIRECTED)?, 0);
    Ok(())
}

#[test]
fn a_client_that_breaks_off_before_it_is_accepted_leaves_no_record() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let listener = scene.listen("127.0.0.1:15001")?;
    let peer: SocketAddr = scene.ask("break-off 240.240.0.1:80")?.parse().context("where it came from")?;
    assert_eq!(scene.readers.flows.take_tcp(scene.space.netns.cookie(), peer), None);
    assert_eq!(listener.accept()?.1, peer, "it was in the queue");
    Ok(())
}

#[test]
fn what_a_client_said_before_it_left_is_not_lost_on_a_busy_agent() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let listener = scene.listen("127.0.0.1:15001")?;
    let cookie = scene.space.netns.cookie();
    for forgotten in [false, true] {
        let from: SocketAddr = scene.ask("say-and-leave 240.240.0.1:80")?.parse().context("where it came from")?;
        wait_until_left(&scene, from.port())?;
        if forgotten {
            // The listener is given up instead.
            scene.maps.forget_flows(Some(cookie + 1))?;
            scene.maps.forget_flows(Some(cookie))?;
        }
        let (mut stream, peer) = listener.accept()?;
        assert_eq!(peer, from);
        let original = scene.readers.flows.take_tcp(cookie, peer).map(|original| original.addr);
        assert_eq!(original, (!forgotten).then(|| addr("240.240.0.1:80")));
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        assert_eq!(said, "word");
    }
    Ok(())
}

#[test]
fn the_policy_holds_while_the_agent_is_away() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    let guarded = Service { flags: service::FAIL_OPEN | service::GRANTED_ONLY, ..PROXIED };
    scene.service("240.240.0.1:80", guarded, &["127.0.0.3:8080"])?;
    let server = scene.listen("127.0.0.3:8080")?;
    assert_eq!(scene.connect("240.240.0.1:80")?, "ConnectionRefused", "nobody granted it");
    scene.maps.apply(&[Write::PutGrant(GrantKey { workload: 7, service: guarded.id })])?;
    let server = greet(server);
    assert_eq!(scene.connect("240.240.0.1:80")?, "hello from 240.240.0.1:80");
    server.join().expect("no panic")?;
    Ok(())
}

#[test]
fn a_full_map_refuses_and_removals_make_room() -> Result<()> {
    let Some(mut scene) = Scene::sized(0, &[("SERVICES", 2)])? else { return Ok(()) };
    let _proxy = scene.listen("127.0.0.1:15001")?;
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    scene.service("240.240.0.2:80", PROXIED, &["127.0.0.1:9"])?;
    let third = Write::PutService(addr("240.240.0.3:80"), PROXIED);
    let full = scene.maps.apply(&[third.clone(), Write::RemoveService(addr("240.240.0.1:80"))]);
    assert_eq!(full.expect_err("no room").map, "SERVICES");
    assert_eq!(scene.connect("240.240.0.3:80")?, "ConnectionRefused");
    assert_eq!(scene.counter(counter::REFUSED)?, 1);
    // What failed is tried again, and what was removed after it has made room.
    scene.maps.apply(&[third])?;
    let image = scene.maps.image()?;
    assert_eq!(image.services.into_keys().collect::<Vec<_>>(), [addr("240.240.0.2:80"), addr("240.240.0.3:80")]);
    Ok(())
}

#[test]
fn what_is_no_service_is_counted_and_passes() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    assert_eq!(scene.connect("10.9.9.9:80")?, "NetworkUnreachable");
    assert_eq!(scene.counter(counter::PASSED)?, 1);
    assert_eq!(scene.connect("240.240.0.9:80")?, "ConnectionRefused");
    assert_eq!(scene.counter(counter::REFUSED)?, 1);
    assert_eq!(path::PROXY, 1, "a record's number, which must not change");
    Ok(())
}
