//! Which endpoint: power of two choices over peak-EWMA latency and requests in flight.
//!
//! Latency and failure figures follow linkerd2-proxy: default response time 30 ms, decay 10 s, ejection after 7
//! failures in a row for 1 s to 60 s with jitter, then one probe. Must not know where load figures are kept; the
//! caller hands them in.

use std::time::Duration;

/// The load of one endpoint, as its user measured it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Peak-EWMA estimate of the response time.
    pub rtt: Duration,
    /// When `rtt` was last updated; monotonic time since the agent started.
    pub at: Duration,
    pub in_flight: u32,
    /// Failures in a row; while `ejected_until` lies ahead, it is not chosen when another endpoint lives.
    pub failures: u32,
    pub ejected_until: Duration,
}

/// Response time of an endpoint that nobody has measured.
pub const DEFAULT_RTT: Duration = Duration::from_millis(30);
/// After this long without a sample, an estimate has lost all but 1/e of its weight.
const DECAY: Duration = Duration::from_secs(10);
/// No estimate is below this: requests in flight always count, also on an endpoint that has long been idle; and one late
/// answer of an endpoint that is as fast as the others keeps no traffic from it.
const FLOOR: Duration = Duration::from_millis(10);
/// Failures in a row that eject an endpoint.
pub const MAX_FAILURES: u32 = 7;
const BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(60);

impl Default for Load {
    /// Nothing is known.
    fn default() -> Self {
        Self { rtt: DEFAULT_RTT, at: Duration::ZERO, in_flight: 0, failures: 0, ejected_until: Duration::ZERO }
    }
}

impl Load {
    /// Nothing is known, as of `now`.
    pub fn new(now: Duration) -> Self {
        Self { at: now, ..Self::default() }
    }

    /// One more request, or connection, is on its way.
    #[must_use]
    pub fn started(self) -> Self {
        Self { in_flight: self.in_flight.saturating_add(1), ..self }
    }

    /// One of those in flight has ended, well or not.
    #[must_use]
    pub fn finished(self) -> Self {
        Self { in_flight: self.in_flight.saturating_sub(1), ..self }
    }

    /// A success after `rtt`. A slower one than the estimate replaces it, a faster one is blended in.
    #[must_use]
    pub fn observe(self, rtt: Duration, now: Duration) -> Self {
        let estimate = self.decayed(now);
        let rtt = if rtt >= estimate {
            rtt
        } else {
            let kept = kept(now.saturating_sub(self.at));
            self.rtt.mul_f64(kept).saturating_add(rtt.mul_f64(1.0 - kept))
        };
        Self { rtt, at: now.max(self.at), failures: 0, ejected_until: Duration::ZERO, ..self }
    }

    /// A failure. After [`MAX_FAILURES`] in a row the endpoint is ejected, each time longer; `draw` makes the jitter.
    #[must_use]
    pub fn fail(self, now: Duration, draw: u64) -> Self {
        let failures = self.failures.saturating_add(1);
        if failures < MAX_FAILURES {
            return Self { failures, ..self };
        }
        let doublings = (failures - MAX_FAILURES).min(6);
        let backoff = BACKOFF.saturating_mul(1 << doublings).min(MAX_BACKOFF);
        // Up to half of it on top, so that hosts do not probe together.
        let jitter = backoff.mul_f64(0.5 * fraction(draw));
        Self { failures, ejected_until: now.saturating_add(backoff).saturating_add(jitter), ..self }
    }

    /// It asks to be left alone: ejected for the shortest time. The registry will say more by then, and another task may
    /// have the address.
    #[must_use]
    pub fn leave(self, now: Duration) -> Self {
        let ejected_until = self.ejected_until.max(now.saturating_add(BACKOFF));
        Self { failures: self.failures.max(MAX_FAILURES), ejected_until, ..self }
    }

    /// Whether the endpoint is not to be chosen while another lives. When its time is over it is probed by one
    /// request at a time until one succeeds.
    pub fn is_ejected(&self, now: Duration) -> bool {
        self.failures >= MAX_FAILURES && (now < self.ejected_until || self.in_flight > 0)
    }

    /// What one more request on this endpoint is expected to take: the estimate as of `now`, times the requests in
    /// flight and the new one.
    pub fn cost(&self, now: Duration) -> Duration {
        self.decayed(now).max(FLOOR).saturating_mul(self.in_flight.saturating_add(1))
    }

    /// Whether it is to be preferred over `other`: it costs less, and between two that are equally busy, less than half.
    /// Smaller differences between idle endpoints are noise, and would keep all traffic from the slower one.
    pub fn beats(&self, other: &Self, now: Duration) -> bool {
        let (cost, others) = (self.cost(now), other.cost(now));
        if self.in_flight == other.in_flight { cost.saturating_mul(2) < others } else { cost < others }
    }

    fn decayed(&self, now: Duration) -> Duration {
        self.rtt.mul_f64(kept(now.saturating_sub(self.at)))
    }
}

/// The share of an estimate that is left after `age`.
fn kept(age: Duration) -> f64 {
    (-age.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

/// A number in 0..1 from 64 drawn bits.
fn fraction(draw: u64) -> f64 {
    let bits = u32::try_from(draw >> 32).unwrap_or(u32::MAX);
    f64::from(bits) / (f64::from(u32::MAX) + 1.0)
}

/// Which of the candidates, and what it was compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    pub chosen: usize,
    /// The other draw, where there was one.
    pub over: Option<usize>,
}

/// Picks among `0..len`: draws two by weight, and takes the first unless the second [`Load::beats`] it.
///
/// `weight` is `None` for who may not be chosen; weight 0 is chosen only when nobody else is left. An ejected one is
/// chosen only when all are ejected. `None` when nobody may be chosen. `load` is asked for the two that are drawn,
/// and for all only when one of those is ejected.
pub fn pick(
    len: usize,
    weight: impl Fn(usize) -> Option<u32>,
    load: impl Fn(usize) -> Load,
    now: Duration,
    draw: u64,
) -> Option<Picked> {
    let first = pair(len, &weight, draw)?;
    let ejected = |n: usize| load(n).is_ejected(now);
    let pair = if ejected(first.chosen) || first.over.is_some_and(ejected) {
        pair(len, |n| weight(n).filter(|_| !ejected(n)), draw).unwrap_or(first)
    } else {
        first
    };
    let Some(over) = pair.over else { return Some(pair) };
    if load(over).beats(&load(pair.chosen), now) {
        return Some(Picked { chosen: over, over: Some(pair.chosen) });
    }
    Some(pair)
}

/// Two different draws by weight.
fn pair(len: usize, weight: impl Fn(usize) -> Option<u32>, draw: u64) -> Option<Picked> {
    let (mut sum, mut count) = (0_u64, 0_u64);
    for weight in (0..len).filter_map(&weight) {
        sum += u64::from(weight);
        count += 1;
    }
    if count == 0 {
        return None;
    }
    let share = |n: usize| weight(n).map_or(0, |weight| if sum == 0 { 1 } else { u64::from(weight) });
    let sum = if sum == 0 { count } else { sum };
    let (high, low) = (draw >> 32, draw & 0xffff_ffff);
    let chosen = nth(len, share, scale(high, sum))?;
    let rest = sum - share(chosen);
    let others = |n: usize| if n == chosen { 0 } else { share(n) };
    let over = if rest == 0 { None } else { nth(len, others, scale(low, rest)) };
    Some(Picked { chosen, over })
}

/// A number in `0..sum` from 32 drawn bits.
fn scale(bits: u64, sum: u64) -> u64 {
    u64::try_from((u128::from(bits) * u128::from(sum)) >> 32).unwrap_or(0)
}

/// The one whose share of the line `0..sum` contains `point`.
fn nth(len: usize, share: impl Fn(usize) -> u64, mut point: u64) -> Option<usize> {
    for n in 0..len {
        let share = share(n);
        if point < share {
            return Some(n);
        }
        point -= share;
    }
    None
}

#[cfg(test)]
mod tests;
