//! What waits to be sent on a connection, in the order in which it goes.
//!
//! Two queues. Small frames are written one behind the other into one buffer, which becomes one TLS record; a piece that is
//! small and whose stream has nothing in the other queue goes there too, so that a short message overtakes the bulk of
//! others. Large pieces wait as they are, without a copy, and a few go after each turn of the small ones. What belongs to
//! one stream stays in its order. Must not know flow control.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::frame::{Control, HEAD, Head, LARGEST};

/// Larger pieces cost less where they are.
pub(super) const SMALL: usize = 4 << 10;
/// Large frames in one turn.
const LARGE_AT_ONCE: usize = 4;
/// A buffer for small frames that has grown beyond this is not kept.
const KEPT: usize = 16 << 10;

#[derive(Default)]
pub(super) struct Outbox {
    small: BytesMut,
    /// The last frame in `small`, if it is data: whose, and where its head is. More of the same stream makes it longer.
    last: Option<(u32, usize)>,
    large: VecDeque<Large>,
}

/// A frame that waits as it is.
struct Large {
    head: [u8; HEAD],
    data: Bytes,
    stream: u32,
}

impl Outbox {
    /// A frame without data that is ahead of whatever its stream has in the other queue.
    pub(super) fn control(&mut self, stream: u32, control: &Control) {
        control.encode(stream, &mut self.small);
        self.last = None;
    }

    /// The same, behind it.
    pub(super) fn control_after(&mut self, stream: u32, control: &Control) {
        let mut frame = BytesMut::new();
        control.encode(stream, &mut frame);
        let Some((head, body)) = frame.split_first_chunk::<HEAD>() else { return };
        self.large.push_back(Large { head: *head, data: Bytes::copy_from_slice(body), stream });
    }

    /// Data that is small. Its stream has nothing in the other queue.
    pub(super) fn small(&mut self, stream: u32, data: &[u8]) {
        if let Some((_, at)) = self.last.filter(|(last, _)| *last == stream) {
            let length = self.small.len() - at - HEAD + data.len();
            if length <= LARGEST
                && let Some(head) = self.small.get_mut(at..at + HEAD)
            {
                head.copy_from_slice(&Head::data(stream, length).encode());
                self.small.put_slice(data);
                return;
            }
        }
        self.last = Some((stream, self.small.len()));
        self.small.put_slice(&Head::data(stream, data.len()).encode());
        self.small.put_slice(data);
    }

    /// Data that is large, or has such before it. Returns how many frames it became.
    pub(super) fn large(&mut self, stream: u32, mut data: Bytes) -> usize {
        let before = self.large.len();
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(LARGEST));
            self.large.push_back(Large { head: Head::data(stream, piece.len()).encode(), data: piece, stream });
        }
        self.large.len() - before
    }

    /// Takes back what a stream has in the queue of the large.
    pub(super) fn forget(&mut self, stream: u32) {
        self.large.retain(|large| large.stream != stream);
    }

    /// Octets in the buffer of the small.
    pub(super) fn waiting(&self) -> usize {
        self.small.len()
    }

    /// The next turn. `left` hears of each frame from the queue of the large, whose it is and how long, that is on its way now.
    pub(super) fn next(&mut self, batch: &mut Batch, mut left: impl FnMut(u32, usize)) {
        debug_assert!(batch.is_empty(), "what was taken before has left");
        self.last = None;
        std::mem::swap(&mut self.small, &mut batch.small);
        batch.grown = batch.small.capacity() > KEPT;
        for _ in 0..LARGE_AT_ONCE {
            let Some(Large { head, data, stream }) = self.large.pop_front() else { break };
            left(stream, data.len());
            batch.large.push_back((head, 0, data));
        }
        if self.large.is_empty() && self.large.capacity() > 2 * LARGE_AT_ONCE {
            self.large = VecDeque::new();
        }
    }
}

/// What is being written.
#[derive(Default)]
pub(super) struct Batch {
    small: BytesMut,
    /// Its buffer is not to be kept. What is left of it does not tell: that shrinks from the front.
    grown: bool,
    /// Head, how much of it has left, and what follows.
    large: VecDeque<([u8; HEAD], usize, Bytes)>,
}

/// The most pieces of a batch.
pub(super) const PIECES: usize = 1 + 2 * LARGE_AT_ONCE;

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.small.is_empty() && self.large.is_empty()
    }

    /// All of it, in `room`; returns how many pieces there are.
    pub(super) fn pieces<'a>(&'a self, room: &mut [IoSlice<'a>; PIECES]) -> usize {
        let large = self.large.iter().flat_map(|(head, gone, data)| [head.get(*gone..).unwrap_or_default(), data]);
        let pieces = std::iter::once(&self.small[..]).chain(large).filter(|piece| !piece.is_empty());
        room.iter_mut().zip(pieces).map(|(room, piece)| *room = IoSlice::new(piece)).count()
    }

    /// So much of it was taken.
    pub(super) fn advance(&mut self, mut taken: usize) {
        let length = taken.min(self.small.len());
        self.small.advance(length);
        taken -= length;
        if self.small.is_empty() && std::mem::take(&mut self.grown) {
            self.small = BytesMut::new();
        }
        while let Some((_, gone, data)) = self.large.front_mut() {
            let length = taken.min(HEAD - *gone);
            *gone += length;
            taken -= length;
            let length = taken.min(data.len());
            data.advance(length);
            taken -= length;
            if *gone < HEAD || !data.is_empty() {
                break;
            }
            self.large.pop_front();
        }
    }
}
