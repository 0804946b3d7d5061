//! Bodies on their way: counted, and watched for their end.
//!
//! [`Upload`] goes to the server. [`Answer`] goes to the client and carries what must happen when the answer has ended,
//! or breaks off: the record, the endpoint's load, the connection's way back into the pool. Must not know heads.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::Response;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use mesh_common::refusal::Refusal;

use super::pool::{Sender, Slot, give_back};
use crate::{
    proxy::{Proxy, draw, http::refusal, loads::InFlight},
    telemetry::{
        access::{Access, Counts},
        metrics::Outcome,
    },
};

/// What a request's body may hold and still be sent again.
const REPLAYED: usize = 64 << 10;

/// A request's body.
pub(super) struct Upload {
    /// `None` for a request that is sent a second time.
    body: Option<Incoming>,
    /// What is sent a second time.
    again: VecDeque<Bytes>,
    sent: Arc<Sent>,
    counts: Arc<Counts>,
    broken: Arc<AtomicBool>,
}

/// What was sent of a body, as long as it can be sent again.
#[derive(Default)]
pub(super) struct Sent(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    chunks: VecDeque<Bytes>,
    length: usize,
    /// It is too long, or has trailers.
    lost: bool,
    /// There is no more.
    whole: bool,
}

impl Sent {
    fn note(&self, frame: Option<&Frame<Bytes>>, last: bool) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match frame.map(Frame::data_ref) {
            Some(Some(chunk)) if !kept.lost && kept.length + chunk.len() <= REPLAYED => {
                kept.length += chunk.len();
                kept.chunks.push_back(chunk.clone());
            }
            Some(_) => {
                kept.lost = true;
                kept.chunks.clear();
            }
            None => {}
        }
        kept.whole |= last;
    }

    /// The whole body once more, if all of it was sent and kept.
    pub(super) fn again(self: &Arc<Self>) -> Option<Upload> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (kept.whole && !kept.lost).then(|| Upload { again: kept.chunks.clone(), sent: self.clone(), ..Upload::empty() })
    }
}

/// An answer's body.
pub(super) enum Answer {
    Relayed(Box<Relayed>),
    Own(Bytes),
}

/// A body that comes from a server.
pub(super) struct Relayed {
    body: Incoming,
    counts: Arc<Counts>,
    /// Until the body has ended.
    rest: Option<Rest>,
    /// Why it broke off, when that has not been said yet.
    broken: Option<hyper::Error>,
}

/// What remains to be done when an answer has ended.
pub(super) struct Rest {
    pub(super) proxy: Arc<Proxy>,
    pub(super) access: Access,
    pub(super) in_flight: InFlight,
    pub(super) sender: Sender,
    pub(super) slot: Slot,
}

impl Upload {
    /// The body, and a flag that turns true when the client breaks off.
    pub(super) fn new(body: Incoming, counts: Arc<Counts>) -> (Self, Arc<AtomicBool>) {
        let broken = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(Sent::default());
        sent.note(None, body.is_end_stream());
        (Self { body: Some(body), again: VecDeque::new(), sent, counts, broken: broken.clone() }, broken)
    }

    /// What is sent of it from now on.
    pub(super) fn sent(&self) -> Arc<Sent> {
        self.sent.clone()
    }

    /// No body.
    pub(super) fn empty() -> Self {
        Self {
            body: None,
            again: VecDeque::new(),
            sent: Arc::default(),
            counts: Arc::default(),
            broken: Arc::default(),
        }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(self.again.pop_front().map(|chunk| Ok(Frame::data(chunk))));
        };
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        let last = body.is_end_stream();
        match &frame {
            Some(Ok(frame)) => {
                self.counts.add_sent(frame.data_ref().map_or(0, Bytes::len));
                // Nobody asks for the end of a body whose length was told.
                self.sent.note(Some(frame), last);
            }
            Some(Err(_)) => self.broken.store(true, Ordering::Relaxed),
            None => self.sent.note(None, true),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.again.is_empty() && self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let again = || SizeHint::with_exact(self.again.iter().map(|chunk| chunk.len() as u64).sum());
        self.body.as_ref().map_or_else(again, Incoming::size_hint)
    }
}

impl Answer {
    /// Passes a server's body on. One that has already ended is settled at once.
    pub(super) fn relay(body: Incoming, rest: Rest) -> Self {
        let mut relayed = Relayed { counts: rest.access.counts.clone(), body, rest: Some(rest), broken: None };
        if relayed.body.is_end_stream() {
            relayed.settle();
        }
        Self::Relayed(Box::new(relayed))
    }

    /// No body.
    pub(super) fn empty() -> Self {
        Self::Own(Bytes::new())
    }
}

impl Relayed {
    fn settle(&mut self) {
        if let Some(Rest { proxy, mut access, in_flight, sender, slot }) = self.rest.take() {
            access.outcome = Outcome::Ok;
            drop(in_flight);
            give_back(&proxy, slot, sender);
        }
    }

    fn broke_off(&mut self) {
        if let Some(Rest { proxy, mut access, in_flight, .. }) = self.rest.take() {
            access.refusal = Some(Refusal::UpstreamReset);
            in_flight.failed(proxy.now(), draw());
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let relayed = match &mut *self {
            Self::Relayed(relayed) => relayed,
            Self::Own(bytes) if bytes.is_empty() => return Poll::Ready(None),
            Self::Own(bytes) => return Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
        };
        if let Some(error) = relayed.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let frame = match ready!(Pin::new(&mut relayed.body).poll_frame(cx)) {
            Some(Err(error)) => {
                relayed.broke_off();
                // hyper drops what it has not written yet when a body fails. What the server did send, head and all,
                // is written while we pend; the failure is told right after.
                relayed.broken = Some(error);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            frame => frame,
        };
        match &frame {
            Some(Ok(frame)) => {
                relayed.counts.add_received(frame.data_ref().map_or(0, Bytes::len));
                // Nobody asks for the end of a body whose length was told.
                if relayed.body.is_end_stream() {
                    relayed.settle();
                }
            }
            Some(Err(_)) => {}
            None => relayed.settle(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Relayed(relayed) => relayed.body.is_end_stream(),
            Self::Own(bytes) => bytes.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Relayed(relayed) => relayed.body.size_hint(),
            Self::Own(bytes) => SizeHint::with_exact(bytes.len() as u64),
        }
    }
}

/// The answer to a request that is not served.
pub(super) fn refusal(refusal: Refusal) -> Response<Answer> {
    refusal::plain(refusal).map(Answer::Own)
}
