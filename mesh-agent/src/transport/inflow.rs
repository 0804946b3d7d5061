//! What comes on an HTTP/2 stream, also while nobody takes it.
//!
//! h2 charges a connection for what small frames that wait to be read waste, and ends it, with every stream on it, when they
//! are too many. So who cannot pass on what comes does not leave it with h2: it is gathered here, small pieces joined.
//! Nothing of that is granted again before it is handed over and passed on, so flow control bounds it as if it waited in h2.
//! Must not know what the stream carries.

use std::task::{Context, Poll};

use bytes::Bytes;
use h2::RecvStream;
use http::HeaderMap;

use super::gathered::Gathered;

/// The receiving direction of a stream.
pub struct Inflow {
    stream: RecvStream,
    /// Only while there is something in it.
    gathered: Option<Box<Gathered>>,
}

impl Inflow {
    pub fn new(stream: RecvStream) -> Self {
        Self { stream, gathered: None }
    }

    /// As h2's: the next piece, not granted again; `None` when there is no more but perhaps trailers.
    ///
    /// # Errors
    /// As h2's, after what had come before.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        if let Some(gathered) = &mut self.gathered {
            let piece = gathered.next();
            if gathered.is_empty() {
                self.gathered = None;
            }
            if let Some(piece) = piece {
                return Poll::Ready(Some(Ok(piece)));
            }
        }
        self.stream.poll_data(cx)
    }

    /// As h2's, after the last piece.
    ///
    /// # Errors
    /// As h2's.
    pub fn poll_trailers(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<HeaderMap>, h2::Error>> {
        self.stream.poll_trailers(cx)
    }

    /// Whether neither pieces nor trailers follow, as far as is known.
    pub fn is_end_stream(&self) -> bool {
        self.gathered.is_none() && self.stream.is_end_stream()
    }

    /// Lets the peer send `length` more, which was handed over.
    ///
    /// # Errors
    /// More is granted than was received.
    pub fn grant(&mut self, length: usize) -> Result<(), h2::Error> {
        self.stream.flow_control().release_capacity(length)
    }

    /// Takes what has come from h2, and wakes `cx` when there is more. For who cannot take the next piece now.
    pub fn gather(&mut self, cx: &mut Context<'_>) {
        // The end, and an error, are told again to who asks for the next piece.
        while let Poll::Ready(Some(Ok(piece))) = self.stream.poll_data(cx) {
            // One without an octet does nothing but end the stream.
            if !piece.is_empty() {
                self.gathered.get_or_insert_default().add(piece);
            }
        }
    }
}
