//! When a port is ready, whatever its probes come to.

use proptest::prelude::*;

use super::*;
use crate::arb::bridge_task;

fn settings(check: Check, successes: u32, failures: u32) -> Settings {
    Settings { check, successes, failures, ..Settings::default() }
}

fn run(presumed: bool, outcomes: &[bool], settings: &Settings) -> Vec<Standing> {
    let mut standing = Standing::begin(presumed, Duration::ZERO);
    let mut all = vec![standing];
    for passed in outcomes {
        let Some(now) = standing.due() else { break };
        standing = standing.probed(*passed, now, settings);
        all.push(standing);
    }
    all
}

/// The same by counting: ready or not after each outcome.
fn counted(presumed: bool, outcomes: &[bool], settings: &Settings) -> Vec<bool> {
    let (mut ready, mut first) = (presumed, presumed);
    let mut streak = 0;
    let mut all = vec![ready];
    for passed in outcomes {
        streak = if *passed == ready { 0 } else { streak + 1 };
        let needed = match (first, ready) {
            (true, _) => 1,
            (false, true) => settings.failures,
            (false, false) => settings.successes,
        };
        if streak >= needed {
            (ready, streak) = (!ready, 0);
        }
        first = false;
        all.push(ready);
    }
    all
}

proptest! {
    #[test]
    fn thresholds_are_kept(
        presumed: bool,
        outcomes in prop::collection::vec(any::<bool>(), 0..40),
        (successes, failures) in (1_u32..4, 1_u32..4),
    ) {
        let settings = settings(Check::Tcp, successes, failures);
        let ready: Vec<_> = run(presumed, &outcomes, &settings).iter().map(Standing::is_ready).collect();
        prop_assert_eq!(ready, counted(presumed, &outcomes, &settings));
    }

    #[test]
    fn a_probe_is_always_due_later_but_not_much(
        presumed: bool,
        outcomes in prop::collection::vec(any::<bool>(), 1..40),
    ) {
        let settings = settings(Check::Tcp, 2, 2);
        for pair in run(presumed, &outcomes, &settings).windows(2) {
            let (before, after) = (pair[0].due().expect("goes on"), pair[1].due().expect("goes on"));
            prop_assert!(after >= before + BRISK);
            prop_assert!(after <= before + settings.interval);
        }
    }

    #[test]
    fn who_need_only_listen_is_not_asked_again(failed in 0_usize..50, presumed: bool) {
        let outcomes: Vec<_> = std::iter::repeat_n(false, failed).chain([true]).collect();
        let all = run(presumed, &outcomes, &settings(Check::Listen, 1, 3));
        let last = all.last().expect("there is one");
        prop_assert!(last.is_ready() && last.due().is_none());
        prop_assert_eq!(all.len(), failed + 2);
        // Found at most a twentieth later than it could have been, and 5 ms.
        let (first, due) = (all[0].since(), all[failed].due().expect("not ready yet"));
        let before = all[..failed].last().map_or(first, |it| it.due().expect("not ready yet"));
        prop_assert!(due - before <= (before - first) / PART + BRISK);
    }
}

#[test]
fn a_slow_start_is_not_asked_often() {
    let settings = settings(Check::Listen, 1, 3);
    let all = run(false, &[false; 400], &settings);
    let after = |limit: u64| all.iter().filter(|it| it.due() < Some(Duration::from_secs(limit))).count();
    assert!(after(1) < 100 && after(60) < 250, "{} {}", after(1), after(60));
}

#[test]
fn a_container_that_was_started_again_is_not_ready() {
    let task = bridge_task("t1", "web", "172.17.0.2", &[80]);
    let passed = [((task.id.clone(), 80), Incarnation::of(&task, 80))].into();
    let gate = Gate::Probed(Arc::new(passed));
    assert!(gate.admits(&task, 80) && !gate.admits(&task, 81));
    let mut again = task.clone();
    again.containers[0].pid = Some(2);
    assert!(!gate.admits(&again, 80) && Gate::Open.admits(&again, 80));
    // Another container of the task is none of the port's business.
    let mut more = task;
    more.containers.push(Container { exposed: vec![9000], published: Vec::new(), ..again.containers[0].clone() });
    assert!(gate.admits(&more, 80));
}

#[test]
fn why_a_port_is_not_ready() {
    let mut task = bridge_task("t1", "web", "172.17.0.2", &[80]);
    let (now, settings) = (Duration::from_secs(5), Settings::default());
    let begun = Standing::begin(false, now);
    let refused = Some("no connection");
    let ready = begun.probed(true, now, &settings);
    let failing = (0..settings.failures).fold(ready, |standing, _| standing.probed(false, now, &settings));
    let said = |task: &Task, probe| unready(task, probe).unwrap_or_default();
    assert_eq!(said(&task, None), "");
    assert_eq!(said(&task, Some((begun, None))), "the first probe has not ended yet");
    assert_eq!(said(&task, Some((begun, refused))), "it has not been ready yet: no connection");
    assert_eq!(said(&task, Some((ready, refused))), "", "one that fails now and then is ready");
    assert_eq!(said(&task, Some((failing, refused))), "it was ready: no connection");
    task.containers[0].health = Some(ContainerHealth::Unhealthy);
    assert_eq!(said(&task, Some((ready, None))), "docker calls the container web unhealthy");
}
