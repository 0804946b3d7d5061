//! Properties of picking and of load figures. Fakes nothing: loads are values.

use proptest::prelude::*;

use super::*;

const MS: fn(u64) -> Duration = Duration::from_millis;

fn load() -> impl Strategy<Value = Load> {
    (0_u64..100_000, 0_u64..100_000, 0_u32..50, prop_oneof![3 => 0_u32..7, 1 => 7_u32..15], 0_u64..200_000).prop_map(
        |(rtt, at, in_flight, failures, until)| Load {
            rtt: MS(rtt),
            at: MS(at),
            in_flight,
            failures,
            ejected_until: MS(until),
        },
    )
}

fn candidates() -> impl Strategy<Value = Vec<(Option<u32>, Load)>> {
    let weight = prop_oneof![1 => Just(None), 1 => Just(Some(0)), 3 => (1_u32..1000).prop_map(Some)];
    prop::collection::vec((weight, load()), 0..8)
}

fn pick_of(all: &[(Option<u32>, Load)], now: Duration, draw: u64) -> Option<Picked> {
    pick(all.len(), |n| all[n].0, |n| all[n].1, now, draw)
}

proptest! {
    #[test]
    fn a_pick_is_a_live_member_and_never_the_worse(all in candidates(), now in 0_u64..300_000, draw in any::<u64>()) {
        let now = MS(now);
        let Some(picked) = pick_of(&all, now, draw) else {
            prop_assert!(all.iter().all(|(weight, _)| weight.is_none()));
            return Ok(());
        };
        let (weight, load) = all[picked.chosen];
        prop_assert!(weight.is_some());
        let live = |(weight, load): &(Option<u32>, Load)| weight.is_some() && !load.is_ejected(now);
        if load.is_ejected(now) {
            prop_assert!(!all.iter().any(live), "an ejected one, although another lives");
        } else if weight == Some(0) {
            prop_assert!(!all.iter().any(|c| live(c) && c.0 > Some(0)), "weight 0, although another is left");
        }
        if let Some(over) = picked.over {
            prop_assert_ne!(over, picked.chosen);
            prop_assert!(!all[over].1.beats(&load, now));
        }
    }

    #[test]
    fn updates_never_panic_and_keep_the_peak(load in load(), rtt in any::<u64>(), now in any::<u64>(), draw in any::<u64>()) {
        let (rtt, now) = (Duration::from_nanos(rtt), Duration::from_nanos(now));
        let seen = load.observe(rtt, now);
        prop_assert!(seen.rtt >= load.rtt.mul_f64(kept(now.saturating_sub(load.at))).min(rtt).mul_f64(0.999));
        prop_assert!(seen.rtt <= load.rtt.max(rtt).saturating_add(Duration::from_nanos(10)));
        prop_assert!(!seen.is_ejected(now));
        let _cost = seen.started().cost(now);
        let failed = load.fail(now, draw);
        prop_assert_eq!(failed.failures, load.failures + 1);
        if failed.failures >= MAX_FAILURES {
            let backoff = failed.ejected_until - now;
            prop_assert!((MS(1000)..=MS(90_000)).contains(&backoff), "{:?}", backoff);
            prop_assert!(failed.is_ejected(now));
        }
    }
}

#[test]
fn equal_endpoints_get_their_share() {
    let all = [(Some(100), Load::default()), (Some(300), Load::default()), (None, Load::default())];
    let mut counts = [0_u32; 3];
    for n in 0..4000_u64 {
        // Evenly spread draws in both halves.
        let draw = (n * (u64::from(u32::MAX) / 4000)) << 32 | n.wrapping_mul(2_654_435_761) & 0xffff_ffff;
        counts[pick_of(&all, Duration::ZERO, draw).expect("two candidates").chosen] += 1;
    }
    assert_eq!(counts[2], 0);
    assert!((950..=1050).contains(&counts[0]), "{counts:?}");
}

#[test]
fn the_estimate_peaks_at_once_and_decays_slowly() {
    let load = Load::new(MS(0)).observe(MS(5), MS(10_000));
    assert!(load.rtt < MS(15) && load.rtt > MS(5), "{:?}", load.rtt);
    assert_eq!(load.observe(MS(500), MS(10_000)).rtt, MS(500));
    let slow = Load { rtt: MS(1000), ..Load::new(MS(0)) };
    assert_eq!(slow.cost(MS(0)), MS(1000));
    let later = slow.cost(MS(10_000));
    assert!((MS(367)..MS(369)).contains(&later), "{later:?}");
    assert_eq!(slow.cost(Duration::from_secs(1_000_000)), FLOOR);
    assert_eq!(slow.started().started().cost(MS(0)), MS(3000));
}

#[test]
fn seven_failures_eject_and_one_probe_is_let_through() {
    let mut load = Load::new(MS(0));
    for _ in 0..6 {
        load = load.fail(MS(0), 0);
    }
    assert!(!load.is_ejected(MS(0)));
    load = load.fail(MS(0), 0);
    assert!(load.is_ejected(MS(999)));
    assert!(!load.is_ejected(MS(1000)), "probation");
    assert!(load.started().is_ejected(MS(1000)), "one probe at a time");
    let again = load.started().fail(MS(1000), 0).finished();
    assert_eq!(again.ejected_until, MS(3000), "twice as long");
    assert!(!again.observe(MS(1), MS(3000)).is_ejected(MS(3000)));
    let long = (0..100).fold(load, |load, _| load.fail(MS(0), 0));
    assert_eq!(long.ejected_until, MS(60_000));
}
