//! Many connections at once, too many, and many while the programs are replaced.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result};
use mesh_agent::sys::bpf::{Pins, Programs};
use mesh_common::{
    addr::Addr,
    maps::{Service, counter},
};
use mesh_core::dataplane::Write;

use super::{LIMIT, PROXIED, Scene};

/// Processes, and connections that each holds at once. One process may not have more descriptors than 1024.
const CLIENTS: u32 = 4;
const EACH: u32 = 500;

/// The address `n` after `first`.
fn nth(first: SocketAddr, n: u32) -> SocketAddr {
    match first {
        SocketAddr::V4(v4) => (Ipv4Addr::from(u32::from(*v4.ip()) + n), v4.port()).into(),
        SocketAddr::V6(v6) => v6.into(),
    }
}

/// Opens `count` connections to one address and reads each to its end.
pub(super) fn hold(to: SocketAddr, count: u32) -> io::Result<String> {
    let held = (0..count).map(|_| TcpStream::connect_timeout(&to, LIMIT)).collect::<io::Result<Vec<_>>>()?;
    for mut stream in held {
        stream.set_read_timeout(Some(LIMIT))?;
        stream.read_to_end(&mut Vec::new())?;
    }
    Ok("held".into())
}

/// Makes `count` connections, one after the other; says how many were not greeted.
pub(super) fn burst(to: SocketAddr, count: u32) -> io::Result<String> {
    let greeted = |_: &u32| {
        let mut text = String::new();
        let read = TcpStream::connect_timeout(&to, LIMIT).and_then(|mut stream| {
            stream.set_read_timeout(Some(LIMIT))?;
            stream.read_to_string(&mut text)
        });
        read.is_ok() && text == "hello"
    };
    Ok(format!("{} failed", (0..count).filter(|n| !greeted(n)).count()))
}

/// Opens one connection to each of `count` addresses from `first` on, all at once; says how many were told another
/// original destination than theirs.
pub(super) fn each(first: SocketAddr, count: u32) -> io::Result<String> {
    let open = |n| Ok((nth(first, n), TcpStream::connect_timeout(&nth(first, n), LIMIT)?));
    let all = (0..count).map(open).collect::<io::Result<Vec<_>>>()?;
    let mut wrong = 0;
    for (to, mut stream) in all {
        let mut text = String::new();
        stream.set_read_timeout(Some(LIMIT))?;
        stream.read_to_string(&mut text)?;
        wrong += u32::from(text != to.to_string());
    }
    Ok(format!("{wrong} wrong"))
}

#[test]
fn a_full_table_of_connections_loses_the_excess_and_counts_it() -> Result<()> {
    let Some(mut scene) = Scene::sized(0, &[("FLOWS", 4)])? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let listener = scene.listen("127.0.0.1:15001")?;
    let client = scene.stage.client(Some(&scene.space), None, "kernel::client", "hold 240.240.0.1:80 6")?;
    let client = std::thread::spawn(|| client.go());
    let accepted = (0..6).map(|_| listener.accept()).collect::<io::Result<Vec<_>>>()?;
    let cookie = scene.space.netns.cookie();
    let known = accepted.iter().filter(|(_, peer)| scene.readers.flows.take_tcp(cookie, *peer).is_some()).count();
    drop(accepted);
    assert_eq!(client.join().expect("no panic")?, "held");
    assert_eq!((known, scene.counter(counter::MAP_FULL)?), (4, 2));
    Ok(())
}

#[test]
fn two_thousand_connections_at_once_keep_their_destinations() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    let first: SocketAddr = "240.240.16.1:80".parse()?;
    let total = CLIENTS * EACH;
    let put = |n| Write::PutService(Addr::from(nth(first, n)), Service { id: n + 1, ..PROXIED });
    scene.maps.apply(&(0..total).map(put).collect::<Vec<_>>())?;
    let listener = scene.listen("127.0.0.1:15001")?;
    let (flows, cookie) = (scene.readers.flows.clone(), scene.space.netns.cookie());
    let proxy = std::thread::spawn(move || -> Result<()> {
        for _ in 0..total {
            let (mut stream, peer) = listener.accept()?;
            let original = flows.take_tcp(cookie, peer).with_context(|| format!("no record of {peer}"))?;
            stream.write_all(SocketAddr::from(original.addr).to_string().as_bytes())?;
        }
        Ok(())
    });
    let clients = (0..CLIENTS).map(|n| {
        let script = format!("each {} {EACH}", nth(first, n * EACH));
        let client = scene.stage.client(Some(&scene.space), None, "kernel::client", &script)?;
        Ok(std::thread::spawn(|| client.go()))
    });
    for client in clients.collect::<Result<Vec<_>>>()? {
        assert_eq!(client.join().expect("no panic")?, "0 wrong");
    }
    proxy.join().expect("no panic")?;
    assert_eq!(scene.counter(counter::REDIRECTED)?, u64::from(total));
    assert_eq!(scene.counter(counter::MAP_FULL)?, 0);
    Ok(())
}

#[test]
fn no_connection_fails_while_programs_are_replaced() -> Result<()> {
    let Some(mut scene) = Scene::new(0)? else { return Ok(()) };
    scene.service("240.240.0.1:80", PROXIED, &["127.0.0.1:9"])?;
    let listener = scene.listen("127.0.0.1:15001")?;
    let over = Arc::new(AtomicBool::new(false));
    let done = over.clone();
    let proxy = std::thread::spawn(move || -> io::Result<()> {
        while !done.load(Ordering::Relaxed) {
            listener.accept()?.0.write_all(b"hello")?;
        }
        Ok(())
    });
    let client = scene.stage.client(Some(&scene.space), None, "kernel::client", "burst 240.240.0.1:80 3000")?;
    let client = std::thread::spawn(|| client.go());
    let mut swaps = 0;
    while !client.is_finished() {
        let pins = Pins::new(scene.stage.pin_dir());
        let (mut next, ..) = Programs::load(pins, scene.stage.cgroup().to_path_buf())?;
        next.attach()?;
        swaps += 1;
    }
    assert_eq!(client.join().expect("no panic")?, "0 failed", "{swaps} swaps");
    assert!(swaps > 1, "replaced while connections were made");
    assert_eq!(scene.counter(counter::REDIRECTED)?, 3000);
    over.store(true, Ordering::Relaxed);
    // One more, so that the proxy looks up.
    assert_eq!(scene.connect("240.240.0.1:80")?, "hello from 240.240.0.1:80");
    proxy.join().expect("no panic")?;
    Ok(())
}
