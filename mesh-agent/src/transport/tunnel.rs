//! One tunnel stream: bytes both ways with TCP's own semantics (half-close, reset, backpressure).
//!
//! The same to its user whatever the two agents speak, `ecs-mesh/1` or HBONE. Must not know how the stream was opened.

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll, ready},
    time::SystemTime,
};

use bytes::{Buf as _, Bytes};
use mesh_core::id::SpiffeId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{h2_settings, hbone, mux::halves, pool::Lease};

/// Bytes of a full frame. What is written by multiples of it wastes nothing.
pub const LARGEST_FRAME: usize = h2_settings::FRAME as usize;

/// A byte stream to or from a peer agent.
///
/// `shutdown` ends our direction, end of file means that the peer ended its own. A reset by the peer, and the loss of
/// the connection, is `ConnectionReset`. Dropping a tunnel before both directions have ended resets it.
pub struct Tunnel {
    peer: SpiffeId,
    receiving: Receiving,
    sending: Sending,
}

/// The direction from the peer to us.
pub struct Receiving {
    from: From,
    /// Received, not yet consumed.
    held: Bytes,
    /// Length of `held` as it arrived; to be granted again.
    owed: usize,
    lease: Option<Arc<Lease>>,
}

/// The peer has not said how much it took.
pub const UNTOLD: u64 = u64::MAX;

/// The direction from us to the peer.
pub struct Sending {
    to: To,
    /// The peer wants to be told at our end how much of its bytes the application has taken.
    asked: bool,
    taken: Option<u64>,
    _lease: Option<Arc<Lease>>,
}

/// A stream's two directions, as what the agents speak has them.
pub(super) enum Halves {
    Mesh((halves::Receiving, halves::Sending)),
    Hbone((hbone::Receiving, hbone::Sending)),
}

enum From {
    Mesh(halves::Receiving),
    Hbone(hbone::Receiving),
}

enum To {
    Mesh(halves::Sending),
    Hbone(hbone::Sending),
}

/// What is sent.
pub(super) enum Payload<'a> {
    /// Taken over.
    Whole(&'a mut Bytes),
    Copied(&'a [u8]),
}

impl Payload<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Whole(data) => data.len(),
            Self::Copied(data) => data.len(),
        }
    }

    /// The first of it, at most so much.
    pub(super) fn take(self, length: usize) -> Bytes {
        match self {
            Self::Whole(data) => data.split_to(length.min(data.len())),
            Self::Copied(data) => Bytes::copy_from_slice(data.get(..length).unwrap_or(data)),
        }
    }
}

impl Tunnel {
    pub(super) fn new(peer: SpiffeId, halves: Halves, lease: Option<Lease>) -> Self {
        let lease = lease.map(Arc::new);
        let (from, to) = match halves {
            Halves::Mesh((from, to)) => (From::Mesh(from), To::Mesh(to)),
            Halves::Hbone((from, to)) => (From::Hbone(from), To::Hbone(to)),
        };
        Self {
            peer,
            receiving: Receiving { from, held: Bytes::new(), owed: 0, lease: lease.clone() },
            sending: Sending { to, asked: false, taken: None, _lease: lease },
        }
    }

    /// The same, to a peer that has asked to be told how much of its bytes the application has taken.
    pub(super) fn asked(mut self) -> Self {
        self.sending.asked = true;
        self
    }

    /// Whether the peer has asked for [`Tunnel::tell_taken`].
    pub fn is_asked(&self) -> bool {
        self.sending.asked
    }

    /// Tells the peer, when our direction ends in order, how much of its bytes the application has taken.
    pub fn tell_taken(&mut self, taken: u64) {
        self.sending.taken = Some(taken);
    }

    /// Resets our direction at once, and tells the peer how much of its bytes the application has taken.
    pub fn reset_with_taken(&mut self, taken: u64) {
        match &mut self.sending.to {
            To::Mesh(to) => to.reset(Some(taken)),
            To::Hbone(to) => to.reset(taken),
        }
    }

    /// What the peer says at its end about how much of ours its application had taken by then; [`UNTOLD`] before, and if
    /// it says nothing.
    pub fn taken(&self) -> Arc<AtomicU64> {
        match &self.receiving.from {
            From::Mesh(from) => from.taken(),
            From::Hbone(from) => from.taken(),
        }
    }

    /// Who is at the other end, proved by its certificate.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// When the first of its connection's certificates expires: nothing new is to begin on it afterwards. `None` where the
    /// peer has opened it, and is to keep to that.
    pub fn good_until(&self) -> Option<SystemTime> {
        self.receiving.lease.as_ref().map(|lease| lease.connection.good_until)
    }

    /// As [`Receiving::poll_data`].
    ///
    /// # Errors
    /// `ConnectionReset`.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        self.receiving.poll_data(cx)
    }

    /// As [`Receiving::more_data`].
    pub fn more_data(&mut self) -> Option<Bytes> {
        self.receiving.more_data()
    }

    /// Waits until the peer resets the tunnel, or the connection is lost. For who has read its end, and would not hear of
    /// that before the next write.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.sending.to {
            To::Mesh(to) => to.poll_reset(cx),
            To::Hbone(to) => to.poll_reset(cx),
        }
    }

    /// As [`Receiving::gather`].
    pub fn gather(&mut self, cx: &mut Context<'_>) {
        self.receiving.gather(cx);
    }

    /// As [`Sending::poll_send`].
    ///
    /// # Errors
    /// `ConnectionReset`; `BrokenPipe` after a shutdown.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<usize>> {
        self.sending.poll_send(cx, data)
    }

    /// The two directions, to be used at the same time. Dropping [`Sending`] before its shutdown resets the tunnel at
    /// once; dropping [`Receiving`] before its end throws away what still comes, and resets once both are dropped.
    pub fn into_split(self) -> (Receiving, Sending) {
        (self.receiving, self.sending)
    }
}

impl Receiving {
    /// The next bytes as they arrived, without a copy; `None` at the end. What is handed over counts as consumed, so
    /// ask for more only when the last piece has gone on its way.
    ///
    /// # Errors
    /// `ConnectionReset`.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if !ready!(self.poll_fill(cx))? {
            return Poll::Ready(Ok(None));
        }
        let held = std::mem::take(&mut self.held);
        self.grant();
        Poll::Ready(Ok(Some(held)))
    }

    /// What has come behind what [`Receiving::poll_data`] has just handed over, and counts as consumed likewise. Not waited for;
    /// how the stream ends, only the other one tells.
    pub fn more_data(&mut self) -> Option<Bytes> {
        if !self.held.is_empty() {
            return None;
        }
        let From::Mesh(from) = &self.from else { return None };
        let more = from.more_data()?;
        from.consumed(more.len());
        Some(more)
    }

    /// For who cannot take now what comes: keeps what has come, so that it is no burden to the connection's other streams,
    /// and wakes `cx` when there is more. Without it, many small pieces that wait end a connection of HTTP/2.
    pub fn gather(&mut self, cx: &mut Context<'_>) {
        match &mut self.from {
            // It gathers by itself.
            From::Mesh(_) => {}
            From::Hbone(from) => from.gather(cx),
        }
    }

    /// Whether there are bytes in `held`; false at the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.held.is_empty() {
            let next = match &mut self.from {
                From::Mesh(from) => from.poll_data(cx),
                From::Hbone(from) => from.poll_data(cx),
            };
            let Some(data) = ready!(next)? else { return Poll::Ready(Ok(false)) };
            self.owed = data.len();
            self.held = data;
        }
        Poll::Ready(Ok(true))
    }

    /// Lets the peer send as much again as was consumed.
    fn grant(&mut self) {
        let owed = std::mem::take(&mut self.owed);
        match &mut self.from {
            From::Mesh(from) => from.consumed(owed),
            From::Hbone(from) => from.consumed(owed),
        }
    }
}

impl Sending {
    /// Sends as much from the front of `data` as the peer has room for, without a copy, and returns how much that was.
    ///
    /// # Errors
    /// `ConnectionReset`; `BrokenPipe` after a shutdown.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<usize>> {
        self.poll_payload(cx, Payload::Whole(data))
    }

    fn poll_payload(&mut self, cx: &mut Context<'_>, payload: Payload<'_>) -> Poll<io::Result<usize>> {
        match &mut self.to {
            To::Mesh(to) => to.poll_send(cx, payload),
            To::Hbone(to) => to.poll_send(cx, payload),
        }
    }
}

impl AsyncRead for Receiving {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() > 0 && ready!(self.poll_fill(cx))? {
            let length = self.held.len().min(buf.remaining());
            buf.put_slice(&self.held[..length]);
            self.held.advance(length);
            if self.held.is_empty() {
                self.held = Bytes::new();
                self.grant();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Sending {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_payload(cx, Payload::Copied(buf))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's own task sends what was handed over.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let taken = self.taken;
        Poll::Ready(match &mut self.to {
            To::Mesh(to) => to.end(taken),
            To::Hbone(to) => to.end(taken),
        })
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.receiving).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.sending).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.sending).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.sending).poll_shutdown(cx)
    }
}
