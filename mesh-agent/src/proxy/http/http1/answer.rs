//! Bodies on their way: counted, and watched for their end.
//!
//! [`Upload`] goes to the server. [`Answer`] goes to the client and carries what must happen when the answer has ended,
//! or breaks off: the record, the endpoint's load, the connection's way back into the pool. Must not know heads.

use std::{
    pin::Pin,
    sync::{
        Arc,
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

/// A request's body.
pub(super) struct Upload {
    /// `None` for a request that is sent a second time: it had none.
    body: Option<Incoming>,
    counts: Arc<Counts>,
    broken: Arc<AtomicBool>,
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
        (Self { body: Some(body), counts, broken: broken.clone() }, broken)
    }

    /// No body.
    pub(super) fn empty() -> Self {
        Self { body: None, counts: Arc::default(), broken: Arc::default() }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => self.counts.add_sent(frame.data_ref().map_or(0, Bytes::len)),
            Some(Err(_)) => self.broken.store(true, Ordering::Relaxed),
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Incoming::size_hint)
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
