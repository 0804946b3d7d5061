//! The encrypted stream after its handshake: bytes in, records out, and back.
//!
//! A read takes all that has arrived, up to four full records, into a buffer that the thread owns, where it is opened. A
//! connection owns a buffer only while it holds what its reader has not taken, or the beginning of a record; and records
//! only while the socket does not take them.
//!
//! Must not know who the peer is, nor HTTP/2.

use std::{
    cell::Cell,
    future::Future as _,
    io::{self, IoSlice},
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use mesh_common::refusal::Refusal;
use rustls::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{
    records::{FULL_RECORD, HEADER, Opened, Records},
    refusal_of,
};

/// Four full records: a reader that lags behind a sender of full ones never finds a part of one at the end.
const LARGEST_READ: usize = 4 * FULL_RECORD;

/// Less plaintext than this is copied rather than have it keep the memory of a whole read.
const LITTLE: usize = 4 << 10;

/// Slices that are written at once: more than HTTP/2 has for a frame.
const SLICES: usize = 16;

thread_local! {
    /// The buffer of whichever connection reads now.
    static SPARE: Cell<Option<BytesMut>> = const { Cell::new(None) };
}

/// The encrypted stream. Remembers the first TLS failure, because HTTP/2 above it keeps only its text.
pub(in crate::transport) struct SecuredIo {
    tcp: TcpStream,
    records: Records,
    inbox: Inbox,
    failure: Failure,
}

/// What went wrong with a TLS stream after its handshake, if anything did. Clones share it.
#[derive(Clone, Debug, Default)]
pub(in crate::transport) struct Failure(Arc<OnceLock<Refusal>>);

impl Failure {
    /// The refusal that a TLS error on the stream stands for; `None` while there was none, also when the connection
    /// was merely cut.
    pub(in crate::transport) fn refusal(&self) -> Option<Refusal> {
        self.0.get().copied()
    }

    fn note(&self, error: &io::Error) {
        if error.get_ref().is_some_and(|inner| inner.is::<Error>()) {
            // The first failure is the cause, later ones follow from it.
            self.0.get_or_init(|| refusal_of(error));
        }
    }
}

/// Received, and not yet with the reader. Without a buffer while it is empty.
#[derive(Default)]
struct Inbox {
    /// Plaintext, then the rest of its record, then records that are not yet opened.
    buffer: BytesMut,
    plain: usize,
    rest: usize,
}

impl Inbox {
    /// Reads what has arrived from the socket behind what is there. 0 is its end.
    fn poll_fill(&mut self, cx: &mut Context<'_>, tcp: &mut TcpStream) -> Poll<io::Result<usize>> {
        let room = LARGEST_READ.saturating_sub(self.buffer.len()).max(1);
        if self.buffer.capacity() - self.buffer.len() < room {
            // The beginning of a record moves to the front of the thread's buffer.
            let mut next = SPARE.take().unwrap_or_default();
            next.reserve(self.buffer.len() + room);
            next.extend_from_slice(&self.buffer);
            self.give_back();
            self.buffer = next;
        }
        let mut end = (&mut self.buffer).limit(room);
        let polled = pin!(tcp.read_buf(&mut end)).poll(cx);
        if self.buffer.is_empty() {
            self.give_back();
        }
        polled
    }

    /// The record at the front was opened: so much of it is plaintext.
    fn opened(&mut self, record: usize, plain: usize) {
        self.buffer.advance(HEADER);
        self.plain = plain;
        self.rest = record - HEADER - plain;
    }

    /// Copies plaintext into `buf`, as much as fits.
    fn copy(&mut self, buf: &mut ReadBuf<'_>) {
        let length = self.plain.min(buf.remaining());
        buf.put_slice(&self.buffer[..length]);
        self.buffer.advance(length);
        self.taken(length);
    }

    /// All plaintext of the record, in the memory in which it was opened unless it is little.
    fn take(&mut self) -> Bytes {
        let length = self.plain;
        let plain = if length < LITTLE {
            let copy = Bytes::copy_from_slice(&self.buffer[..length]);
            self.buffer.advance(length);
            copy
        } else {
            self.buffer.split_to(length).freeze()
        };
        self.taken(length);
        plain
    }

    fn taken(&mut self, length: usize) {
        self.plain -= length;
        if self.plain == 0 {
            self.drop_front(self.rest);
            self.rest = 0;
        }
    }

    fn drop_front(&mut self, length: usize) {
        self.buffer.advance(length);
        if self.buffer.is_empty() {
            self.give_back();
        }
    }

    /// Whatever is in it: the thread has the buffer again, without any content.
    fn give_back(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        SPARE.set(Some(buffer));
    }
}

impl SecuredIo {
    /// The stream of a finished handshake, with whatever of the peer's first data came along with it.
    pub(super) fn new(tcp: TcpStream, records: Records, received: BytesMut) -> Self {
        // What is empty may still own memory.
        let buffer = if received.is_empty() { BytesMut::new() } else { received };
        Self { tcp, records, inbox: Inbox { buffer, plain: 0, rest: 0 }, failure: Failure::default() }
    }

    pub(in crate::transport) fn failure(&self) -> Failure {
        self.failure.clone()
    }

    /// The socket alone, for closing it.
    pub(super) fn into_tcp(self) -> TcpStream {
        self.tcp
    }

    /// The next plaintext, in the memory in which it was opened unless it is little; `None` once the peer has closed its
    /// side of the stream.
    ///
    /// # Errors
    /// The connection fails, or it is cut without having been closed ([`io::ErrorKind::UnexpectedEof`]).
    pub(in crate::transport) fn poll_plain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            match self.open(cx)? {
                Next::Plain => return Poll::Ready(Ok(Some(self.inbox.take()))),
                Next::Closed => return Poll::Ready(Ok(None)),
                Next::Socket => ready!(self.poll_fill(cx))?,
            }
        }
    }

    /// Opens what has been received until there is plaintext.
    fn open(&mut self, cx: &mut Context<'_>) -> io::Result<Next> {
        while self.inbox.plain == 0 {
            match self.records.open(&mut self.inbox.buffer) {
                Ok(Opened::Plain { record, plain }) => self.inbox.opened(record, plain.len()),
                Ok(Opened::Control { record }) => self.inbox.drop_front(record),
                Ok(Opened::Partial) => return Ok(Next::Socket),
                Ok(Opened::Closed) => {
                    self.discard();
                    return Ok(Next::Closed);
                }
                Err(error) => {
                    self.discard();
                    // The peer is told why, if it still takes it; that it does not changes nothing.
                    let _told = self.poll_send(cx);
                    let error = io::Error::new(io::ErrorKind::InvalidData, error);
                    self.failure.note(&error);
                    return Err(error);
                }
            }
        }
        Ok(Next::Plain)
    }

    /// Nobody will look at what else was received.
    fn discard(&mut self) {
        if self.inbox.buffer.capacity() > 0 {
            self.inbox.give_back();
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(self.inbox.poll_fill(cx, &mut self.tcp))? {
            0 => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the peer has cut the connection without closing the TLS stream",
            ))),
            _ => Poll::Ready(Ok(())),
        }
    }

    /// Sends all records that are ready.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outgoing = self.records.outgoing();
        while !outgoing.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = outgoing.front(&mut slices);
            match ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, &slices[..count]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                gone => outgoing.advance(gone),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// What a reader finds.
enum Next {
    /// Plaintext in the inbox.
    Plain,
    /// The end.
    Closed,
    /// Nothing before the socket has more.
    Socket,
}

impl AsyncRead for SecuredIo {
    /// As much as has arrived and fits; nothing at the end of the stream.
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        while buf.remaining() > 0 {
            match self.open(cx) {
                Ok(Next::Plain) => self.inbox.copy(buf),
                // What there is goes on its way first, before more is awaited and before an error, which comes again.
                _ if buf.filled().len() > before => break,
                Ok(Next::Closed) => break,
                Ok(Next::Socket) => ready!(self.poll_fill(cx))?,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SecuredIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // Records that have not left bound what is taken: encrypting goes no faster than sending.
        ready!(self.poll_send(cx))?;
        let mut chunks: [&[u8]; SLICES] = [&[]; SLICES];
        let mut count = 0;
        for (chunk, buf) in chunks.iter_mut().zip(bufs.iter().filter(|buf| !buf.is_empty())) {
            *chunk = buf;
            count += 1;
        }
        let sealed = self.records.seal(&chunks[..count]);
        let taken = sealed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        match self.poll_send(cx) {
            // What is left goes with the next write or flush.
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Only the first call adds to what is sent.
        self.records.close();
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
