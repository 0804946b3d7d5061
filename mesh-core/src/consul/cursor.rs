//! The rules of a blocking query that is asked over and over: its index, how long to wait after a failure, and how
//! often it may be asked at all.
//!
//! Must not know what is asked. The clock and chance are arguments.

use std::time::Duration;

use crate::back_off::back_off;

/// Questions that one query may ask without a pause, and how fast it may go on after them: an index that does not
/// behave must not make a busy loop.
const BURST: u32 = 10;
const EACH: Duration = Duration::from_millis(500);

/// Where a blocking query stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// 0: the next question is answered at once.
    index: u64,
    /// That of the last answer, failures since then or not.
    seen: u64,
    failures: u32,
    pace: Pace,
}

/// What an answer's index says about the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// There may be something new.
    On,
    /// Nothing has changed: the wait is over, no more.
    Not,
    /// Consul has begun anew, from a backup for instance. The answer is as good as any, but what is missing in it may
    /// only be missing yet.
    Back,
}

impl Cursor {
    /// The index to ask with. `None`: without one, to be answered at once.
    pub fn index(&self) -> Option<u64> {
        (self.index > 0).then_some(self.index)
    }

    /// An answer has come, with this `X-Consul-Index`. An index of 0, or none, is a fault that is known to happen; it
    /// counts as 1, because 0 would not block.
    pub fn answered(&mut self, index: Option<u64>) -> Moved {
        self.failures = 0;
        let given = index.unwrap_or(0).max(1);
        let last = std::mem::replace(&mut self.index, given);
        let back = given < std::mem::replace(&mut self.seen, given);
        if back {
            self.index = 0;
            Moved::Back
        } else if given == last {
            Moved::Not
        } else {
            Moved::On
        }
    }

    /// Whether an answer with this index would not be the first, nor Consul's beginning anew.
    pub fn goes_on_with(&self, index: Option<u64>) -> bool {
        self.index > 0 && index.is_some_and(|given| given.max(1) >= self.seen)
    }

    /// No answer has come, or none that can be understood. Returns how long to wait; the next question is answered at
    /// once, because a server that has come back may count anew.
    pub fn failed(&mut self, draw: u32) -> Duration {
        self.index = 0;
        let wait = back_off(self.failures, draw);
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// How long to wait before the next question may be asked, at `now` (since any fixed moment).
    pub fn pause(&mut self, now: Duration) -> Duration {
        self.pace.take(now)
    }
}

/// How long a client must wait for the answer to a query that may block for `wait`: the server adds up to a sixteenth
/// by itself, and needs time to answer.
pub fn patience(wait: Duration) -> Duration {
    wait + wait / 16 + Duration::from_secs(10)
}

/// A bucket of questions, as the time at which it would be full again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Pace {
    full: Duration,
}

impl Pace {
    fn take(&mut self, now: Duration) -> Duration {
        self.full = self.full.max(now) + EACH;
        self.full.saturating_sub(now + EACH * BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_index_is_used_and_reset_as_documented() {
        let mut cursor = Cursor::default();
        assert_eq!(cursor.index(), None, "the first question does not block");
        assert_eq!((cursor.answered(Some(7)), cursor.index()), (Moved::On, Some(7)));
        assert_eq!((cursor.answered(Some(7)), cursor.index()), (Moved::Not, Some(7)));
        assert_eq!((cursor.answered(Some(9)), cursor.index()), (Moved::On, Some(9)));
        assert_eq!(
            [Some(9), Some(10), Some(8), None].map(|index| cursor.goes_on_with(index)),
            [true, true, false, false]
        );
        assert_eq!((cursor.answered(Some(3)), cursor.index()), (Moved::Back, None), "backwards: from the beginning");
        assert!(!cursor.goes_on_with(Some(3)), "it begins anew");
        assert_eq!((cursor.answered(Some(3)), cursor.index()), (Moved::On, Some(3)));
        cursor.failed(0);
        assert_eq!(cursor.index(), None, "a server that was away may count anew");
        assert_eq!((cursor.answered(Some(2)), cursor.index()), (Moved::Back, None), "and it does");
        let mut cursor = Cursor::default();
        assert_eq!((cursor.answered(Some(0)), cursor.index()), (Moved::On, Some(1)), "0 would not block");
        assert_eq!((cursor.answered(None), cursor.index()), (Moved::Not, Some(1)));
    }

    proptest! {
        #[test]
        fn an_index_is_never_zero_nor_older_than_the_answer(indexes in prop::collection::vec(any::<Option<u64>>(), 0..20)) {
            let mut cursor = Cursor::default();
            for index in indexes {
                let moved = cursor.answered(index);
                let given = index.unwrap_or(0).max(1);
                prop_assert_eq!(cursor.index(), (moved != Moved::Back).then_some(given));
            }
        }

        #[test]
        fn no_index_makes_a_busy_loop(gaps in prop::collection::vec(0_u64..50, 1..300)) {
            let (mut cursor, mut now) = (Cursor::default(), Duration::ZERO);
            let count = u32::try_from(gaps.len()).expect("few");
            for gap in gaps {
                now += Duration::from_millis(gap);
                now += cursor.pause(now);
            }
            prop_assert!(now + EACH * BURST >= EACH * count, "{count} questions in {now:?}");
        }
    }

    #[test]
    fn patience_is_longer_than_the_server_takes() {
        for seconds in [1, 300, 600] {
            let wait = Duration::from_secs(seconds);
            assert!(patience(wait) > wait * 17 / 16 + Duration::from_secs(5));
        }
    }
}
