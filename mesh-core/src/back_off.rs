//! How long to wait: longer after each failure, and never in step with others.
//!
//! Must not know what is waited for. Chance is an argument.

use std::time::Duration;

/// Longest wait after failures.
pub const LONGEST: Duration = Duration::from_secs(30);
const FIRST: Duration = Duration::from_millis(500);

/// Between half and all of a span that doubles with each failure. `draw` is any number, drawn evenly.
pub fn back_off(failures: u32, draw: u32) -> Duration {
    let whole = FIRST.saturating_mul(2_u32.saturating_pow(failures.min(16))).min(LONGEST);
    whole / 2 + spread(whole / 2, draw)
}

/// A part of `whole`: none for the lowest `draw`, nearly all for the highest.
pub fn spread(whole: Duration, draw: u32) -> Duration {
    let nanos = (whole.as_nanos() * u128::from(draw)) >> 32;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn waits_grow_and_stay_within_bounds(failures in 0_u32..100, draw: u32) {
            let wait = back_off(failures, draw);
            prop_assert!(wait >= FIRST / 2 && wait <= LONGEST);
            prop_assert!(back_off(failures + 1, draw) >= wait);
            prop_assert!(back_off(failures, u32::MAX) <= back_off(failures, 0) * 2);
        }
    }
}
