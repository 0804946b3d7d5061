//! The encrypted stream after its handshake: bytes in, records out, and back.
//!
//! The TLS library reads records by four kilobytes when it is given the socket, which is five system calls for a full
//! record of 16 KiB ([`rustls` 0.23, `READ_SIZE`]). Here a read takes all that has arrived, up to [`LARGEST_READ`],
//! into a buffer that the thread owns. A connection owns a buffer only while it holds ciphertext for which its reader
//! has no room.
//!
//! Must not know who the peer is, nor HTTP/2.
//!
//! [`rustls` 0.23, `READ_SIZE`]: https://docs.rs/rustls/0.23/rustls/struct.ConnectionCommon.html#method.read_tls

use std::{
    cell::Cell,
    io::{self, BufRead as _, IoSlice, Write as _},
    ops::Range,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use mesh_common::refusal::Refusal;
use rustls::{Connection, Error};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsStream;

use super::refusal_of;

/// Four full records.
const LARGEST_READ: usize = 68 << 10;

thread_local! {
    /// The buffer of whichever connection reads now.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// The encrypted stream. Remembers the first TLS failure, because HTTP/2 above it keeps only its text.
pub(in crate::transport) struct SecuredIo {
    tcp: TcpStream,
    tls: Connection,
    unread: Ciphertext,
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

/// Received, and not yet given to the TLS library. Without a buffer while it is empty.
#[derive(Default)]
struct Ciphertext {
    buffer: Vec<u8>,
    filled: Range<usize>,
}

impl Ciphertext {
    /// Reads what has arrived from the socket. 0 is its end.
    fn poll_fill(&mut self, cx: &mut Context<'_>, tcp: &mut TcpStream) -> Poll<io::Result<usize>> {
        debug_assert!(self.filled.is_empty(), "ciphertext would be overwritten");
        let mut buffer = SPARE.take();
        buffer.resize(LARGEST_READ, 0);
        let mut read = ReadBuf::new(&mut buffer);
        let polled = Pin::new(tcp).poll_read(cx, &mut read);
        let length = read.filled().len();
        if length == 0 {
            SPARE.set(buffer);
        } else {
            (self.buffer, self.filled) = (buffer, 0..length);
        }
        polled.map_ok(|()| length)
    }

    /// Gives some of it to the TLS library.
    fn feed(&mut self, tls: &mut Connection) -> io::Result<()> {
        let taken = tls.read_tls(&mut &self.buffer[self.filled.clone()])?;
        if taken == 0 {
            // It takes nothing after the peer's last word, behind which nobody looks for more.
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.filled.start += taken;
        if self.filled.is_empty() {
            SPARE.set(std::mem::take(&mut self.buffer));
        }
        Ok(())
    }
}

impl SecuredIo {
    /// The stream of a finished handshake, with whatever of the peer's first data came along with it.
    pub(super) fn new(stream: TlsStream<TcpStream>) -> Self {
        let (tcp, tls) = match stream {
            TlsStream::Client(stream) => {
                let (tcp, tls) = stream.into_inner();
                (tcp, Connection::from(tls))
            }
            TlsStream::Server(stream) => {
                let (tcp, tls) = stream.into_inner();
                (tcp, Connection::from(tls))
            }
        };
        Self { tcp, tls, unread: Ciphertext::default(), failure: Failure::default() }
    }

    pub(in crate::transport) fn failure(&self) -> Failure {
        self.failure.clone()
    }

    /// The next plaintext; `None` at the end of the stream.
    pub(in crate::transport) fn poll_plain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<bytes::Bytes>>> {
        let mut buffer = bytes::BytesMut::zeroed(16 << 10);
        let mut read = ReadBuf::new(&mut buffer);
        let result = ready!(Pin::new(self).poll_read(cx, &mut read));
        let length = read.filled().len();
        buffer.truncate(length);
        Poll::Ready(result.map(|()| (length > 0).then(|| buffer.freeze())))
    }

    /// Plaintext into `buf`, as much as has arrived and fits; nothing at the end of the stream.
    fn poll_plaintext(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        while buf.remaining() > 0 {
            let mut reader = self.tls.reader();
            match reader.fill_buf() {
                // The peer has said that this was all.
                Ok([]) => return Poll::Ready(Ok(())),
                Ok(plain) => {
                    let length = plain.len().min(buf.remaining());
                    buf.put_slice(&plain[..length]);
                    reader.consume(length);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A cut: what came before it is passed on first, and it is seen again then.
                Err(_) if buf.filled().len() > before => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(error)),
            }
            if self.unread.filled.is_empty() {
                // What there is goes on its way before more is awaited.
                if buf.filled().len() > before {
                    return Poll::Ready(Ok(()));
                }
                if ready!(self.unread.poll_fill(cx, &mut self.tcp))? == 0 {
                    self.tls.read_tls(&mut io::empty())?;
                    self.process(cx)?;
                    continue;
                }
            }
            self.unread.feed(&mut self.tls)?;
            self.process(cx)?;
        }
        Poll::Ready(Ok(()))
    }

    /// Opens the records that are whole.
    fn process(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.tls.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => {
                // The peer is told why, if it still takes it; that it does not changes nothing.
                let _told = self.poll_send(cx);
                Err(io::Error::new(io::ErrorKind::InvalidData, error))
            }
        }
    }

    /// Sends all records that are ready.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Writer { tcp: &mut self.tcp, cx }) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for SecuredIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let result = ready!(self.poll_plaintext(cx, buf));
        Poll::Ready(result.inspect_err(|error| self.failure.note(error)))
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
        let taken = self.tls.writer().write_vectored(bufs)?;
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
        self.tls.send_close_notify();
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// The socket as the TLS library wants it: it does not wait, and the task is woken when it would go on.
struct Writer<'a, 'c> {
    tcp: &'a mut TcpStream,
    cx: &'a mut Context<'c>,
}

impl Writer<'_, '_> {
    fn or_would_block(polled: Poll<io::Result<usize>>) -> io::Result<usize> {
        match polled {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl io::Write for Writer<'_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Self::or_would_block(Pin::new(&mut *self.tcp).poll_write(self.cx, buf))
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        Self::or_would_block(Pin::new(&mut *self.tcp).poll_write_vectored(self.cx, bufs))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
