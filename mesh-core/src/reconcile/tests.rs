//! Convergence over a simulated host: any prefix of the actions and a new start lead to the same rest.

use proptest::prelude::*;

use super::*;
use crate::{
    arb::{self, World, bridge_task},
    task::Phase,
};

/// What an action does to a host on which it succeeds. It insists on what the agent relies on.
fn perform(armed: &mut Armed, action: &Action) {
    match action {
        Action::ArmNamespace { task, netns, workload, mode } => {
            assert!(armed.namespaces.values().all(|n| n.netns != *netns), "one task per namespace");
            let namespace = ArmedNamespace { netns: netns.clone(), workload: *workload, mode: *mode };
            assert_eq!(armed.namespaces.insert(task.clone(), namespace), None, "disarmed first");
        }
        Action::DisarmNamespace { task } => assert!(armed.namespaces.remove(task).is_some()),
        Action::ArmHost => {
            assert!(!armed.host);
            armed.host = true;
        }
        Action::DisarmHost => {
            assert!(armed.host && armed.cgroups.is_empty());
            armed.host = false;
        }
        Action::ArmCgroup { cgroup, workload } => {
            assert!(armed.host, "nobody would listen");
            assert_eq!(armed.cgroups.insert(cgroup.clone(), *workload), None, "disarmed first");
        }
        Action::DisarmCgroup { cgroup } => assert!(armed.cgroups.remove(cgroup).is_some()),
    }
}

/// Runs to rest; every action succeeds.
fn settle(world: &World, snapshot: &Snapshot, mut armed: Armed, gone: &BTreeSet<PathBuf>) -> Armed {
    for action in reconcile(&world.tasks, snapshot, &armed, gone) {
        perform(&mut armed, &action);
    }
    assert_eq!(reconcile(&world.tasks, snapshot, &armed, gone), [], "at rest after one round");
    armed
}

fn none() -> BTreeSet<PathBuf> {
    BTreeSet::new()
}

proptest! {
    #[test]
    fn it_converges_from_wherever_it_was_stopped(
        worlds in prop::collection::vec(arb::world(), 1..4), stop in any::<prop::sample::Index>(),
    ) {
        let (mut snapshot, mut armed) = (Snapshot::default(), Armed::default());
        for world in &worlds {
            snapshot = world.after(&snapshot);
            let actions = reconcile(&world.tasks, &snapshot, &armed, &none());
            let mut halfway = armed.clone();
            for action in &actions[..stop.index(actions.len() + 1)] {
                perform(&mut halfway, action);
            }
            let resumed = settle(world, &snapshot, halfway, &none());
            armed = settle(world, &snapshot, armed, &none());
            prop_assert_eq!(&resumed, &armed);
            // A restarted agent holds nothing, and arms the same.
            prop_assert_eq!(&settle(world, &snapshot, Armed::default(), &none()), &armed);
        }
    }

    #[test]
    fn exactly_the_enrolled_are_armed(world in arb::world()) {
        let snapshot = world.snapshot();
        let armed = settle(&world, &snapshot, Armed::default(), &none());
        for task in &world.tasks {
            let workload = snapshot.workloads.get(&task.id);
            let namespace = armed.namespaces.get(&task.id);
            let expected = workload.filter(|_| has_own_namespace(task.mode)).and(task.netns.as_ref());
            prop_assert_eq!(namespace.map(|n| &n.netns), expected);
            prop_assert!(namespace.is_none() || namespace.map(|n| n.workload) == workload.map(|w| w.number));
            for cgroup in task.containers.iter().filter_map(|c| c.cgroup.as_ref()) {
                let expected = workload.filter(|_| task.mode == NetworkMode::Host).map(|w| w.number);
                prop_assert_eq!(armed.cgroups.get(cgroup).copied(), expected);
            }
        }
        let host = world.tasks.iter().any(|t| t.mode == NetworkMode::Host && snapshot.workloads.contains_key(&t.id));
        prop_assert_eq!(armed.host, host);
    }

    #[test]
    fn a_failed_action_is_asked_for_again_and_a_gone_one_is_not(world in arb::world(), n in any::<prop::sample::Index>()) {
        let snapshot = world.snapshot();
        let actions = reconcile(&world.tasks, &snapshot, &Armed::default(), &none());
        if actions.is_empty() {
            return Ok(());
        }
        let failed = n.index(actions.len());
        let mut armed = Armed::default();
        for (_, action) in actions.iter().enumerate().filter(|(n, _)| *n != failed) {
            if !matches!((action, &actions[failed]), (Action::ArmCgroup { .. }, Action::ArmHost)) {
                perform(&mut armed, action);
            }
        }
        prop_assert!(reconcile(&world.tasks, &snapshot, &armed, &none()).contains(&actions[failed]));
        let gone = match &actions[failed] {
            Action::ArmNamespace { netns: path, .. } | Action::ArmCgroup { cgroup: path, .. } => path.clone(),
            Action::DisarmNamespace { .. } | Action::DisarmCgroup { .. } | Action::ArmHost | Action::DisarmHost => return Ok(()),
        };
        prop_assert_eq!(reconcile(&world.tasks, &snapshot, &armed, &BTreeSet::from([gone])), []);
    }
}

fn check(tasks: Vec<Task>, armed: &Armed, expected: &[&str]) {
    let world = World { tasks, ..World::default() };
    let actions = reconcile(&world.tasks, &world.snapshot(), armed, &none());
    let shown: Vec<_> = actions
        .iter()
        .map(|action| match action {
            Action::ArmNamespace { task, netns, .. } => format!("arm {task} {}", netns.display()),
            Action::DisarmNamespace { task } => format!("disarm {task}"),
            Action::ArmHost => "arm host".into(),
            Action::DisarmHost => "disarm host".into(),
            Action::ArmCgroup { cgroup, .. } => format!("arm {}", cgroup.display()),
            Action::DisarmCgroup { cgroup } => format!("disarm {}", cgroup.display()),
        })
        .collect();
    assert_eq!(shown, expected);
}

#[test]
fn the_life_of_a_task() {
    let task = bridge_task("t", "web", "172.17.0.2", &[80]);
    let created = Task { phase: Phase::Created, address: None, ..task.clone() };
    check(vec![created], &Armed::default(), &["arm t /netns/t"]);
    let world = World { tasks: vec![task.clone()], ..World::default() };
    let armed = settle(&world, &world.snapshot(), Armed::default(), &none());
    check(vec![Task { phase: Phase::Stopping, ..task.clone() }], &armed, &[]);
    check(vec![Task { netns: Some("/netns/new".into()), ..task.clone() }], &armed, &["disarm t", "arm t /netns/new"]);
    check(vec![Task { family: "excluded".into(), ..task.clone() }], &armed, &["disarm t"]);
    check(vec![Task { netns: None, ..task.clone() }], &armed, &["disarm t"]);
    check(vec![], &armed, &["disarm t"]);
    // Another task shows the same namespace: whoever is armed keeps it, whatever the order of names.
    let other = Task { id: "a".parse().expect("valid"), ..task.clone() };
    check(vec![other.clone(), task], &Armed::default(), &["arm a /netns/t"]);
    check(vec![other], &armed, &["disarm t", "arm a /netns/t"]);
}

#[test]
fn host_mode() {
    let host = |id: &str| Task {
        mode: NetworkMode::Host,
        netns: None,
        address: None,
        ..bridge_task(id, "web", "172.17.0.2", &[80])
    };
    let armed_by = |tasks: Vec<Task>| {
        let world = World { tasks, ..World::default() };
        settle(&world, &world.snapshot(), Armed::default(), &none())
    };
    check(
        vec![host("a"), host("b")],
        &Armed::default(),
        &["arm host", "arm /ecstasks.slice/a", "arm /ecstasks.slice/b"],
    );
    let armed = armed_by(vec![host("a"), host("b")]);
    check(vec![host("a")], &armed, &["disarm /ecstasks.slice/b"]);
    check(vec![], &armed, &["disarm /ecstasks.slice/a", "disarm /ecstasks.slice/b", "disarm host"]);
}

#[test]
fn who_holds_a_shared_namespace_keeps_it() {
    let task = bridge_task("t", "web", "172.17.0.2", &[80]);
    let world = World { tasks: vec![task.clone()], ..World::default() };
    let first = world.snapshot();
    let armed = settle(&world, &first, Armed::default(), &none());
    let both =
        World { tasks: vec![Task { id: "a".parse().expect("valid"), ..task.clone() }, task], ..World::default() };
    assert_eq!(reconcile(&both.tasks, &both.after(&first), &armed, &none()), []);
}
