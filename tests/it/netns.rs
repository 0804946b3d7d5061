//! Network namespaces, first without any kernel program: the guard that enters them, and sockets that stay where they were
//! made. Needs root and `ip`. Names are asked for through the programs, though, as tasks do.

mod names;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use anyhow::{Context as _, Result};
use mesh_agent::sys::{
    netns::{Netns, NetnsError},
    socket,
};
use mesh_tests::{
    stage::Space,
    tier::{Tier, require},
};

fn here() -> Result<u64> {
    Ok(Netns::open(Path::new("/proc/thread-self/ns/net"))?.cookie())
}

#[test]
fn the_thread_is_back_home_after_work_and_after_a_panic() -> Result<()> {
    if !require(Tier::Netns) {
        return Ok(());
    }
    let home = here()?;
    let space = Space::new()?;
    assert_ne!(space.netns.cookie(), home);
    assert_eq!(space.netns.run(here)??, space.netns.cookie(), "inside");
    assert_eq!(here()?, home, "after work");
    let panicked = catch_unwind(AssertUnwindSafe(|| space.netns.run(|| panic!("in the middle of work"))));
    assert!(panicked.is_err());
    assert_eq!(here()?, home, "after a panic");
    Ok(())
}

#[test]
fn a_listener_stays_in_its_namespace_and_serves_from_outside() -> Result<()> {
    if !require(Tier::Netns) {
        return Ok(());
    }
    let (space, other) = (Space::new()?, Space::new()?);
    let at: SocketAddr = "127.0.0.1:15001".parse()?;
    let listener: TcpListener = space.netns.run(|| socket::tcp_listener(at))??;
    // The same port is free in every other namespace.
    let _second = other.netns.run(|| socket::tcp_listener(at))??;
    assert!(space.netns.run(|| socket::tcp_listener(at))?.is_err(), "and taken in this one");
    listener.set_nonblocking(false)?;
    let mut client = space.netns.run(|| TcpStream::connect(at))??;
    let (mut served, _) = listener.accept()?;
    served.write_all(b"from outside")?;
    drop(served);
    let mut said = String::new();
    client.read_to_string(&mut said)?;
    assert_eq!(said, "from outside");
    Ok(())
}

#[test]
fn a_client_socket_made_inside_connects_there() -> Result<()> {
    if !require(Tier::Netns) {
        return Ok(());
    }
    let space = Space::new()?;
    let listener = space.netns.run(|| TcpListener::bind("127.0.0.1:0"))??;
    let to = listener.local_addr()?;
    let socket = space.netns.run(|| socket::tcp_client(to))??;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Connected by a thread that is at home, as the proxy does it.
    runtime.block_on(async { tokio::net::TcpSocket::from_std_stream(socket).connect(to).await })?;
    assert!(TcpStream::connect(to).is_err(), "nobody listens there at home");
    Ok(())
}

#[test]
fn what_is_no_namespace_is_refused_with_its_path() -> Result<()> {
    if !require(Tier::Netns) {
        return Ok(());
    }
    let missing = Netns::open(Path::new("/proc/self/ns/no-such")).err().context("it must not open")?;
    assert!(matches!(&missing, NetnsError::Open { path, .. } if path.ends_with("no-such")), "{missing}");
    let file = Netns::open(Path::new("/proc/self/status")).err().context("it must not be entered")?;
    assert!(matches!(file, NetnsError::Enter { .. }), "{file}");
    Ok(())
}
