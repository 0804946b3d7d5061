//! Copies of one question, sent in one breath. musl asks all its resolvers at once from one socket, and the hook knows
//! of a socket only whom it asked last: that all copies go to that one would be the end of names when it is down.
//!
//! Knows when which bytes came from where; must not know what they ask, nor who the resolvers are.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

/// What comes later is a question asked again, and meant for whom it was meant before.
const BREATH: Duration = Duration::from_millis(100);
/// More are not remembered; what is forgotten goes where the hook says.
const REMEMBERED: usize = 4096;

type Key = (SocketAddr, Arc<[u8]>);

/// Questions of the last moment, and how often each was heard.
#[derive(Default)]
pub(super) struct Copies {
    heard: HashMap<Key, usize>,
    order: VecDeque<(Instant, Key)>,
}

impl Copies {
    /// How many of the same were heard before this one.
    pub(super) fn before(&mut self, peer: SocketAddr, bytes: &Arc<[u8]>, now: Instant) -> usize {
        while self.order.front().is_some_and(|(at, _)| now.duration_since(*at) >= BREATH) {
            if let Some((_, key)) = self.order.pop_front() {
                self.heard.remove(&key);
            }
        }
        let key = (peer, bytes.clone());
        if let Some(count) = self.heard.get_mut(&key) {
            *count += 1;
            return *count - 1;
        }
        if self.order.len() < REMEMBERED {
            self.heard.insert(key.clone(), 1);
            self.order.push_back((now, key));
        }
        0
    }
}

#[cfg(test)]
mod tests {
    //! Copies in time, and in number.

    use super::*;

    #[test]
    fn copies_are_counted_for_a_moment() {
        let mut copies = Copies::default();
        let (begun, peer) = (Instant::now(), SocketAddr::from(([127, 0, 0, 1], 40_000)));
        let other = SocketAddr::from(([127, 0, 0, 1], 40_001));
        let (one, two): (Arc<[u8]>, Arc<[u8]>) = (b"one"[..].into(), b"two"[..].into());
        let mut before = |peer, bytes, at| copies.before(peer, bytes, begun + Duration::from_millis(at));
        assert_eq!([0, 1, 99].map(|at| before(peer, &one, at)), [0, 1, 2]);
        assert_eq!((before(peer, &two, 99), before(other, &one, 99)), (0, 0));
        assert_eq!([100, 101].map(|at| before(peer, &one, at)), [0, 1], "asked again");
        assert_eq!((before(peer, &two, 150), before(peer, &two, 250)), (1, 0));
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let mut copies = Copies::default();
        let (now, peer) = (Instant::now(), SocketAddr::from(([127, 0, 0, 1], 40_000)));
        for n in 0..2 * REMEMBERED {
            let bytes: Arc<[u8]> = n.to_be_bytes()[..].into();
            assert_eq!(copies.before(peer, &bytes, now), 0);
            assert_eq!(copies.before(peer, &bytes, now), usize::from(n < REMEMBERED));
        }
        assert_eq!((copies.heard.len(), copies.order.len()), (REMEMBERED, REMEMBERED));
        let bytes: Arc<[u8]> = b"later"[..].into();
        assert_eq!(copies.before(peer, &bytes, now + BREATH), 0);
        assert_eq!((copies.heard.len(), copies.order.len()), (1, 1));
    }
}
