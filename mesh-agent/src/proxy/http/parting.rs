//! An upstream connection that is left in good order: after our end, the peer's end is awaited for a moment.
//!
//! hyper drops an idle connection as soon as it has ended its own direction. Over a tunnel that would be a reset, which the
//! other agent would pass to the application and log as one. Must not know what is spoken over it.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

use crate::proxy::wire::{Socket, Wire};

/// An application that was told the end closes within this, or never.
const PATIENCE: Duration = Duration::from_secs(2);

/// A wire that is not cut off when it is dropped in good order.
pub(super) struct Parting {
    /// Taken when it is dropped or becomes something else.
    wire: Option<Wire>,
    /// Our direction has ended in order.
    shut: bool,
    /// Theirs has ended, in order or not.
    ended: bool,
    /// Octets written.
    written: Arc<AtomicU64>,
}

impl Parting {
    pub(super) fn new(wire: Wire) -> Self {
        Self { wire: Some(wire), shut: false, ended: false, written: Arc::default() }
    }

    /// How many octets were written to it, also when it is gone.
    pub(super) fn written(&self) -> Arc<AtomicU64> {
        self.written.clone()
    }

    fn count(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(length)) = &written {
            self.written.fetch_add(*length as u64, Ordering::Relaxed);
        }
        written
    }

    /// The wire, for another protocol.
    pub(super) fn into_wire(mut self) -> Option<Wire> {
        self.wire.take()
    }

    fn wire(&mut self) -> io::Result<Pin<&mut Wire>> {
        self.wire.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Parting {
    fn drop(&mut self) {
        let Some(wire) = self.wire.take() else { return };
        // The kernel does this for a TCP socket.
        if self.shut && !self.ended && matches!(wire.socket, Socket::Tunnel(_)) {
            tokio::spawn(tokio::time::timeout(PATIENCE, part(wire)));
        }
    }
}

/// Reads until there is no more. What comes now is for nobody.
async fn part(mut wire: Wire) {
    let mut rest = [0; 256];
    while wire.read(&mut rest).await.is_ok_and(|length| length > 0) {}
}

impl AsyncRead for Parting {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(self.wire()?.poll_read(cx, buf));
        if read.is_err() || (buf.filled().len() == before && buf.remaining() > 0) {
            self.ended = true;
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Parting {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.wire()?.poll_write(cx, buf);
        self.count(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.wire()?.poll_write_vectored(cx, bufs);
        self.count(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = ready!(self.wire()?.poll_shutdown(cx));
        self.shut = done.is_ok();
        Poll::Ready(done)
    }
}
