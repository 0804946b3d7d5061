//! A body on its way from one stream to another, with its trailers.
//!
//! Memory is bounded by flow control: what was received is granted again when it is taken up to be written, and no more
//! than one piece is taken up before the other side has room. Must not know which way it goes.

use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use h2::SendStream;
use http::HeaderMap;

use crate::transport::inflow::Inflow;

/// What a request may have sent before its answer and still be sent again.
const REPLAYED: usize = 64 << 10;

/// A direction of a stream.
pub(super) struct Pipe {
    from: Inflow,
    to: SendStream<Bytes>,
    /// Received, not yet written.
    held: Bytes,
    source: Source,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Body,
    /// Trailers may follow.
    Trailers,
    /// What is held is the last.
    Ended,
    /// Everything was passed on.
    Done,
}

/// What passes, for who watches.
pub(super) enum Passed<'a> {
    Data(&'a Bytes),
    Trailers(&'a HeaderMap),
}

/// Why a direction broke off.
#[derive(Debug)]
pub(super) enum Broken {
    /// The sender of the body did.
    From(h2::Error),
    /// The receiver takes no more.
    To,
}

impl Pipe {
    /// `done`: there is no body.
    pub(super) fn new(from: Inflow, to: SendStream<Bytes>, done: bool) -> Self {
        Self { from, to, held: Bytes::new(), source: if done { Source::Done } else { Source::Body } }
    }

    /// The same from its beginning to another receiver, which the head tells whether it is `bodiless`.
    pub(super) fn again(self, sent: Replay, to: SendStream<Bytes>, bodiless: bool) -> Self {
        let Self { from, held, source, to: _ } = self;
        let held = match (sent.bytes, held.is_empty()) {
            (None, _) => held,
            (Some(bytes), true) => bytes,
            (Some(bytes), false) => {
                let mut all = BytesMut::from(bytes);
                all.extend_from_slice(&held);
                all.freeze()
            }
        };
        let source = match source {
            // Also without a byte the end has to be sent, unless the head says that nothing follows.
            Source::Done if !bodiless => Source::Ended,
            Source::Body | Source::Trailers | Source::Ended | Source::Done => source,
        };
        Self { from, to, held, source }
    }

    pub(super) fn is_done(&self) -> bool {
        self.source == Source::Done
    }

    /// Where it goes.
    pub(super) fn to(&mut self) -> &mut SendStream<Bytes> {
        &mut self.to
    }

    /// Goes on as far as possible.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut passed: impl FnMut(Passed<'_>),
    ) -> Poll<Result<(), Broken>> {
        loop {
            if !self.held.is_empty() {
                let Poll::Ready(room) = self.poll_room(cx) else {
                    self.from.gather(cx);
                    return Poll::Pending;
                };
                let room = room?;
                let chunk = self.held.split_to(room.min(self.held.len()));
                passed(Passed::Data(&chunk));
                let last = self.held.is_empty() && self.ends();
                self.send(chunk, last)?;
                continue;
            }
            match self.source {
                Source::Body => match ready!(self.from.poll_data(cx)) {
                    Some(Ok(data)) => {
                        // What a stream that has ended still owes is granted when it is dropped.
                        if !data.is_empty() && !self.from.is_end_stream() {
                            self.from.grant(data.len()).map_err(Broken::From)?;
                        }
                        self.held = data;
                    }
                    Some(Err(error)) => return Poll::Ready(Err(Broken::From(error))),
                    None => self.source = Source::Trailers,
                },
                Source::Trailers => match ready!(self.from.poll_trailers(cx)).map_err(Broken::From)? {
                    Some(trailers) => {
                        passed(Passed::Trailers(&trailers));
                        self.to.send_trailers(trailers).map_err(|_gone| Broken::To)?;
                        self.source = Source::Done;
                    }
                    None => self.send(Bytes::new(), true)?,
                },
                Source::Ended => self.send(Bytes::new(), true)?,
                Source::Done => return Poll::Ready(Ok(())),
            }
        }
    }

    /// Nothing follows what is held.
    fn ends(&self) -> bool {
        match self.source {
            Source::Body => self.from.is_end_stream(),
            Source::Trailers => false,
            Source::Ended | Source::Done => true,
        }
    }

    fn send(&mut self, data: Bytes, last: bool) -> Result<(), Broken> {
        self.to.send_data(data, last).map_err(|_gone| Broken::To)?;
        if last {
            self.source = Source::Done;
        }
        Ok(())
    }

    /// How much the receiver takes now.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Broken>> {
        self.to.reserve_capacity(self.held.len());
        let room = self.to.capacity();
        if room > 0 {
            return Poll::Ready(Ok(room));
        }
        match ready!(self.to.poll_capacity(cx)) {
            Some(Ok(room)) => Poll::Ready(Ok(room)),
            Some(Err(_)) | None => Poll::Ready(Err(Broken::To)),
        }
    }
}

/// What was sent of a body, as long as it can be sent again.
#[derive(Default)]
pub(super) struct Replay {
    bytes: Option<Bytes>,
    lost: bool,
}

impl Replay {
    pub(super) fn note(&mut self, passed: &Passed<'_>) {
        match passed {
            Passed::Data(chunk) if !self.lost => match self.bytes.take() {
                None if chunk.len() <= REPLAYED => self.bytes = Some((*chunk).clone()),
                Some(before) if before.len() + chunk.len() <= REPLAYED => {
                    let mut all = BytesMut::from(before);
                    all.extend_from_slice(chunk);
                    self.bytes = Some(all.freeze());
                }
                _ => self.lost = true,
            },
            Passed::Data(_) => {}
            // Too rare to be worth keeping.
            Passed::Trailers(_) => self.lost = true,
        }
    }

    /// All of it, if it is still there.
    pub(super) fn take(&mut self) -> Option<Self> {
        let whole = !self.lost;
        whole.then(|| std::mem::take(self))
    }
}
