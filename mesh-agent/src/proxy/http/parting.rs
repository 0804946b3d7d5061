//! An upstream connection that is left in good order: after our end, the peer's end is awaited for a moment; and of which
//! it is known at the peer's end how much the application has taken.
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

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::{
    proxy::{
        taken::Settling,
        wire::{self, Socket, Wire},
    },
    sys::closes::Watched,
    transport::tunnel::UNTOLD,
};

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
    /// A write has failed although theirs had not ended: what is read as their end now is none.
    broken: bool,
    /// Octets written.
    written: Arc<AtomicU64>,
    /// Of these, how many the application had taken when it ended its direction or reset both; [`UNTOLD`] until then. The other agent
    /// says so; of a task of this host the kernel does. `None`: nobody will.
    taken: Option<Arc<AtomicU64>>,
    settling: Settling,
}

impl Parting {
    pub(super) fn new(wire: Wire) -> Self {
        let taken = match &wire.socket {
            Socket::Tunnel(tunnel) => Some(tunnel.taken()),
            Socket::Tcp(_) => wire.gone.is_some().then(|| Arc::new(AtomicU64::new(UNTOLD))),
        };
        let settling = Settling::default();
        let wire = Some(wire);
        Self { wire, shut: false, ended: false, broken: false, written: Arc::default(), taken, settling }
    }

    /// How many octets were written to it, also when it is gone.
    pub(super) fn written(&self) -> Arc<AtomicU64> {
        self.written.clone()
    }

    /// How many of them the application has taken, also when it is gone.
    pub(super) fn taken(&self) -> Option<Arc<AtomicU64>> {
        self.taken.clone()
    }

    fn count(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Ready(Ok(length)) => {
                self.written.fetch_add(*length as u64, Ordering::Relaxed);
            }
            Poll::Ready(Err(error)) => {
                self.broken |= !wire::had_ended(error);
                self.ask();
            }
            Poll::Pending => {}
        }
        written
    }

    /// The connection was reset: the kernel may know how much the application had read of it.
    fn ask(&self) {
        let watched = self.wire.as_ref().and_then(|wire| wire.watched.as_ref());
        if let (Some(watched), Some(taken)) = (watched, &self.taken)
            && let Some(read) = watched.taken()
        {
            taken.store(read, Ordering::Relaxed);
        }
    }

    /// The socket of which we find out ourselves how much was taken.
    fn settles(&self) -> Option<(&TcpStream, Option<&Watched>, &AtomicU64)> {
        let wire = self.wire.as_ref()?;
        match &wire.socket {
            Socket::Tcp(stream) if !self.broken => Some((stream, wire.watched.as_deref(), self.taken.as_ref()?)),
            Socket::Tcp(_) | Socket::Tunnel(_) => None,
        }
    }

    fn poll_settle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut settling = std::mem::take(&mut self.settling);
        let settled = match self.settles() {
            Some((stream, watched, taken)) => settling
                .poll(cx, stream, watched, self.written.load(Ordering::Relaxed))
                .map(|known| taken.store(known, Ordering::Relaxed)),
            None => Poll::Ready(()),
        };
        self.settling = settling;
        settled
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
        let end = read.is_ok() && buf.filled().len() == before && buf.remaining() > 0;
        if end {
            // Who hears of the end wants to know at once what it means.
            ready!(self.poll_settle(cx));
        }
        if read.is_err() {
            self.ask();
        }
        self.ended |= end || read.is_err();
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
        let mut wire = self.wire()?;
        // hyper does not read while nobody takes the answer, but it flushes whenever it is woken.
        wire.gather(cx);
        wire.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = ready!(self.wire()?.poll_shutdown(cx));
        self.shut = done.is_ok();
        Poll::Ready(done)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt as _, net::TcpListener};

    use super::*;
    use crate::proxy::{
        places::{Home, Namespaces},
        tests::soon,
    };

    /// What is known of a request when the end is read: of one that came after the application had closed, or that it read.
    async fn known(closed_before: bool, ours: bool) -> Option<u64> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (stream, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (namespaces, task) = (Namespaces::unmarked(), "world-1".parse::<mesh_core::id::TaskId>().unwrap());
        namespaces.put(task.clone(), Home::Host);
        let (_, gone) = namespaces.socket_of(&task, listener.local_addr().unwrap()).unwrap();
        let wire = Wire::tcp(stream.unwrap());
        let mut parting = Parting::new(if ours { wire.until(gone) } else { wire });
        let taken = parting.taken();
        let mut app = accepted.unwrap().0;
        if closed_before {
            drop(app);
            parting.write_all(b"request").await.unwrap();
        } else {
            parting.write_all(b"request").await.unwrap();
            app.read_exact(&mut [0; 7]).await.unwrap();
            drop(app);
        }
        assert_eq!(soon(parting.read(&mut [0; 8])).await.unwrap(), 0);
        taken.map(|taken| taken.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn of_a_task_of_this_host_it_is_known_what_it_has_taken() {
        assert_eq!(known(true, true).await, Some(0));
        assert_eq!(known(false, true).await, Some(7));
        assert_eq!(known(true, false).await, None, "of another host's kernel nothing is presumed");
    }
}
