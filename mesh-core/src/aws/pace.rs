//! How fast questions may be asked of an API whose quota all hosts of an account share.
//!
//! A token bucket whose rate adapts: half as fast whenever the API says that it is asked too often, and step by step
//! back to what the configuration allows while it answers. After any failure that concerns every question nothing is
//! asked for a while, longer each time. Must not know what is asked; the clock and chance are arguments.

use std::time::Duration;

use crate::back_off::back_off;

/// The slowest that throttling makes us: one question in so long.
pub const SLOWEST: Duration = Duration::from_secs(5);
/// With each answer a slowed pace gets faster by this part of itself: from one half back to the whole in about 11 answers.
const RECOVERY: u32 = 16;

/// See the module's text. Moments are times since any fixed one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Between two questions, as configured.
    least: Duration,
    /// Between two questions now.
    gap: Duration,
    /// Questions that may follow each other at once after a pause.
    burst: u32,
    /// Of these, how many may be asked, in millionths, at the moment `at`. Below nothing: more were asked than may be.
    saved: i64,
    at: Duration,
    /// Nothing is asked before, and nothing is saved up until then.
    hold: Duration,
    failures: u32,
}

/// One question, in what is saved up.
const ONE: i64 = 1_000_000;

impl Pace {
    /// At most `rate` questions in a second, and `burst` of them at once.
    pub fn new(rate: u32, burst: u32) -> Self {
        let least = Duration::from_secs(1) / rate.max(1);
        let burst = burst.max(1);
        Self {
            least,
            gap: least,
            burst,
            saved: i64::from(burst) * ONE,
            at: Duration::ZERO,
            hold: Duration::ZERO,
            failures: 0,
        }
    }

    fn saved(&self, now: Duration) -> i64 {
        let span = now.saturating_sub(self.at.max(self.hold)).as_nanos();
        let more = span * u128::from(ONE.unsigned_abs()) / self.gap.as_nanos().max(1);
        let more = i64::try_from(more).unwrap_or(i64::MAX);
        self.saved.saturating_add(more).min(i64::from(self.burst) * ONE)
    }

    /// When the next question may be asked; not after `now`: at once.
    pub fn next(&self, now: Duration) -> Duration {
        let from = now.max(self.hold);
        let lacking = u128::from(ONE.saturating_sub(self.saved(from)).max(0).unsigned_abs());
        // Rounded up: what is a little too early would be asked for again at once.
        let wait = (lacking * self.gap.as_nanos()).div_ceil(u128::from(ONE.unsigned_abs()));
        from + Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX))
    }

    /// A question is asked; of an answer with pages also those that were asked without asking here.
    pub fn take(&mut self, now: Duration) {
        self.saved = self.saved(now) - ONE;
        self.at = self.at.max(now);
    }

    /// A question got its answer.
    pub fn answered(&mut self) {
        self.failures = 0;
        self.gap = (self.gap - self.gap / RECOVERY).max(self.least);
    }

    /// The API says that it is asked too often. Of several questions that were under way then, the first one counts.
    pub fn throttled(&mut self, now: Duration, draw: u32) {
        if now >= self.hold {
            self.saved = self.saved(now);
            self.at = self.at.max(now);
            self.gap = (self.gap * 2).min(SLOWEST.max(self.least));
        }
        self.failed(now, draw);
    }

    /// Something is wrong that concerns every question: nothing is asked for a while, and then one question at first.
    pub fn failed(&mut self, now: Duration, draw: u32) {
        if now < self.hold {
            return;
        }
        self.saved = self.saved(now).min(ONE);
        self.at = self.at.max(now);
        self.hold = now + back_off(self.failures, draw);
        self.failures = self.failures.saturating_add(1);
    }

    /// Questions in a second, now.
    pub fn rate(&self) -> f64 {
        1.0 / self.gap.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::back_off::LONGEST;
    use proptest::prelude::*;

    /// What may happen between two questions.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        Answered,
        Throttled(u32),
        Failed(u32),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => Just(Event::Answered),
            1 => any::<u32>().prop_map(Event::Throttled),
            1 => any::<u32>().prop_map(Event::Failed),
        ]
    }

    fn apply(pace: &mut Pace, now: Duration, event: Event) {
        match event {
            Event::Answered => pace.answered(),
            Event::Throttled(draw) => pace.throttled(now, draw),
            Event::Failed(draw) => pace.failed(now, draw),
        }
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let mut pace = Pace::new(10, 3);
        let now = Duration::from_secs(100);
        for expected in [0, 0, 0, 100, 200] {
            let at = pace.next(now);
            assert_eq!(at.max(now) - now, Duration::from_millis(expected));
            pace.take(now);
        }
    }

    #[test]
    fn throttling_halves_and_answers_bring_back() {
        let mut pace = Pace::new(8, 1);
        let mut now = Duration::from_secs(1);
        pace.throttled(now, 0);
        pace.throttled(now, 0);
        assert!((pace.rate() - 4.0).abs() < 0.01, "those that were under way count once: {}", pace.rate());
        assert!(pace.next(now) >= now + Duration::from_millis(250));
        now = pace.next(now);
        pace.throttled(now, 0);
        assert!((pace.rate() - 2.0).abs() < 0.01);
        for _ in 0..100 {
            pace.answered();
        }
        assert!((pace.rate() - 8.0).abs() < 0.01, "{}", pace.rate());
    }

    proptest! {
        /// Whatever happens, no second holds more questions than the burst and the rate.
        #[test]
        fn the_quota_is_kept(rate in 1_u32..50, burst in 1_u32..20, events in prop::collection::vec((event(), 0_u64..400), 1..200)) {
            let mut pace = Pace::new(rate, burst);
            let mut now = Duration::from_secs(5);
            let mut asked: Vec<Duration> = Vec::new();
            for (event, wait) in events {
                now = now.max(pace.next(now));
                pace.take(now);
                asked.push(now);
                apply(&mut pace, now, event);
                now += Duration::from_millis(wait);
            }
            for (n, from) in asked.iter().enumerate() {
                let within = asked[n..].iter().filter(|at| **at < *from + Duration::from_secs(1)).count();
                prop_assert!(within <= (burst + rate) as usize, "{within} in the second from {from:?}");
            }
        }

        /// It never stops for good, and after enough answers it is as fast as configured.
        #[test]
        fn it_comes_back(rate in 1_u32..50, events in prop::collection::vec(event(), 0..100)) {
            let mut pace = Pace::new(rate, 4);
            let mut now = Duration::from_secs(5);
            for event in events {
                let at = pace.next(now);
                prop_assert!(at <= now + LONGEST + SLOWEST);
                now = now.max(at);
                pace.take(now);
                apply(&mut pace, now, event);
            }
            for _ in 0..1000 {
                pace.answered();
            }
            prop_assert_eq!(pace.gap, pace.least);
        }

        /// After a failure nothing is asked for at least half of the first back-off.
        #[test]
        fn a_failure_holds(draw: u32, rate in 1_u32..50) {
            let mut pace = Pace::new(rate, 10);
            let now = Duration::from_secs(5);
            pace.failed(now, draw);
            prop_assert!(pace.next(now) >= now + Duration::from_millis(250));
        }
    }
}
