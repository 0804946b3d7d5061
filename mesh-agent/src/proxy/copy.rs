//! Bytes both ways, with TCP's own meaning: half-close each way, resets, backpressure; nothing lost or reordered.
//!
//! Memory is bounded by what one read can bring: a direction reads only when everything before has been written.
//! Reads go through a buffer that the thread owns, so an idle connection holds no buffer at all; only what the
//! destination did not take at once is kept; and for a tunnel what it may send until it is granted more. What a long stream
//! brings for a tunnel is read into memory of its own, which the tunnel takes over. No timeout: an idle connection stays.
//!
//! ```text
//! direction:  open ──read EOF──► shut down the other side ──► ended
//!             open ──read fails──► reset both                (the source is gone: nobody is left to read)
//!             open ──write fails──► failed; the opposite direction drains what had been sent, then both are reset
//!             open ──read EOF after the opposite write was reset──► reset both                (it is no end)
//!             open ──read EOF, and the other agent has asked what was taken──► that is settled first ([`taken`](super::taken))
//! of a reset, the other agent is told what was taken where the kernel knows
//! after EOF of a side nothing reads from it, so its errors are watched for: a reset then resets both (of a tunnel, when
//!                                                                           what it had sent before is passed on)
//! ```
//!
//! Must not know which end is whose, nor why they are connected.

use std::{
    cell::RefCell,
    future::Future,
    io::{self, IoSlice},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead as _, AsyncReadExt as _, AsyncWrite as _, Interest, ReadBuf},
    net::TcpStream,
};

use super::{
    taken::Settling,
    wire::{self, Socket, Wire},
};
use crate::{
    sys::closes::Watched,
    telemetry::{access::Counts, metrics::Outcome},
    transport::tunnel::{LARGEST_FRAME, Tunnel},
};

/// Size of a read: small at first, so that a slow destination holds little; then growing with the stream, by full
/// frames of a tunnel.
const FIRST_READ: usize = 16 << 10;
const LARGE_READ: usize = LARGEST_FRAME;
const LARGEST_READ: usize = 4 * LARGEST_FRAME;
/// Pieces of a tunnel that are written at once. A full record is one.
const PIECES: usize = 4;
/// Bytes after which reads become large, and largest.
const LARGE_AFTER: u64 = 128 << 10;
const LARGEST_AFTER: u64 = 10 << 20;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Copies until both directions have ended, and says whether they ended in order. `source` is the end that connected;
/// what it sends is counted as sent. When the task at either end has gone, both are reset.
pub(super) fn both_ways(source: Wire, destination: Wire, counts: Arc<Counts>) -> BothWays {
    BothWays {
        forth: Flow::new(source.early),
        back: Flow::new(destination.early),
        source: End::from(source.socket),
        destination: End::from(destination.socket),
        gone: [source.gone, destination.gone].map(wire::until_gone),
        watched: destination.watched,
        counts,
    }
}

/// See [`both_ways`]. What an idle connection holds is this, so it holds nothing twice, as what a compiler makes of an
/// `async fn` does with its arguments.
pub(super) struct BothWays {
    forth: Flow,
    back: Flow,
    source: End,
    destination: End,
    gone: [Option<wire::UntilGone>; 2],
    watched: Option<Box<Watched>>,
    counts: Arc<Counts>,
}

impl Future for BothWays {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let ended = match self.poll_copy(cx) {
            Poll::Ready(ended) => ended,
            Poll::Pending => {
                if !self.gone.iter_mut().flatten().any(|gone| gone.as_mut().poll(cx).is_ready()) {
                    return Poll::Pending;
                }
                Outcome::Reset
            }
        };
        if ended != Outcome::Ok {
            self.reset();
        }
        Poll::Ready(ended)
    }
}

impl BothWays {
    fn poll_copy(&mut self, cx: &mut Context<'_>) -> Poll<Outcome> {
        let Self { forth, back, source, destination, watched, counts, gone: _ } = self;
        let (sent, received) = (|n| counts.add_sent(n), |n| counts.add_received(n));
        if forth.poll(cx, source, destination, Opposite::of(back, None), sent).is_err()
            || back.poll(cx, destination, source, Opposite::of(forth, watched.as_deref()), received).is_err()
        {
            return Poll::Ready(Outcome::Reset);
        }
        match (forth.state, back.state) {
            (State::Ended, State::Ended) => return Poll::Ready(Outcome::Ok),
            (State::Ended | State::Failed, State::Ended | State::Failed) => return Poll::Ready(Outcome::Reset),
            (State::Open, _) | (_, State::Open) => {}
        }
        let settling = forth.settling.is_under_way() || back.settling.is_under_way();
        if !settling
            && (source.poll_broken(cx, forth.state).is_ready() || destination.poll_broken(cx, back.state).is_ready())
        {
            return Poll::Ready(Outcome::Reset);
        }
        Poll::Pending
    }

    fn reset(&mut self) {
        if let End::Tunnel(tunnel) = &mut self.source
            && tunnel.is_asked()
            && let Some(taken) = self.watched.as_deref().and_then(Watched::taken)
        {
            tunnel.reset_with_taken(taken);
        }
        for end in [&mut self.source, &mut self.destination] {
            std::mem::replace(end, End::Moving).reset();
        }
    }
}

/// One direction.
struct Flow {
    /// Read and not yet written.
    left: Bytes,
    eof: bool,
    state: State,
    /// Octets written.
    total: u64,
    /// A write has failed although the destination had not ended its own direction.
    broken: bool,
    settling: Settling,
}

/// What a direction has to know of the opposite one.
#[derive(Clone, Copy)]
struct Opposite<'a> {
    written: u64,
    broken: bool,
    /// Who tells what was taken of it.
    watched: Option<&'a Watched>,
}

impl<'a> Opposite<'a> {
    fn of(flow: &Flow, watched: Option<&'a Watched>) -> Self {
        Self { written: flow.total, broken: flow.broken, watched }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The source has ended, and the destination has been told.
    Ended,
    /// The destination takes no more.
    Failed,
}

/// The source of a direction was reset.
struct Broken;

impl Flow {
    fn new(left: Bytes) -> Self {
        Self { left, eof: false, state: State::Open, total: 0, broken: false, settling: Settling::default() }
    }

    /// The destination takes no more.
    fn fail(&mut self, to: &End, error: Option<&io::Error>) {
        // Who reads from a tunnel knows an end from a reset.
        self.broken = !matches!(to, End::Tunnel(_)) && error.is_some_and(|error| !wire::had_ended(error));
        self.state = State::Failed;
    }

    /// Writes what has come by a tunnel in several pieces at once; what is not taken is left, in one piece.
    fn pass_pieces(
        &mut self,
        cx: &mut Context<'_>,
        [first, second]: [Bytes; 2],
        tunnel: &mut Tunnel,
        to: &mut End,
        count: &impl Fn(usize),
    ) {
        let mut pieces = [const { Bytes::new() }; PIECES];
        let more = [first, second].into_iter().chain(std::iter::from_fn(|| tunnel.more_data()));
        for (place, piece) in pieces.iter_mut().zip(more) {
            *place = piece;
        }
        let slices = pieces.each_ref().map(|piece| IoSlice::new(piece));
        match to.poll_write_vectored(cx, &slices) {
            Poll::Ready(Ok(written)) if written > 0 => {
                self.total += written as u64;
                count(written);
                self.left = rest(&pieces, written);
            }
            Poll::Ready(failed) => self.fail(to, failed.err().as_ref()),
            Poll::Pending => self.left = rest(&pieces, 0),
        }
    }

    /// Goes on as far as possible. What it waits for is registered with `cx`.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut End,
        to: &mut End,
        opposite: Opposite<'_>,
        count: impl Fn(usize),
    ) -> Result<(), Broken> {
        while self.state == State::Open {
            if !self.left.is_empty() {
                match to.poll_send(cx, &mut self.left) {
                    Poll::Ready(Ok(n)) if n > 0 => {
                        self.total += n as u64;
                        count(n);
                    }
                    Poll::Ready(Ok(_)) => self.fail(to, None),
                    Poll::Ready(Err(error)) => self.fail(to, Some(&error)),
                    Poll::Pending => {
                        from.gather(cx);
                        return Ok(());
                    }
                }
            } else if self.eof {
                if opposite.broken {
                    return Err(Broken);
                }
                if let (End::Listening(stream, _), End::Tunnel(tunnel)) = (&*from, &mut *to)
                    && tunnel.is_asked()
                {
                    let Poll::Ready(taken) = self.settling.poll(cx, stream, opposite.watched, opposite.written) else {
                        return Ok(());
                    };
                    tunnel.tell_taken(taken);
                }
                match to.poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => self.state = State::Ended,
                    Poll::Ready(Err(_)) => self.state = State::Failed,
                    Poll::Pending => return Ok(()),
                }
            } else {
                // Keeps memory of the last write from outliving it.
                self.left = Bytes::new();
                match self.poll_pass(cx, from, to, &count) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(_)) => return Err(Broken),
                    Poll::Pending => return Ok(()),
                }
            }
        }
        if self.state == State::Failed {
            from.gather(cx);
        }
        Ok(())
    }

    /// Reads once, and writes as much of it as is taken at once.
    fn poll_pass(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut End,
        to: &mut End,
        count: &impl Fn(usize),
    ) -> Poll<io::Result<()>> {
        if let End::Tunnel(tunnel) = from {
            // What it hands over is its own memory: nothing to copy, and the caller writes it.
            match ready!(tunnel.poll_data(cx))? {
                Some(data) => self.left = data,
                None => self.eof = true,
            }
            if !matches!(to, End::Tunnel(_))
                && let Some(second) = tunnel.more_data()
            {
                let first = std::mem::take(&mut self.left);
                self.pass_pieces(cx, [first, second], tunnel, to, count);
            }
            return Poll::Ready(Ok(()));
        }
        let size = match self.total {
            0..LARGE_AFTER => FIRST_READ,
            LARGE_AFTER..LARGEST_AFTER => LARGE_READ,
            LARGEST_AFTER.. => LARGEST_READ,
        };
        if let (End::Tcp(stream), End::Tunnel(_)) = (&mut *from, &*to)
            && size > FIRST_READ
        {
            // Memory is taken only when there is something to read.
            ready!(stream.poll_read_ready(cx))?;
            let mut read = BytesMut::with_capacity(size);
            let length = ready!(pin!(stream.read_buf(&mut read)).poll(cx))?;
            if length == 0 {
                self.eof = true;
                from.ended();
            } else if length < size / 2 {
                self.left = Bytes::copy_from_slice(&read);
            } else {
                self.left = read.freeze();
            }
            return Poll::Ready(Ok(()));
        }
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.len() < size {
                scratch.resize(size, 0);
            }
            let mut buf = ReadBuf::new(&mut scratch[..size]);
            ready!(from.poll_read(cx, &mut buf))?;
            let mut read = buf.filled();
            if read.is_empty() {
                self.eof = true;
                from.ended();
                return Poll::Ready(Ok(()));
            }
            match to.poll_write(cx, read) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    self.total += n as u64;
                    count(n);
                    read = &read[n..];
                }
                Poll::Ready(failed) => {
                    self.fail(to, failed.err().as_ref());
                    return Poll::Ready(Ok(()));
                }
                Poll::Pending => {}
            }
            if !read.is_empty() {
                self.left = Bytes::copy_from_slice(read);
            }
            Poll::Ready(Ok(()))
        })
    }
}

/// What is left of `pieces` behind the first `gone` octets, in one piece.
fn rest(pieces: &[Bytes], mut gone: usize) -> Bytes {
    let mut left = pieces.iter().filter_map(|piece| {
        let skipped = gone.min(piece.len());
        gone -= skipped;
        (skipped < piece.len()).then(|| piece.slice(skipped..))
    });
    let Some(first) = left.next() else { return Bytes::new() };
    let Some(second) = left.next() else { return first };
    let mut joined = BytesMut::from(first);
    joined.extend_from_slice(&second);
    left.for_each(|piece| joined.extend_from_slice(&piece));
    joined.freeze()
}

/// One side of the copy.
enum End {
    Tcp(TcpStream),
    /// Has sent its end; it is written to, and watched for errors.
    Listening(Arc<TcpStream>, Pin<Box<dyn Future<Output = ()> + Send>>),
    Tunnel(Box<Tunnel>),
    /// While it changes from one to another, and when all is over.
    Moving,
}

impl From<Socket> for End {
    fn from(socket: Socket) -> Self {
        match socket {
            Socket::Tcp(stream) => Self::Tcp(stream),
            Socket::Tunnel(tunnel) => Self::Tunnel(tunnel),
        }
    }
}

impl End {
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tunnel(tunnel) => Pin::new(tunnel).poll_read(cx, buf),
            Self::Listening(..) | Self::Moving => Poll::Ready(Ok(())),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, data),
            Self::Tunnel(tunnel) => Pin::new(tunnel).poll_write(cx, data),
            Self::Listening(..) | Self::Moving => self.poll_write_vectored(cx, &[IoSlice::new(data)]),
        }
    }

    /// The same of several pieces.
    fn poll_write_vectored(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, pieces),
            Self::Listening(stream, _) => loop {
                ready!(stream.poll_write_ready(cx))?;
                match stream.try_write_vectored(pieces) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    done => return Poll::Ready(done),
                }
            },
            Self::Tunnel(tunnel) => Pin::new(tunnel).poll_write_vectored(cx, pieces),
            Self::Moving => Poll::Ready(Ok(0)),
        }
    }

    /// Nothing is read from it now. As [`Tunnel::gather`].
    fn gather(&mut self, cx: &mut Context<'_>) {
        if let Self::Tunnel(tunnel) = self {
            tunnel.gather(cx);
        }
    }

    /// Writes from the front of `data`, which a tunnel takes over without a copy.
    fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<usize>> {
        if let Self::Tunnel(tunnel) = self {
            return tunnel.poll_send(cx, data);
        }
        let written = ready!(self.poll_write(cx, data))?;
        data.advance(written);
        Poll::Ready(Ok(written))
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tunnel(tunnel) => Pin::new(tunnel).poll_shutdown(cx),
            Self::Listening(stream, _) => {
                Poll::Ready(socket2::SockRef::from(&**stream).shutdown(std::net::Shutdown::Write))
            }
            Self::Moving => Poll::Ready(Ok(())),
        }
    }

    /// It has sent its end, so that no read will tell of a reset any more.
    fn ended(&mut self) {
        if let Self::Tcp(_) = self
            && let Self::Tcp(stream) = std::mem::replace(self, Self::Moving)
        {
            let stream = Arc::new(stream);
            let watched = stream.clone();
            let broken = Box::pin(async move { drop(watched.ready(Interest::ERROR).await) });
            *self = Self::Listening(stream, broken);
        }
    }

    /// `from` is how far the direction is that comes from it.
    fn poll_broken(&mut self, cx: &mut Context<'_>, from: State) -> Poll<()> {
        match self {
            Self::Listening(_, broken) => broken.as_mut().poll(cx),
            // What it had sent before is passed on first.
            Self::Tunnel(tunnel) if from == State::Ended => tunnel.poll_reset(cx),
            Self::Tcp(_) | Self::Tunnel(_) | Self::Moving => Poll::Pending,
        }
    }

    fn reset(self) {
        match self {
            Self::Tcp(stream) => wire::reset(&stream),
            Self::Listening(stream, _) => wire::reset(&stream),
            // A tunnel that is dropped unfinished is reset.
            Self::Tunnel(_) | Self::Moving => {}
        }
    }
}

#[cfg(test)]
mod tests;
