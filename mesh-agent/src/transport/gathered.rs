//! What was received and waits for its reader, small pieces joined.
//!
//! Must not know where it comes from.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Smaller pieces are copied together. h2 charges for less than 256 octets; and a piece may be a part of a read of 64 KiB, which it
/// keeps alive: full records, and what a frame's head leaves of one, are a quarter of it, and cost less where they are.
const SMALL: usize = 16_000;
/// As far as small pieces are joined: what is handed over is granted at once, so one piece must not be the whole window.
const JOINED: usize = 32 << 10;

/// Received, not yet handed over.
#[derive(Default)]
pub(super) struct Gathered {
    pieces: VecDeque<Bytes>,
    /// After all of them.
    joined: BytesMut,
}

impl Gathered {
    pub(super) fn add(&mut self, piece: Bytes) {
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

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.joined.is_empty()
    }

    pub(super) fn next(&mut self) -> Option<Bytes> {
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
        let lengths = [1, 5, 18_000, 1, 1023, 16_000, 40_000, 3].into_iter().chain(std::iter::repeat_n(1000, 40));
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
