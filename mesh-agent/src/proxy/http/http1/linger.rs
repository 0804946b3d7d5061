//! The end of a client's connection, so that the last answer arrives.
//!
//! An answer may come before the request has been read to its end: a refusal of a large upload, 400 or 431 for a head. To
//! close then would reset the connection, and a reset destroys what the client has not read yet. So our direction ends
//! first, and what still comes is thrown away for a moment (RFC 9112 §9.6). Must not know what was answered.

use std::{os::fd::OwnedFd, time::Duration};

use socket2::SockRef;
use tokio::{io::AsyncReadExt as _, net::TcpStream};

/// How long a client may go on sending. Those that read their answer close within a round trip.
const PATIENCE: Duration = Duration::from_secs(2);
const SCRATCH: usize = 16 << 10;

/// Makes the close a reset.
pub(super) fn reset(socket: &OwnedFd) {
    if let Err(error) = SockRef::from(socket).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "cannot reset a client's connection; it is closed instead");
    }
}

/// Ends our direction, waits for the client to end its own, and closes.
pub(super) async fn close(socket: OwnedFd) {
    // A socket that is broken has nobody to wait for.
    let socket = std::net::TcpStream::from(socket);
    if socket.shutdown(std::net::Shutdown::Write).is_err() {
        return;
    }
    let Ok(mut socket) = TcpStream::from_std(socket) else { return };
    let drained = async {
        let mut scratch = vec![0; SCRATCH];
        while matches!(socket.read(&mut scratch).await, Ok(1..)) {}
    };
    // One that goes on is reset by the close.
    let _ended_or_not = tokio::time::timeout(PATIENCE, drained).await;
}
