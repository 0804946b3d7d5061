//! What has come for one stream and was not taken yet.
//!
//! Pieces are slices of what was read for the whole connection. While a reader keeps up they are handed over as they are; once
//! something waits, smaller ones are copied together, so that what waits pins no more memory than it is large. Must not
//! know flow control, which bounds it.

use bytes::Bytes;

use crate::transport::gathered::Gathered;

#[derive(Default)]
pub(super) struct Inbox {
    /// Empty: there is nothing, also not in `more`.
    first: Bytes,
    more: Option<Box<Gathered>>,
}

impl Inbox {
    pub(super) fn add(&mut self, piece: Bytes) {
        if piece.is_empty() {
        } else if self.first.is_empty() {
            self.first = piece;
        } else {
            self.more.get_or_insert_default().add(piece);
        }
    }

    pub(super) fn next(&mut self) -> Option<Bytes> {
        if self.first.is_empty() {
            return None;
        }
        let next = match self.more.as_mut().and_then(|more| more.next()) {
            Some(next) => next,
            None => {
                self.more = None;
                Bytes::new()
            }
        };
        Some(std::mem::replace(&mut self.first, next))
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
