//! One end of a proxied connection: a TCP socket or a tunnel stream, and what was already read from it.
//!
//! Must not know what is spoken over it, nor at which end of the proxy it stands.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd as _, OwnedFd},
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bytes::{Buf as _, Bytes};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::places::Gone;
use crate::{sys::closes::Watched, transport::tunnel::Tunnel};

/// A NAT gateway forgets after 350 s, and a keepalive of the application ends at the proxy; so we send our own. A peer that does not
/// answer is asked as often, and given up as soon, as the host is set to: 9 times in 11 minutes unless somebody has changed it.
const KEEPALIVE: Duration = Duration::from_secs(180);

/// One end of a connection.
pub(super) struct Wire {
    /// Read before, to be read again first.
    pub(super) early: Bytes,
    pub(super) socket: Socket,
    /// The task at the other end, where it is one of this host.
    pub(super) gone: Option<Gone>,
    /// How it leaves the connection, where the kernel tells. Few bytes, because every connection has it.
    pub(super) watched: Option<Box<Watched>>,
}

pub(super) enum Socket {
    Tcp(TcpStream),
    Tunnel(Box<Tunnel>),
}

impl Wire {
    pub(super) fn new(socket: Socket) -> Self {
        Self { early: Bytes::new(), socket, gone: None, watched: None }
    }

    /// The same, just connected to a task of this host, and ending with it.
    pub(super) fn until(self, gone: Gone) -> Self {
        let watched = match &self.socket {
            Socket::Tcp(stream) => gone.watch(stream).map(Box::new),
            Socket::Tunnel(_) => None,
        };
        Self { gone: Some(gone), watched, ..self }
    }

    /// A connected TCP socket.
    pub(super) fn tcp(stream: TcpStream) -> Self {
        Self::new(Socket::Tcp(stream))
    }

    /// The same, with `early` to be read first, before anything that was to be read first already.
    pub(super) fn rewound(mut self, early: Bytes) -> Self {
        if self.early.is_empty() {
            self.early = early;
        } else if !early.is_empty() {
            self.early = [early, self.early].concat().into();
        }
        self
    }

    /// A second handle of the socket, to look at its state while somebody else owns it.
    pub(super) fn watched(&self) -> Option<OwnedFd> {
        match &self.socket {
            Socket::Tcp(stream) => stream.as_fd().try_clone_to_owned().ok(),
            Socket::Tunnel(_) => None,
        }
    }

    /// Ends both directions so that the peer sees a reset, not an end.
    pub(super) fn reset(self) {
        match self.socket {
            Socket::Tcp(stream) => reset(&stream),
            // A tunnel that is dropped unfinished is reset.
            Socket::Tunnel(tunnel) => drop(tunnel),
        }
    }

    /// Whether what the peer has sent, and nobody has taken yet, begins so.
    pub(super) async fn begins(&self, how: impl FnOnce(&[u8]) -> bool) -> bool {
        let mut bytes = [0; 16];
        match &self.socket {
            _ if !self.early.is_empty() => how(&self.early),
            Socket::Tcp(stream) => stream.peek(&mut bytes).await.is_ok_and(|length| how(&bytes[..length])),
            Socket::Tunnel(_) => false,
        }
    }

    /// Until when it may be used for something new. As [`Tunnel::good_until`].
    pub(super) fn good_until(&self) -> Option<SystemTime> {
        match &self.socket {
            Socket::Tcp(_) => None,
            Socket::Tunnel(tunnel) => tunnel.good_until(),
        }
    }

    /// For who does not read now. As [`Tunnel::gather`].
    pub(super) fn gather(&mut self, cx: &mut Context<'_>) {
        match &mut self.socket {
            // It has a connection of its own.
            Socket::Tcp(_) => {}
            Socket::Tunnel(tunnel) => tunnel.gather(cx),
        }
    }

    /// Whether a read would bring something, as far as is known without trying: so that who waits for it need not hold memory for it.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.socket {
            // Errors are readiness too: the next read tells.
            Socket::Tcp(stream) if self.early.is_empty() => stream.poll_read_ready(cx).map(drop),
            Socket::Tcp(_) | Socket::Tunnel(_) => Poll::Ready(()),
        }
    }

    /// Whether the peer has sent something, or ended: without taking it. Tunnels answer through `early`.
    pub(super) fn poll_speaks(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.early.is_empty() {
            return Poll::Ready(());
        }
        match &mut self.socket {
            // Errors are readiness too: the next read tells.
            Socket::Tcp(stream) => {
                let mut byte = [0];
                stream.poll_peek(cx, &mut ReadBuf::new(&mut byte)).map(drop)
            }
            Socket::Tunnel(tunnel) => {
                let mut bytes = [0; 1024];
                let mut buf = ReadBuf::new(&mut bytes);
                let read = std::task::ready!(Pin::new(tunnel).poll_read(cx, &mut buf));
                if read.is_ok() {
                    self.early = Bytes::copy_from_slice(buf.filled());
                }
                Poll::Ready(())
            }
        }
    }
}

/// Whether a TCP socket that fails a write so had been sent the peer's end before the reset: the kernel tells the two apart
/// (`tcp_reset` in `net/ipv4/tcp_input.c`). It tells of a reset once, and a read after that looks like an end in order.
pub(super) fn had_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

/// Waits for the end of the task that a wire leads to; for ever where it leads to none.
pub(super) async fn gone(gone: Option<Gone>) {
    match gone {
        Some(mut gone) => gone.wait().await,
        None => std::future::pending().await,
    }
}

/// Ready when a task has gone.
pub(super) type UntilGone = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The same, for who has no room for what it waits with while there is no task.
pub(super) fn until_gone(gone: Option<Gone>) -> Option<UntilGone> {
    gone.map(|mut gone| -> UntilGone { Box::pin(async move { gone.wait().await }) })
}

/// Makes the close of `stream` a reset.
pub(super) fn reset(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "cannot reset a connection; it is closed instead");
    }
}

/// Options of every TCP socket that carries payload. A listener hands them down to what it accepts.
pub(super) fn tune<'a>(socket: impl Into<SockRef<'a>>) -> io::Result<()> {
    let socket = socket.into();
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let length = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early[..length]);
            self.early.advance(length);
            return Poll::Ready(Ok(()));
        }
        match &mut self.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Tunnel(tunnel) => Pin::new(tunnel).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Tunnel(tunnel) => Pin::new(tunnel).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Socket::Tunnel(tunnel) => Pin::new(tunnel).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.socket {
            Socket::Tcp(stream) => stream.is_write_vectored(),
            Socket::Tunnel(tunnel) => tunnel.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tunnel(tunnel) => Pin::new(tunnel).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tunnel(tunnel) => Pin::new(tunnel).poll_shutdown(cx),
        }
    }
}
