//! When a certificate is renewed, retried, given up.
//!
//! Must not know keys, certificates or the issuer; only their times.

use std::time::{Duration, SystemTime};

/// What to do about a certificate now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Renew at once.
    Renew,
    /// Look again after this long.
    Wait(Duration),
}

/// Decides when to renew: at half-life with ±10 % jitter; after `failures` attempts in a row back off from 0.5 s to
/// 150 s, never beyond the expiry. `draw` is uniform over all of u64.
///
/// To be asked once after each issuance and after each failed attempt; then attempt when the wait is over. A clock
/// that was set back before `not_before`, or a lifetime that is none, renews at once.
pub fn next(not_before: SystemTime, not_after: SystemTime, now: SystemTime, failures: u32, draw: u64) -> Next {
    if failures > 0 {
        return Next::Wait(backoff(failures, not_after.duration_since(now).ok(), draw));
    }
    let (Ok(lifetime), Ok(age)) = (not_after.duration_since(not_before), now.duration_since(not_before)) else {
        return Next::Renew;
    };
    let due = (lifetime / 2).mul_f64(0.9 + 0.2 * fraction(draw));
    match due.checked_sub(age) {
        Some(wait) if !wait.is_zero() => Next::Wait(wait),
        _ => Next::Renew,
    }
}

const SHORTEST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(150);

/// Doubles from 0.5 s, less up to a fifth of it so that hosts do not ask the issuer together. While the certificate
/// is still valid, at most half of what is left of it is waited, so that the last attempts come before its end.
fn backoff(failures: u32, left: Option<Duration>, draw: u64) -> Duration {
    let doubled = SHORTEST.saturating_mul(1 << (failures - 1).min(9)).min(LONGEST);
    let wait = doubled.mul_f64(1.0 - 0.2 * fraction(draw)).max(SHORTEST);
    match left {
        Some(left) => wait.min((left / 2).max(SHORTEST)).min(left),
        None => wait,
    }
}

/// A number in 0..1 from 64 drawn bits.
fn fraction(draw: u64) -> f64 {
    let bits = u32::try_from(draw >> 32).unwrap_or(u32::MAX);
    f64::from(bits) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    proptest! {
        #[test]
        fn nothing_is_planned_after_the_expiry(
            start in 0_u64..10_000, life in 0_u64..200_000, now in 0_u64..300_000, failures in 0_u32..50, draw in any::<u64>(),
        ) {
            let (not_before, not_after, now) = (at(start), at(start + life), at(now));
            match next(not_before, not_after, now, failures, draw) {
                Next::Renew => prop_assert_eq!(failures, 0, "after a failure there is always a pause"),
                Next::Wait(wait) if now < not_after => prop_assert!(now + wait <= not_after),
                Next::Wait(wait) => prop_assert!(failures > 0 && wait <= LONGEST && wait >= SHORTEST),
            }
        }

        #[test]
        fn jitter_stays_in_its_window(life in 2_u64..200_000, draw in any::<u64>()) {
            let half = Duration::from_secs(life) / 2;
            match next(at(5), at(5 + life), at(5), 0, draw) {
                Next::Wait(wait) => prop_assert!(wait >= half.mul_f64(0.899) && wait <= half.mul_f64(1.101), "{:?}", wait),
                Next::Renew => prop_assert!(false, "fresh"),
            }
        }

        #[test]
        fn a_clock_jump_at_worst_renews_at_once(now in 0_u64..1_000_000, draw in any::<u64>()) {
            let (not_before, not_after) = (at(500_000), at(500_100));
            match next(not_before, not_after, at(now), 0, draw) {
                Next::Renew => prop_assert!(!(500_000..500_045).contains(&now)),
                Next::Wait(wait) => prop_assert!((500_000..=500_055).contains(&now) && wait <= Duration::from_secs(55)),
            }
        }
    }

    #[test]
    fn failures_back_off() {
        let far = at(10_000_000);
        let wait = |failures| match next(at(0), far, at(5_000_000), failures, 0) {
            Next::Wait(wait) => wait.as_millis(),
            Next::Renew => 0,
        };
        let waits: Vec<_> = (0..12).map(wait).collect();
        assert_eq!(waits, [0, 500, 1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000, 150_000, 150_000]);
        assert_eq!(next(at(0), at(100), at(80), 30, 0), Next::Wait(Duration::from_secs(10)), "half of what is left");
        assert_eq!(next(at(0), at(100), at(100), 30, 0), Next::Wait(Duration::ZERO));
        assert_eq!(next(at(0), at(100), at(101), 30, 0), Next::Wait(LONGEST));
    }
}
