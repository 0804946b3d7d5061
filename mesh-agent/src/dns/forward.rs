//! Queries for names that are not ours: carried verbatim to a resolver and back (RFC 5452 for what is matched).
//!
//! Knows addresses and namespaces; must not know services, nor which resolver a task had asked.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, UdpSocket},
    time::{Instant, timeout_at},
};

use super::wire::{self, Query, Transport};
use crate::sys::netns::{Netns, NetnsError};

/// A resolver gave no usable reply.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("cannot enter the task's namespace to ask resolver {upstream}")]
    Namespace { upstream: SocketAddr, source: NetnsError },
    #[error("cannot reach resolver {upstream}: is it running, and is there a route from the task to it?")]
    Unreachable { upstream: SocketAddr, source: io::Error },
    #[error("resolver {upstream} did not answer within {} ms: see whether it is overloaded", .after.as_millis())]
    Timeout { upstream: SocketAddr, after: Duration },
}

/// Asks `upstream` as the client had asked us: over UDP or TCP, from inside its namespace, with a port and an id that
/// nobody can guess. The reply is the upstream's bytes with the client's id; a truncated one is passed on, for the
/// client to come back over TCP.
///
/// # Errors
/// No reply to this very question came from `upstream` within `limit`.
pub async fn ask(
    query: &Query,
    bytes: &[u8],
    transport: Transport,
    upstream: SocketAddr,
    netns: Option<&Arc<Netns>>,
    limit: Duration,
) -> Result<Vec<u8>, ForwardError> {
    let theirs = wire::random_id();
    let out = wire::with_id(bytes.to_vec(), theirs);
    let exchange = async {
        let unreachable = |source| ForwardError::Unreachable { upstream, source };
        match transport {
            Transport::Udp => {
                let socket = inside(netns, upstream, || udp(upstream))?;
                over_udp(query, &out, theirs, socket).await.map_err(unreachable)
            }
            Transport::Tcp => {
                let socket = inside(netns, upstream, || tcp(upstream))?;
                over_tcp(query, &out, theirs, socket, upstream).await.map_err(unreachable)
            }
        }
    };
    let reply = timeout_at(Instant::now() + limit, exchange)
        .await
        .unwrap_or(Err(ForwardError::Timeout { upstream, after: limit }))?;
    // A query without an id was never parsed.
    Ok(wire::with_id(reply, wire::id(bytes).unwrap_or_default()))
}

/// Sends and receives on a connected socket, so that the kernel drops what others send and reports a port that
/// nobody listens on.
async fn over_udp(query: &Query, out: &[u8], id: u16, socket: UdpSocket) -> io::Result<Vec<u8>> {
    socket.send(out).await?;
    let mut buffer = vec![0; query.largest_datagram()];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let reply = buffer.get(..length).unwrap_or_default();
        if wire::id(reply) == Some(id) && query.is_answered_by(reply) {
            return Ok(reply.to_vec());
        }
    }
}

async fn over_tcp(query: &Query, out: &[u8], id: u16, socket: TcpSocket, upstream: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = socket.connect(upstream).await?;
    write_message(&mut stream, out).await?;
    loop {
        let reply = read_message(&mut stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if wire::id(&reply) == Some(id) && query.is_answered_by(&reply) {
            return Ok(reply);
        }
    }
}

/// Writes a message and its length (RFC 1035 §4.2.2) in one segment.
///
/// # Errors
/// The connection is gone, or the message is longer than 65,535 octets.
pub async fn write_message(stream: &mut (impl tokio::io::AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

/// Reads one message; `None` when the peer closed between two.
///
/// # Errors
/// The connection is gone in the middle of a message.
pub async fn read_message(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    match stream.read(&mut length[..1]).await? {
        0 => return Ok(None),
        _ => stream.read_exact(&mut length[1..]).await?,
    };
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

fn inside<T>(
    netns: Option<&Arc<Netns>>,
    upstream: SocketAddr,
    make: impl FnOnce() -> io::Result<T>,
) -> Result<T, ForwardError> {
    match netns {
        Some(netns) => netns.run(make).map_err(|source| ForwardError::Namespace { upstream, source })?,
        None => make(),
    }
    .map_err(|source| ForwardError::Unreachable { upstream, source })
}

/// The kernel picks the source port at random when the socket is connected.
fn udp(upstream: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = if upstream.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = std::net::UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    socket.connect(upstream)?;
    UdpSocket::from_std(socket)
}

fn tcp(upstream: SocketAddr) -> io::Result<TcpSocket> {
    if upstream.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}
