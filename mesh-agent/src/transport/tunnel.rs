//! One tunnel stream: bytes both ways with TCP's own semantics (half-close, reset, backpressure).
//!
//! Memory is bounded by HTTP/2 flow control: what was received is granted again only as it is consumed, and what is
//! written waits until the peer has room. Must not know how the stream was opened.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::SystemTime,
};

use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName};
use mesh_core::id::SpiffeId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::transport::{h2_settings, inflow::Inflow, pool::Lease};

/// Bytes of a full frame. What is written by multiples of it wastes nothing.
pub const LARGEST_FRAME: usize = h2_settings::FRAME as usize;

/// Trailer that ends a tunnel of our own agents. Strictly, nothing but DATA belongs on a CONNECT stream (RFC 9113 §8.5), so
/// it is sent only to who has shown to be one of them.
const TAKEN_TRAILER: HeaderName = HeaderName::from_static("ecs-mesh-taken");
/// Beside the other: the tunnel did not end in order. A reset of HTTP/2 has no room for what was taken.
const RESET_TRAILER: HeaderName = HeaderName::from_static("ecs-mesh-reset");
/// The most that one write hands over; h2 cuts it into frames.
const LARGEST_WRITE: usize = 4 * LARGEST_FRAME;

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
    stream: Inflow,
    /// Received, not yet consumed.
    held: Bytes,
    /// Length of `held` as it arrived; to be granted again.
    owed: usize,
    ended: bool,
    /// The peer has said that its end is a reset.
    reset: bool,
    /// What the peer said at its end about how much of ours its application had taken; [`UNTOLD`] until then.
    taken: Arc<AtomicU64>,
    lease: Option<Arc<Lease>>,
}

/// The peer has not said how much it took.
pub const UNTOLD: u64 = u64::MAX;

/// The direction from us to the peer.
pub struct Sending {
    stream: SendStream<Bytes>,
    ended: bool,
    /// The peer wants to be told at our end how much of its bytes the application has taken.
    asked: bool,
    taken: Option<u64>,
    _lease: Option<Arc<Lease>>,
}

impl Tunnel {
    pub(super) fn new(peer: SpiffeId, send: SendStream<Bytes>, receive: RecvStream, lease: Option<Lease>) -> Self {
        let lease = lease.map(Arc::new);
        Self {
            peer,
            receiving: Receiving {
                stream: Inflow::new(receive),
                held: Bytes::new(),
                owed: 0,
                ended: false,
                reset: false,
                taken: Arc::new(AtomicU64::new(UNTOLD)),
                lease: lease.clone(),
            },
            sending: Sending { stream: send, ended: false, asked: false, taken: None, _lease: lease },
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
        if !self.sending.ended {
            self.sending.ended = true;
            let said = HeaderMap::from_iter([(TAKEN_TRAILER, taken.into()), (RESET_TRAILER, 1.into())]);
            // One that is broken already needs no reset.
            drop(self.sending.stream.send_trailers(said));
        }
    }

    /// What the peer says at its end about how much of ours its application had taken by then; [`UNTOLD`] before, and if
    /// it says nothing.
    pub fn taken(&self) -> Arc<AtomicU64> {
        self.receiving.taken.clone()
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

    /// Waits until the peer resets the tunnel, or the connection is lost. For who has read its end, and would not hear of
    /// that before the next write.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.sending.stream.poll_reset(cx).map(drop)
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

    /// For who cannot take now what comes: keeps what has come, so that it is no burden to the connection's other streams,
    /// and wakes `cx` when there is more. Without it, many small pieces that wait end the connection.
    pub fn gather(&mut self, cx: &mut Context<'_>) {
        self.stream.gather(cx);
    }

    /// Whether there are bytes in `held`; false at the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while self.held.is_empty() {
            if self.reset {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if self.ended {
                return Poll::Ready(Ok(false));
            }
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.owed = data.len();
                    self.held = data;
                }
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => {
                    let trailers = ready!(self.stream.poll_trailers(cx)).map_err(broken)?;
                    let said = trailers.as_ref().and_then(|said| said.get(TAKEN_TRAILER)?.to_str().ok()?.parse().ok());
                    self.taken.store(said.unwrap_or(UNTOLD), Ordering::Relaxed);
                    self.reset = trailers.is_some_and(|said| said.contains_key(RESET_TRAILER));
                    self.ended = true;
                }
            }
        }
        Poll::Ready(Ok(true))
    }

    /// Lets the peer send as much again as was consumed.
    fn grant(&mut self) {
        // Fails only when more is granted than was received, which `owed` rules out.
        drop(self.stream.grant(std::mem::take(&mut self.owed)));
    }
}

impl Sending {
    /// Sends as much from the front of `data` as the peer has room for, without a copy, and returns how much that was.
    ///
    /// # Errors
    /// `ConnectionReset`; `BrokenPipe` after a shutdown.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(cx, data.len()))?;
        let piece = data.split_to(room);
        self.stream.send_data(piece, false).map_err(broken)?;
        Poll::Ready(Ok(room))
    }

    /// How much of `wanted` may be sent now; not 0, unless 0 is wanted.
    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let wanted = wanted.min(LARGEST_WRITE);
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        self.stream.reserve_capacity(wanted);
        let mut room = self.stream.capacity();
        while room == 0 {
            room = match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(room)) => room,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            };
        }
        Poll::Ready(Ok(room.min(wanted)))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        // h2 resets by itself what is dropped unfinished, but not before the other direction is dropped as well.
        if !self.ended {
            self.stream.send_reset(Reason::CANCEL);
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
                self.grant();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Sending {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(cx, buf.len()))?;
        if room > 0 {
            self.stream.send_data(Bytes::copy_from_slice(&buf[..room]), false).map_err(broken)?;
        }
        Poll::Ready(Ok(room))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's own task sends what was handed over.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.ended {
            self.ended = true;
            match self.taken {
                Some(taken) => {
                    let said = HeaderMap::from_iter([(TAKEN_TRAILER, taken.into())]);
                    self.stream.send_trailers(said).map_err(broken)?;
                }
                None => self.stream.send_data(Bytes::new(), true).map_err(broken)?,
            }
        }
        Poll::Ready(Ok(()))
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

/// A stream that was reset and a connection that was lost are the same to its user.
fn broken(error: h2::Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
