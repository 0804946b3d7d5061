//! What is asked for next, of many things that are asked for over and over: those never seen first, then those that are
//! longest overdue. What the tasks of this host use is asked for often, the rest seldom.
//!
//! Must not know what the things are. The clock and chance are arguments; moments are times since any fixed one.

use std::{collections::BTreeMap, time::Duration};

use crate::back_off::{back_off, spread};

/// A thing that no task has asked for in so long is idle.
pub const IDLE: Duration = Duration::from_secs(300);

/// How often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intervals {
    /// What is used.
    pub used: Duration,
    /// What is idle.
    pub idle: Duration,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Rota<K> {
    intervals: Intervals,
    turns: BTreeMap<K, Turn>,
}

#[derive(Clone, Debug, Default)]
struct Turn {
    due: Duration,
    /// `None`: never.
    answered: Option<Duration>,
    used: Option<Duration>,
    under_way: bool,
    failures: u32,
}

impl<K: Ord + Clone> Rota<K> {
    pub fn new(intervals: Intervals) -> Self {
        Self { intervals, turns: BTreeMap::new() }
    }

    /// From now on it is asked for; at once. One that is there stays as it is.
    pub fn add(&mut self, key: K, now: Duration) {
        self.turns.entry(key).or_insert(Turn { due: now, ..Turn::default() });
    }

    pub fn remove(&mut self, key: &K) {
        self.turns.remove(key);
    }

    /// A task asks for it. One that was idle is due at once, unless it is still fresh.
    pub fn used(&mut self, key: &K, now: Duration) {
        let Some(turn) = self.turns.get_mut(key) else { return };
        turn.used = Some(now);
        if let Some(answered) = turn.answered.filter(|_| turn.failures == 0) {
            turn.due = turn.due.min(answered + self.intervals.used);
        }
    }

    /// It may have changed: due now.
    pub fn hurry(&mut self, key: &K, now: Duration) {
        if let Some(turn) = self.turns.get_mut(key) {
            turn.due = turn.due.min(now);
        }
    }

    /// The one that is to be asked for now; it is then under way.
    pub fn take(&mut self, now: Duration) -> Option<K> {
        let ready = self.turns.iter_mut().filter(|(_, turn)| !turn.under_way && turn.due <= now);
        let (key, turn) = ready.min_by_key(|(_, turn)| (turn.answered.is_some(), turn.due))?;
        turn.under_way = true;
        Some(key.clone())
    }

    /// When something is due next; `None`: everything is under way, or there is nothing.
    pub fn next(&self) -> Option<Duration> {
        self.turns.values().filter(|turn| !turn.under_way).map(|turn| turn.due).min()
    }

    /// It has been answered. The next time is up to a tenth early or late, so that hosts do not ask in step.
    pub fn answered(&mut self, key: &K, now: Duration, draw: u32) {
        let Some(turn) = self.turns.get_mut(key) else { return };
        let idle = turn.used.is_none_or(|at| now.saturating_sub(at) > IDLE);
        let interval = if idle { self.intervals.idle } else { self.intervals.used };
        turn.due = now + interval * 9 / 10 + spread(interval / 5, draw);
        (turn.answered, turn.under_way, turn.failures) = (Some(now), false, 0);
    }

    /// It has not been answered, for a reason of its own.
    pub fn failed(&mut self, key: &K, now: Duration, draw: u32) {
        let Some(turn) = self.turns.get_mut(key) else { return };
        turn.due = now + back_off(turn.failures, draw);
        turn.failures = turn.failures.saturating_add(1);
        turn.under_way = false;
    }

    /// It has not been answered, for a reason that has nothing to do with it: its turn is still to come.
    pub fn put_back(&mut self, key: &K) {
        if let Some(turn) = self.turns.get_mut(key) {
            turn.under_way = false;
        }
    }

    /// Whether something is asked for at the moment.
    pub fn is_under_way(&self) -> bool {
        self.turns.values().any(|turn| turn.under_way)
    }

    /// How many have never been answered.
    pub fn unseen(&self) -> usize {
        self.turns.values().filter(|turn| turn.answered.is_none()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INTERVALS: Intervals = Intervals { used: Duration::from_secs(5), idle: Duration::from_secs(60) };
    const T0: Duration = Duration::from_secs(1000);

    fn at(seconds: u64) -> Duration {
        T0 + Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_used_comes_often() {
        let mut rota = Rota::new(INTERVALS);
        rota.add("a", T0);
        rota.add("b", T0);
        assert_eq!((rota.take(T0), rota.take(T0), rota.take(T0)), (Some("a"), Some("b"), None));
        rota.answered(&"a", T0, 0);
        rota.answered(&"b", T0, 0);
        assert_eq!(rota.next(), Some(at(54)));
        rota.used(&"b", at(2));
        assert_eq!(rota.next(), Some(at(5)), "it was answered three seconds ago");
        rota.used(&"b", at(20));
        assert_eq!((rota.take(at(20)), rota.take(at(20))), (Some("b"), None));
        assert!(rota.is_under_way());
        rota.answered(&"b", at(20), 0);
        assert!(!rota.is_under_way());
        assert_eq!(rota.next(), Some(T0 + Duration::from_millis(24_500)));
        rota.take(at(400));
        rota.take(at(400));
        rota.answered(&"b", at(400), 0);
        assert_eq!(rota.next(), Some(at(454)), "nobody has asked for it in five minutes");
    }

    #[test]
    fn a_failure_waits_and_an_outage_does_not_count() {
        let mut rota = Rota::new(INTERVALS);
        rota.add("a", T0);
        rota.take(T0);
        rota.put_back(&"a");
        assert_eq!(rota.take(T0), Some("a"), "it is still its turn");
        rota.failed(&"a", T0, u32::MAX);
        assert!(rota.take(T0).is_none() && rota.next().is_some_and(|due| due > T0));
        rota.used(&"a", T0);
        assert!(rota.take(T0).is_none(), "not sooner for being used");
        rota.hurry(&"a", T0);
        assert_eq!((rota.take(T0), rota.next()), (Some("a"), None));
    }

    proptest! {
        /// Asked one at a time at a given rate, each gets its turn, and none twice before the others that are due.
        #[test]
        fn everybody_gets_a_turn(count in 1_usize..40, used in prop::collection::vec(0_usize..40, 0..10), draws in prop::collection::vec(any::<u32>(), 40)) {
            let mut rota = Rota::new(INTERVALS);
            (0..count).for_each(|key| rota.add(key, T0));
            let mut now = T0;
            let mut seen = Vec::new();
            while rota.unseen() > 0 {
                let key = rota.take(now).expect("there is one that was never seen");
                seen.push(key);
                rota.answered(&key, now, draws[key]);
                now += Duration::from_millis(10);
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..count).collect::<Vec<_>>());
            used.iter().for_each(|key| rota.used(key, now));
            // A little more than a minute and a tenth later everything has been due, and once only if it is idle.
            let mut turns = vec![0; count];
            let end = T0 + Duration::from_secs(67);
            while let Some(due) = rota.next().filter(|due| *due <= end) {
                now = now.max(due);
                let key = rota.take(now).expect("due");
                turns[key] += 1;
                rota.answered(&key, now, draws[key]);
            }
            for (key, count) in turns.iter().enumerate() {
                let many = if used.contains(&key) { 11..=16 } else { 1..=1 };
                prop_assert!(many.contains(count), "{key}: {count}");
            }
        }
    }
}
