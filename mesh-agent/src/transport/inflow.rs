//! What comes on an HTTP/2 stream, also while nobody takes it.
//!
//! h2 charges a connection for what small frames that wait to be read waste, and ends it, with every stream on it, when they
//! are too many. So who cannot pass on what comes does not leave it with h2: it is gathered here, small pieces joined.
//! Nothing of that is granted again before it is handed over and passed on, so flow control bounds it as if it waited in h2.
//! Must not know what the stream carries.

use std::{
    collections::VecDeque,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use http::HeaderMap;

/// Smaller pieces are copied together; larger ones cost less where they are. h2 charges for less than 256.
const SMALL: usize = 1 << 10;
/// As far as small pieces are joined: what is handed over is granted at once, so one piece must not be the whole window.
const JOINED: usize = 16 << 10;

/// The receiving direction of a stream.
pub struct Inflow {
    stream: RecvStream,
    /// Only while there is something in it.
    gathered: Option<Box<Gathered>>,
}

/// Received, not yet handed over.
#[derive(Default)]
struct Gathered {
    pieces: VecDeque<Bytes>,
    /// After all of them.
    joined: BytesMut,
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

impl Gathered {
    fn add(&mut self, piece: Bytes) {
        let small = piece.len() < SMALL;
        if !small || self.joined.len() + piece.len() > JOINED {
            self.complete();
        }
        if small {
            self.joined.extend_from_slice(&piece);
        } else {
            self.pieces.push_back(piece);
        }
    }

    fn complete(&mut self) {
        if !self.joined.is_empty() {
            self.pieces.push_back(std::mem::take(&mut self.joined).freeze());
        }
    }

    fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.joined.is_empty()
    }

    fn next(&mut self) -> Option<Bytes> {
        if self.pieces.is_empty() {
            self.complete();
        }
        self.pieces.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gathered_comes_out_in_its_order_and_in_no_larger_pieces_than_are_joined() {
        let lengths = [1, 5, 2000, 1, 1023, 1024, 40_000, 3].into_iter().chain(std::iter::repeat_n(1000, 40));
        let mut gathered = Gathered::default();
        let (mut sent, mut heard) = (Vec::new(), Vec::new());
        for (number, length) in lengths.enumerate() {
            let piece = vec![number as u8; length];
            sent.extend_from_slice(&piece);
            gathered.add(piece.into());
            // Some is taken between.
            if number % 5 == 4 {
                heard.extend(gathered.next());
            }
        }
        heard.extend(std::iter::from_fn(|| gathered.next()));
        assert!(gathered.is_empty());
        assert!(heard.concat() == sent);
        let lengths: Vec<_> = heard.iter().map(Bytes::len).collect();
        assert!(
            lengths.len() < 20 && lengths.iter().all(|length| *length <= JOINED || *length == 40_000),
            "{lengths:?}"
        );
    }
}
