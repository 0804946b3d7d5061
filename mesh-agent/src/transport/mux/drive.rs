//! Moves a connection's bytes: what waits in the outbox into the encrypted stream, and frames out of it to their streams.
//!
//! Everything that is ready goes in one turn, so many streams that write little share a record and a system call. Must not
//! know who uses the streams.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use tokio::{
    io::AsyncWrite as _,
    time::{Instant, Sleep},
};

use super::{
    frame::{Control, HEAD, Head, LARGEST_CONTROL, Malformed},
    outbox::{Batch, PIECES},
    state::{Asked, Lost, Shared},
};
use crate::transport::tls::SecuredIo;

/// A peer that is silent for so long is asked whether it is there, and has as long to answer as follows.
const SILENCE: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(20);
/// How long the peer may take to close after us. Closing earlier, with something of its unread, would be a reset, which takes back what it
/// has not received yet.
const LINGER: Duration = Duration::from_secs(2);
/// Records that are taken in before anything is written.
const READS: usize = 64;
/// A smaller piece of a record is copied if the record is not: it would keep the memory of a whole read.
const LITTLE: usize = 4 << 10;

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
pub(in crate::transport) enum Ended {
    #[error("the connection was lost")]
    Cut(#[source] io::Error),
    #[error("the peer broke the protocol: {0}")]
    Malformed(&'static str),
    #[error("the peer did not answer a ping")]
    Dead,
}

/// One end of a connection, to be polled until it is over.
pub(super) struct Drive {
    shared: Arc<Shared>,
    io: SecuredIo,
    batch: Batch,
    /// Everything was written, but perhaps not everything has left.
    unflushed: bool,
    reading: Reading,
    closing: Closing,
    heard: Heard,
}

/// How far the end has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closing {
    No,
    /// All is said.
    Begun,
    /// And has left; the peer's end is awaited.
    Said,
}

/// How far the present frame has come.
#[derive(Default)]
enum Reading {
    #[default]
    Head,
    /// A part of a head.
    Begun([u8; HEAD], usize),
    /// A data frame lacks so much.
    Data { stream: u32, left: usize },
    /// Another one, as far as it has come.
    Control(Head, Vec<u8>),
}

struct Heard {
    since_last_look: bool,
    asked: bool,
    look: Pin<Box<Sleep>>,
}

impl Drive {
    pub(super) fn new(shared: Arc<Shared>, io: SecuredIo) -> Self {
        let look = Box::pin(tokio::time::sleep(SILENCE));
        let heard = Heard { since_last_look: false, asked: false, look };
        let (batch, reading) = (Batch::default(), Reading::default());
        Self { shared, io, batch, unflushed: false, reading, closing: Closing::No, heard }
    }

    /// Goes on until there is nothing to do. `asked` hears of streams that the peer asks for, `over` of the end before the
    /// streams do.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut asked: impl FnMut(Asked),
        over: impl FnOnce(),
    ) -> Poll<Result<(), Ended>> {
        let ended = ready!(self.poll_ended(cx, &mut asked));
        over();
        let what = ended.as_ref().err().map_or_else(|| "the connection was closed".to_owned(), ToString::to_string);
        self.shared.lose(Lost { refusal: self.io.failure().refusal(), what });
        Poll::Ready(ended)
    }

    fn poll_ended(&mut self, cx: &mut Context<'_>, asked: &mut impl FnMut(Asked)) -> Poll<Result<(), Ended>> {
        // Reading first: what it brings may be answered in the same turn.
        if let Poll::Ready(ended) = self.poll_read(cx, asked) {
            // Of a connection on which all was said it does not matter how it ends.
            return Poll::Ready(if self.closing == Closing::Said { Ok(()) } else { ended });
        }
        if self.closing == Closing::Said {
            return self.heard.look.as_mut().poll(cx).map(Ok);
        }
        self.poll_silence(cx)?;
        if self.poll_write(cx).map_err(Ended::Cut)?.is_ready() {
            self.closing = Closing::Said;
            self.heard.look.as_mut().reset(Instant::now() + LINGER);
            return self.heard.look.as_mut().poll(cx).map(Ok);
        }
        Poll::Pending
    }

    /// Ready when nothing is to be written any more, and the peer knows.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.closing != Closing::No {
                return Pin::new(&mut self.io).poll_shutdown(cx);
            }
            if self.batch.is_empty() && self.shared.next(cx, &mut self.batch) {
                self.closing = Closing::Begun;
                continue;
            }
            if self.batch.is_empty() {
                if self.unflushed {
                    ready!(Pin::new(&mut self.io).poll_flush(cx))?;
                    self.unflushed = false;
                }
                return Poll::Pending;
            }
            let mut room = [IoSlice::new(&[]); PIECES];
            let count = self.batch.pieces(&mut room);
            let taken = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, &room[..count]))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.batch.advance(taken);
        }
    }

    /// Ready when the peer has ended, or has to be left.
    fn poll_read(&mut self, cx: &mut Context<'_>, asked: &mut impl FnMut(Asked)) -> Poll<Result<(), Ended>> {
        for _ in 0..READS {
            match ready!(self.io.poll_plain(cx)).map_err(Ended::Cut)? {
                Some(piece) => {
                    self.heard.since_last_look = true;
                    self.take(piece, asked).map_err(|Malformed(what)| Ended::Malformed(what))?;
                }
                None if matches!(self.reading, Reading::Head) => return Poll::Ready(Ok(())),
                None => return Poll::Ready(Err(Ended::Malformed("it ended within a frame"))),
            }
        }
        // What is to be written has its turn, and who reads.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes frames, and parts of frames, out of what has come.
    fn take(&mut self, mut piece: Bytes, asked: &mut impl FnMut(Asked)) -> Result<(), Malformed> {
        let large = piece.len() >= LITTLE;
        while !piece.is_empty() {
            match &mut self.reading {
                Reading::Head => match piece.split_first_chunk::<HEAD>() {
                    Some((head, _)) => {
                        let head = Head::decode(*head)?;
                        piece.advance(HEAD);
                        self.begin(head, asked)?;
                    }
                    None => {
                        let mut begun = [0; HEAD];
                        begun[..piece.len()].copy_from_slice(&piece);
                        self.reading = Reading::Begun(begun, piece.len());
                        return Ok(());
                    }
                },
                Reading::Begun(begun, length) => {
                    let more = piece.split_to(piece.len().min(HEAD - *length));
                    begun[*length..*length + more.len()].copy_from_slice(&more);
                    *length += more.len();
                    if *length == HEAD {
                        let head = Head::decode(*begun)?;
                        self.begin(head, asked)?;
                    }
                }
                Reading::Data { stream, left } => {
                    let (stream, data) = (*stream, piece.split_to(piece.len().min(*left)));
                    *left -= data.len();
                    if *left == 0 {
                        self.reading = Reading::Head;
                    }
                    let data = if large && data.len() < LITTLE { Bytes::copy_from_slice(&data) } else { data };
                    self.shared.receive_data(stream, data)?;
                }
                Reading::Control(head, body) => {
                    body.extend_from_slice(&piece.split_to(piece.len().min(head.length - body.len())));
                    if body.len() == head.length {
                        let (head, body) = (*head, std::mem::take(body));
                        self.reading = Reading::Head;
                        self.control(head, &body, asked)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, head: Head, asked: &mut impl FnMut(Asked)) -> Result<(), Malformed> {
        self.reading = Reading::Head;
        if head.is_data() {
            if head.length > 0 {
                self.reading = Reading::Data { stream: head.stream, left: head.length };
            }
        } else if head.length == 0 {
            self.control(head, &[], asked)?;
        } else {
            debug_assert!(head.length <= LARGEST_CONTROL, "longer ones are refused");
            self.reading = Reading::Control(head, Vec::with_capacity(head.length));
        }
        Ok(())
    }

    fn control(&self, head: Head, body: &[u8], asked: &mut impl FnMut(Asked)) -> Result<(), Malformed> {
        let control = Control::decode(head, body)?;
        if let Some(stream) = self.shared.receive(head.stream, &control)? {
            asked(stream);
        }
        Ok(())
    }

    /// Looks now and then whether the peer is there.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Result<(), Ended> {
        let heard = &mut self.heard;
        while heard.look.as_mut().poll(cx).is_ready() {
            let next = if heard.since_last_look {
                heard.asked = false;
                SILENCE
            } else if heard.asked {
                return Err(Ended::Dead);
            } else {
                heard.asked = true;
                self.shared.ping();
                ANSWER
            };
            heard.since_last_look = false;
            heard.look.as_mut().reset(Instant::now() + next);
        }
        Ok(())
    }
}

impl Drop for Drive {
    /// Whoever carries it may be given up before it has ended. Its streams hear of it, too.
    fn drop(&mut self) {
        let refusal = self.io.failure().refusal();
        self.shared.lose(Lost { refusal, what: "the connection was given up".to_owned() });
    }
}
