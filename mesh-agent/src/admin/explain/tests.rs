//! Reading questions, and direct connections; whole explanations are asked for over the socket in `admin/tests.rs`.

use std::sync::Arc;

use mesh_core::{
    id::TaskId,
    policy::{Effect, Policy, Rule},
};

use super::*;
use crate::api::tests as sample;

fn to(text: &str) -> Option<(String, Option<u16>)> {
    parse_to(text).ok().map(|to| match to.host {
        Host::Ip(ip) => (ip.to_string(), to.port),
        Host::Name(name) => (name.into(), to.port),
    })
}

#[test]
fn destinations_are_read() {
    let check = |text: &str, host: &str, port| assert_eq!(to(text), Some((host.into(), port)), "{text}");
    check("world", "world", None);
    check("world.mesh:80", "world.mesh", Some(80));
    check("10.0.0.1", "10.0.0.1", None);
    check("10.0.0.1:5432", "10.0.0.1", Some(5432));
    check("[::ffff:10.0.0.1]:5432", "10.0.0.1", Some(5432));
    check("::1", "::1", None);
    check("[fd65::7]", "fd65::7", None);
    for wrong in ["", ":80", "world:", "world:0", "world:65536", "http://world/", "a b", "a:b:80"] {
        assert_eq!(to(wrong), None, "{wrong}");
    }
}

#[test]
fn queries_are_read() {
    let asked = Asked::parse("source=web&to=%5Bfd65%3A%3A7%5D%3A80").expect("a valid query");
    assert_eq!(asked, Asked { source: "web".into(), to: "[fd65::7]:80".into() });
    for wrong in ["", "source=web", "to=x", "source=&to=x", "source=a&source=b&to=x", "source=a&to=b&c=d"] {
        assert!(Asked::parse(wrong).is_err(), "{wrong}");
    }
}

/// What [`direct`] says about `web-1` and `world:80` when the task, the port and the policy are such; `Pass` for nothing.
fn directly(mode: NetworkMode, protocol: Protocol, policy: Policy) -> Verdict {
    let mut snapshot = sample::snapshot();
    let world = snapshot.services.get_mut("world").expect("there is one");
    Arc::make_mut(world).ports[0].protocol = protocol;
    snapshot.policy = Arc::new(policy);
    let source = Workload { mode, ..Workload::clone(snapshot.workloads.values().next().expect("there is one")) };
    let mut reasons = Vec::new();
    let verdict = direct(&snapshot, &source, ([240, 240, 0, 7], 80).into(), &mut reasons);
    assert_eq!(verdict.is_some(), !reasons.is_empty(), "a verdict has reasons, and nothing else has: {reasons:?}");
    verdict.unwrap_or(Verdict::Pass)
}

#[test]
fn a_byte_stream_to_a_neighbour_is_direct_where_the_policy_allows_it() {
    let rule = |effect| Rule {
        name: "rule".into(),
        effect,
        from: vec!["spiffe://demo.mesh/ns/demo/sa/web".into()],
        to: vec!["world".parse().expect("a valid name")],
    };
    let policy = |default, rules| Policy { default, rules };
    let open = || Policy::default();
    let expected =
        Verdict::Direct { service: "world".into(), port: 80, endpoints: vec![([172, 17, 0, 3], 8080).into()] };
    let is_direct = |mode, protocol, policy| {
        let verdict = directly(mode, protocol, policy);
        assert!(verdict == expected || verdict == Verdict::Pass, "{verdict:?}");
        verdict == expected
    };
    assert!(is_direct(NetworkMode::Bridge, Protocol::Tcp, open()));
    assert!(is_direct(NetworkMode::Host, Protocol::Tcp, open()));
    assert!(is_direct(NetworkMode::Bridge, Protocol::Tcp, policy(Effect::Deny, vec![rule(Effect::Allow)])));
    assert!(!is_direct(NetworkMode::Awsvpc, Protocol::Tcp, open()), "it cannot reach the bridge");
    assert!(!is_direct(NetworkMode::Bridge, Protocol::Http, open()), "requests have to be seen");
    assert!(!is_direct(NetworkMode::Bridge, Protocol::Auto, open()), "requests may have to be seen");
    assert!(!is_direct(NetworkMode::Bridge, Protocol::Tcp, policy(Effect::Deny, vec![])));
    assert!(!is_direct(NetworkMode::Bridge, Protocol::Tcp, policy(Effect::Allow, vec![rule(Effect::Deny)])));
}

#[test]
fn a_beginning_names_a_task_only_if_it_is_the_only_one() {
    let mut snapshot = sample::snapshot();
    let first = snapshot.workloads.values().next().expect("there is one").clone();
    for id in ["web-11", "web-12"] {
        let task: TaskId = id.parse().expect("a valid task id");
        snapshot.workloads.insert(task.clone(), Arc::new(Workload { task, ..Workload::clone(&first) }));
    }
    let find =
        |source: &str| find_source(&snapshot, source, &mut Vec::new()).map(|workload| workload.task.to_string()).ok();
    assert_eq!(find("web-1").as_deref(), Some("web-1"), "an id is not the beginning of others");
    assert_eq!(find("web-12").as_deref(), Some("web-12"));
    assert_eq!(find("web-"), None, "it could be any of three");
    assert_eq!(find("web").as_deref(), Some("web-1"), "a service means its first task");
    assert_eq!(find("nobody"), None);
}
