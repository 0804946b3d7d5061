//! What an application leaves unread when it closes a connection that the agent opened to it. The test plays both, step by
//! step, so each order is certain.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::sys::{
    bpf::{BpfError, Pins, Programs},
    closes::Watched,
    socket,
};
use mesh_common::maps::SocketLayout;
use mesh_tests::{
    stage::{Space, Stage},
    tier::{self, Tier},
};
use socket2::{SockRef, Socket};

use super::{LIMIT, Scene};

/// An application that listens in `space`.
fn application(space: &Space, at: &str) -> Result<TcpListener> {
    let at: SocketAddr = at.parse()?;
    Ok(space.netns.run(|| TcpListener::bind(at))??)
}

/// The agent's connection to it, from `port` or any.
fn connect(scene: &Scene, space: &Space, to: SocketAddr, port: u16) -> Result<(TcpStream, Watched)> {
    let made = space.netns.run(|| -> Result<TcpStream> {
        let socket = Socket::from(socket::tcp_client(to)?);
        socket.set_nonblocking(false)?;
        socket.set_reuse_address(true)?;
        if port != 0 {
            socket.bind(&SocketAddr::new(to.ip(), port).into())?;
        }
        socket.connect(&to.into())?;
        Ok(socket.into())
    });
    let stream = made??;
    stream.set_read_timeout(Some(LIMIT))?;
    let watched = scene.readers.closes.watch(space.netns.cookie(), &stream).context("it has addresses")?;
    Ok((stream, watched))
}

/// A connection on which the application has read `first`, and on which `second` waits for it.
fn asked(scene: &Scene, listener: &TcpListener, to: SocketAddr) -> Result<(TcpStream, TcpStream, Watched)> {
    let (mut agent, watched) = connect(scene, &scene.space, to, 0)?;
    let mut app = listener.accept()?.0;
    app.set_read_timeout(Some(LIMIT))?;
    agent.write_all(b"first")?;
    app.read_exact(&mut [0; 5])?;
    agent.write_all(b"second")?;
    let mut there = [0; 6];
    while app.peek(&mut there)? < there.len() {}
    Ok((agent, app, watched))
}

/// The agent hears of a reset.
fn hears_reset(agent: &mut TcpStream) -> Result<()> {
    let read = agent.read(&mut [0; 8]);
    ensure!(read.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{read:?}");
    Ok(())
}

#[test]
fn what_was_not_read_before_a_close_is_known_when_the_reset_is_seen() -> Result<()> {
    for (at, to) in [("127.0.0.1:0", "127.0.0.1"), ("[::]:0", "127.0.0.1"), ("[::1]:0", "::1")] {
        let Some(scene) = Scene::new(0)? else { return Ok(()) };
        let listener = application(&scene.space, at)?;
        let to = SocketAddr::new(to.parse()?, listener.local_addr()?.port());
        for part in [0, 1, 5] {
            let (mut agent, mut app, watched) = asked(&scene, &listener, to)?;
            app.read_exact(&mut vec![0; part])?;
            assert_eq!(watched.taken(), None, "not yet");
            drop(app);
            hears_reset(&mut agent)?;
            assert_eq!(watched.taken(), Some(5 + part as u64), "{at}, {part} octets of the second");
            assert_eq!(watched.taken(), None, "it is told once");
        }
    }
    Ok(())
}

#[test]
fn an_end_of_the_other_direction_is_not_counted() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    let listener = application(&scene.space, "127.0.0.1:0")?;
    let (mut agent, app, watched) = asked(&scene, &listener, listener.local_addr()?)?;
    agent.shutdown(std::net::Shutdown::Write)?;
    drop(app);
    hears_reset(&mut agent)?;
    assert_eq!(watched.taken(), Some(5));
    Ok(())
}

#[test]
fn a_connection_that_nobody_had_accepted_was_not_read() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    let listener = application(&scene.space, "127.0.0.1:0")?;
    let (mut agent, watched) = connect(&scene, &scene.space, listener.local_addr()?, 0)?;
    agent.write_all(b"first")?;
    drop(listener);
    hears_reset(&mut agent)?;
    assert_eq!(watched.taken(), Some(0));
    Ok(())
}

#[test]
fn nothing_is_said_where_all_was_read_or_still_can_be() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    let listener = application(&scene.space, "127.0.0.1:0")?;
    let to = listener.local_addr()?;
    // All was read, and the application resets.
    let (mut agent, mut app, watched) = asked(&scene, &listener, to)?;
    app.read_exact(&mut [0; 6])?;
    SockRef::from(&app).set_linger(Some(Duration::ZERO))?;
    drop(app);
    hears_reset(&mut agent)?;
    assert_eq!(watched.taken(), None, "all was read");
    // The connection breaks under the application, which reads on.
    let (agent, mut app, watched) = asked(&scene, &listener, to)?;
    SockRef::from(&agent).set_linger(Some(Duration::ZERO))?;
    drop(agent);
    assert_eq!(watched.taken(), None, "it is not closed");
    let mut rest = [0; 6];
    app.read_exact(&mut rest)?;
    assert_eq!(&rest, b"second", "what the hook must not call unread");
    // It ends its answers in order first.
    let (mut agent, app, watched) = asked(&scene, &listener, to)?;
    app.shutdown(std::net::Shutdown::Write)?;
    assert_eq!(agent.read(&mut [0; 8])?, 0);
    assert_eq!(watched.taken(), None, "it may read on");
    Ok(())
}

#[test]
fn a_record_of_an_earlier_connection_says_nothing_of_a_later_one() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    let listener = application(&scene.space, "127.0.0.1:0")?;
    let to = listener.local_addr()?;
    let (mut agent, app, _never_asked) = asked(&scene, &listener, to)?;
    let port = agent.local_addr()?.port();
    drop(app);
    hears_reset(&mut agent)?;
    drop(agent);
    let (mut agent, watched) = connect(&scene, &scene.space, to, port)?;
    let app = listener.accept()?.0;
    SockRef::from(&app).set_linger(Some(Duration::ZERO))?;
    drop(app);
    hears_reset(&mut agent)?;
    assert_eq!(watched.taken(), None);
    Ok(())
}

#[test]
fn who_is_not_enrolled_is_not_looked_at() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    let stranger = scene.stage.space()?;
    let listener = application(&stranger, "127.0.0.1:0")?;
    let (mut agent, watched) = connect(&scene, &stranger, listener.local_addr()?, 0)?;
    agent.write_all(b"first")?;
    drop(listener);
    hears_reset(&mut agent)?;
    assert_eq!(watched.taken(), None);
    Ok(())
}

#[test]
fn programs_load_where_nothing_is_known_of_the_kernel_and_what_is_wrong_is_refused() -> Result<()> {
    if !tier::require(Tier::Kernel) {
        return Ok(());
    }
    let stage = Stage::new()?;
    let load = |layout| Programs::load_with(&Pins::new(stage.pin_dir()), stage.cgroup(), &[], layout);
    let (programs, ..) = load(SocketLayout::default())?;
    ensure!(!programs.knows_unread, "nothing is known");
    drop(programs);
    let refused = load(SocketLayout { copied_seq: 1 << 20, queued: 8, socket: 8 }).err();
    ensure!(matches!(&refused, Some(BpfError::Verify { name: "mesh_sock_ops", .. })), "{refused:?}");
    Ok(())
}
