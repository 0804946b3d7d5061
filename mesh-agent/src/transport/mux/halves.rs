//! The two directions of a stream, as their users hold them.
//!
//! Must not know what is carried.

use std::{
    io,
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{frame::Control, state::Shared};
use crate::transport::tunnel::Payload;

/// The direction from the peer to us. Dropped before its end, it throws away what still comes.
pub(in crate::transport) struct Receiving {
    shared: Arc<Shared>,
    stream: u32,
}

/// The direction from us to the peer. Dropped before it was ended, it resets the stream.
pub(in crate::transport) struct Sending {
    shared: Arc<Shared>,
    stream: u32,
}

/// Both, of a stream that was just opened.
pub(super) fn of(shared: &Arc<Shared>, stream: u32) -> (Receiving, Sending) {
    (Receiving { shared: shared.clone(), stream }, Sending { shared: shared.clone(), stream })
}

impl Receiving {
    /// What comes next, `None` at the end.
    ///
    /// # Errors
    /// `ConnectionReset`, after what had come before it.
    pub(in crate::transport) fn poll_data(&self, cx: &Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        self.shared.poll_data(self.stream, cx)
    }

    /// What has come behind that already.
    pub(in crate::transport) fn more_data(&self) -> Option<Bytes> {
        self.shared.more_data(self.stream)
    }

    /// So much of it has gone on its way: the peer may send as much again.
    pub(in crate::transport) fn consumed(&self, octets: usize) {
        self.shared.consumed(self.stream, octets);
    }

    /// What the peer says about how much of ours was taken.
    pub(in crate::transport) fn taken(&self) -> Arc<AtomicU64> {
        self.shared.taken(self.stream)
    }
}

impl Sending {
    /// Sends as much as there is room for, and returns how much that was.
    ///
    /// # Errors
    /// `ConnectionReset`; `BrokenPipe` after the end.
    pub(in crate::transport) fn poll_send(&self, cx: &Context<'_>, payload: Payload<'_>) -> Poll<io::Result<usize>> {
        self.shared.poll_send(self.stream, cx, payload)
    }

    /// Ends the direction in order, behind all that was sent; says how much of the other one the application has taken.
    ///
    /// # Errors
    /// `ConnectionReset`.
    pub(in crate::transport) fn end(&self, taken: Option<u64>) -> io::Result<()> {
        self.shared.end(self.stream, taken)
    }

    /// Ends both directions at once; likewise.
    pub(in crate::transport) fn reset(&self, taken: Option<u64>) {
        self.shared.reset(self.stream, taken);
    }

    /// Waits until the peer has reset the stream, or the connection is lost.
    pub(in crate::transport) fn poll_reset(&self, cx: &Context<'_>) -> Poll<()> {
        self.shared.poll_reset(self.stream, cx)
    }

    pub(super) fn answer(&self, answer: &Control) -> io::Result<()> {
        self.shared.answer(self.stream, answer)
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.shared.drop_receiver(self.stream);
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.shared.drop_sender(self.stream);
    }
}
