//! A Cloud Map that does everything late, or not at all, and that the ledger brings it to what is wanted.

use proptest::prelude::*;

use super::*;
use crate::aws::pace::Pace;

const INTERVAL: Duration = Duration::from_secs(60);
const OURS: &str = "ecs-mesh@10.90.1.10";

fn key(name: &str, id: &str) -> Key {
    (name.into(), id.to_owned())
}

fn attributes(owner: &str, version: u8) -> BTreeMap<String, String> {
    [(meta::OWNER.to_owned(), owner.to_owned()), ("version".to_owned(), version.to_string())].into()
}

/// What may come of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Luck {
    Good,
    Throttled,
    /// Carried out, but the answer is lost.
    Lost,
    Denied,
}

/// Cloud Map, as seen through an API that is late.
#[derive(Clone, Debug, Default)]
struct Cloud {
    services: BTreeMap<String, Service>,
    instances: BTreeMap<Key, (BTreeMap<String, String>, bool)>,
    /// What was taken and is not carried out yet, by when that is.
    late: Vec<(Duration, Call)>,
}

impl Cloud {
    fn with(services: &[(&str, bool)]) -> Self {
        let service = |(name, health): &(&str, bool)| {
            ((*name).to_owned(), Service { id: format!("srv-{name}"), health: *health })
        };
        Self { services: services.iter().map(service).collect(), ..Self::default() }
    }

    fn pass(&mut self, now: Duration) {
        let (done, late) = std::mem::take(&mut self.late).into_iter().partition(|(at, _)| *at <= now);
        self.late = late;
        let mut done: Vec<(Duration, Call)> = done;
        done.sort_by_key(|(at, _)| *at);
        for (_, call) in done {
            match call {
                Call::Register(key, mut attributes) => {
                    let usable = attributes.remove(attribute::FIRST_HEALTH).is_none();
                    self.instances.insert(key, (attributes, usable));
                }
                Call::Deregister(key) => drop(self.instances.remove(&key)),
                Call::Tell(key, to) => {
                    if let Some((_, usable)) = self.instances.get_mut(&key) {
                        *usable = to;
                    }
                }
                Call::List | Call::Look(_) => {}
            }
        }
    }

    /// Whether a request about the same instance is not carried out yet.
    fn is_busy(&self, key: &Key) -> bool {
        self.late.iter().any(|(_, late)| match late {
            Call::Register(of, _) | Call::Deregister(of) => of == key,
            Call::List | Call::Look(_) | Call::Tell(..) => false,
        })
    }
}

/// An agent at work.
struct Run {
    cloud: Cloud,
    ledger: Ledger,
    pace: Pace,
    now: Duration,
    calls: Vec<(Duration, Call)>,
}

impl Run {
    fn new(cloud: Cloud) -> Self {
        let ledger = Ledger::new(OURS.into(), INTERVAL);
        Self { cloud, ledger, pace: Pace::new(5, 5), now: Duration::from_secs(1000), calls: Vec::new() }
    }

    /// Goes on until `until`, with luck as drawn.
    fn go(&mut self, until: Duration, mut luck: impl FnMut() -> (Luck, u32)) {
        while let Some(due) = self.ledger.next() {
            let at = due.max(self.pace.next(self.now)).max(self.now);
            if at > until {
                break;
            }
            self.now = at;
            self.cloud.pass(at);
            let Some(call) = self.ledger.take(at) else { panic!("due, and nothing to do") };
            self.pace.take(at);
            self.calls.push((at, call.clone()));
            let (luck, draw) = luck();
            self.answer(&call, luck, draw);
        }
        self.now = until;
        self.cloud.pass(until);
    }

    fn answer(&mut self, call: &Call, luck: Luck, draw: u32) {
        let (at, ledger) = (self.now, &mut self.ledger);
        let own = Failure { general: false, heard: false };
        match luck {
            Luck::Throttled => {
                self.pace.throttled(at, draw);
                return ledger.failed(call, Failure { general: true, heard: false }, at, draw);
            }
            Luck::Denied => return ledger.failed(call, own, at, draw),
            Luck::Good | Luck::Lost => {}
        }
        let late = Duration::from_millis(u64::from(draw) % 20_000);
        match call {
            Call::Register(key, _) | Call::Deregister(key) if self.cloud.is_busy(key) => {
                return ledger.failed(call, own, at, draw);
            }
            Call::Register(..) | Call::Deregister(_) => self.cloud.late.push((at + late, call.clone())),
            Call::Tell(..) => self.cloud.late.push((at + Duration::from_secs(30), call.clone())),
            Call::List | Call::Look(_) => {}
        }
        if luck == Luck::Lost {
            self.pace.failed(at, draw);
            return ledger.failed(call, Failure { general: true, heard: true }, at, draw);
        }
        self.pace.answered();
        match call {
            Call::List => ledger.listed(self.cloud.services.clone(), at),
            Call::Look(name) => {
                let of = self.cloud.instances.iter().filter(|((of, _), _)| of == name);
                let instance = |((_, id), (attributes, usable)): (&Key, &(BTreeMap<String, String>, bool))| Instance {
                    id: id.clone(),
                    health: if *usable { Said::Healthy } else { Said::Unhealthy },
                    attributes: attributes.clone(),
                };
                ledger.looked(name, of.map(instance).collect(), at);
            }
            Call::Register(key, attributes) => ledger.registered(key, attributes.clone(), None, at),
            Call::Deregister(key) => ledger.deregistered(key, at),
            Call::Tell(key, usable) => ledger.told(key, *usable, at),
        }
    }

    fn well(&mut self, span: u64) {
        let until = self.now + Duration::from_secs(span);
        self.go(until, || (Luck::Good, 7));
    }

    /// `service id version[ ill]` of everything that is there.
    fn there(&self) -> Vec<String> {
        let one = |((name, id), (attributes, usable)): (&Key, &(BTreeMap<String, String>, bool))| {
            let ill = if *usable { "" } else { " ill" };
            format!("{name} {id} {}{ill}", attributes["version"])
        };
        self.cloud.instances.iter().map(one).collect()
    }
}

fn wanted(all: &[(&str, &str, u8, bool)]) -> BTreeMap<Key, Wanted> {
    let one = |(name, id, version, ready): &(&str, &str, u8, bool)| {
        (key(name, id), Wanted { attributes: attributes(OURS, *version), ready: *ready })
    };
    all.iter().map(one).collect()
}

#[test]
fn it_comes_falls_ill_and_goes() {
    let mut run = Run::new(Cloud::with(&[("a", true), ("b", false)]));
    run.ledger.want(wanted(&[("a", "1", 1, false), ("b", "2", 1, true), ("c", "3", 1, true)]));
    run.well(5);
    assert_eq!(run.there(), ["b 2 1"], "what was never ready is nobody's to see");
    assert_eq!(run.ledger.missing().into_iter().collect::<Vec<_>>(), ["c".into()]);
    run.ledger.want(wanted(&[("a", "1", 1, true), ("b", "2", 1, true)]));
    run.well(5);
    assert_eq!(run.there(), ["a 1 1", "b 2 1"]);
    assert!(run.ledger.is_settled() && run.ledger.count() == 2);
    run.ledger.want(wanted(&[("a", "1", 1, false), ("b", "2", 1, false)]));
    run.well(35);
    assert_eq!(run.there(), ["a 1 1 ill"], "where health cannot be told, the instance goes");
    run.ledger.want(wanted(&[("a", "1", 2, false)]));
    run.well(35);
    assert_eq!(run.there(), ["a 1 2 ill"], "made anew, and ill from the beginning");
    run.ledger.leave();
    assert!(!run.ledger.is_gone());
    run.well(5);
    assert!(run.there().is_empty() && run.ledger.is_gone());
}

#[test]
fn what_a_crash_left_goes_and_what_others_have_stays() {
    let mut cloud = Cloud::with(&[("a", true), ("old", true)]);
    for (name, id, owner) in [("old", "left", OURS), ("old", "theirs", "ecs-mesh@10.90.1.11"), ("old", "ecs", "")] {
        cloud.instances.insert(key(name, id), (attributes(owner, 1), true));
    }
    // The same again, and said to be ill by the one that crashed.
    cloud.instances.insert(key("a", "same"), (attributes(OURS, 1), false));
    let mut run = Run::new(cloud);
    run.ledger.want(wanted(&[("a", "same", 1, true)]));
    run.well(40);
    assert_eq!(run.there(), ["a same 1", "old ecs 1", "old theirs 1"]);
    assert!(!run.calls.iter().any(|(_, call)| matches!(call, Call::Register(..))), "{:?}", run.calls);
    // Removed by somebody else: it returns.
    run.cloud.instances.remove(&key("a", "same"));
    run.well(70);
    assert_eq!(run.there(), ["a same 1", "old ecs 1", "old theirs 1"]);
}

#[test]
fn what_was_taken_and_never_came_is_told() {
    let mut run = Run::new(Cloud::with(&[("a", false)]));
    run.ledger.want(wanted(&[("a", "1", 1, true)]));
    run.ledger.listed(run.cloud.services.clone(), run.now);
    run.well(1);
    let again = run.now + Duration::from_secs(120);
    run.ledger.registered(&key("a", "1"), attributes(OURS, 1), Some("op-1".into()), run.now);
    let lost = run.ledger.looked(&"a".into(), Vec::new(), run.now);
    assert!(lost.is_empty(), "it may still come");
    assert_eq!(run.ledger.looked(&"a".into(), Vec::new(), again), [("1".to_owned(), "op-1".to_owned())]);
    assert_eq!(run.ledger.count(), 0);
}

#[test]
fn what_comes_late_is_asked_for_once() {
    let mut run = Run::new(Cloud::with(&[("a", true)]));
    let (begun, late) = (run.now, || (Luck::Good, 19_000));
    run.ledger.want(wanted(&[("a", "1", 1, true)]));
    run.go(begun + Duration::from_secs(50), late);
    // It looks again ten seconds after this, when Cloud Map does not show it yet.
    run.ledger.want(wanted(&[("a", "1", 1, true), ("a", "2", 1, true)]));
    run.go(begun + Duration::from_secs(200), late);
    let registered = run.calls.iter().filter(|(_, call)| matches!(call, Call::Register(..))).count();
    assert_eq!((run.there().len(), registered), (2, 2), "{:?}", run.calls);
}

/// What is wanted of three services, of which one is not there; and whether it is ready.
fn wants() -> impl Strategy<Value = BTreeMap<Key, Wanted>> {
    let one = (0_usize..4, 0_u8..4, 0_u8..3, any::<bool>());
    prop::collection::vec(one, 0..6).prop_map(|all| {
        let one = |(name, id, version, ready): (usize, u8, u8, bool)| {
            let name = ["a", "b", "c", "nowhere"][name];
            (key(name, &id.to_string()), Wanted { attributes: attributes(OURS, version), ready })
        };
        all.into_iter().map(one).collect()
    })
}

fn there() -> impl Strategy<Value = BTreeMap<Key, (BTreeMap<String, String>, bool)>> {
    let one = (0_usize..3, 0_u8..6, 0_u8..3, any::<bool>(), any::<bool>());
    prop::collection::vec(one, 0..8).prop_map(|all| {
        let one = |(name, id, version, ours, usable): (usize, u8, u8, bool, bool)| {
            let owner = if ours { OURS } else { "somebody" };
            let id = if ours { id.to_string() } else { format!("other-{id}") };
            (key(["a", "b", "c"][name], &id), (attributes(owner, version), usable || !ours))
        };
        all.into_iter().map(one).collect()
    })
}

fn luck() -> impl Strategy<Value = (Luck, u32)> {
    let luck = prop_oneof![
        4 => Just(Luck::Good),
        1 => Just(Luck::Throttled),
        1 => Just(Luck::Lost),
        1 => Just(Luck::Denied),
    ];
    (luck, any::<u32>())
}

proptest! {
    /// Whatever was there, was wanted on the way, and went wrong: in the end it is what is wanted, nothing of others was
    /// touched, and nothing more is asked than whether it is still so. No second holds more requests than it may.
    #[test]
    fn it_converges_and_rests(
        there in there(),
        phases in prop::collection::vec((wants(), prop::collection::vec(luck(), 1..12), 1_u64..90), 1..5),
    ) {
        let mut cloud = Cloud::with(&[("a", true), ("b", false), ("c", true)]);
        cloud.instances = there;
        let others = |cloud: &Cloud| {
            let others = cloud.instances.iter().filter(|(_, (attributes, _))| attributes[meta::OWNER] != OURS);
            others.map(|(key, it)| (key.clone(), it.clone())).collect::<Vec<_>>()
        };
        let before = others(&cloud);
        let mut run = Run::new(cloud);
        let mut last = BTreeMap::new();
        for (wanted, luck, span) in phases {
            run.ledger.want(wanted.clone());
            let mut luck = luck.into_iter().cycle();
            run.go(run.now + Duration::from_secs(span), || luck.next().unwrap_or((Luck::Good, 0)));
            last = wanted;
        }
        run.well(300);
        for (key, wanted) in &last {
            let is = run.cloud.instances.get(key);
            let health = run.cloud.services.get(&*key.0).map(|service| service.health);
            match (health, is) {
                (None, is) => prop_assert!(is.is_none()),
                (Some(_), Some((attributes, usable))) if wanted.ready => {
                    prop_assert_eq!(attributes, &wanted.attributes);
                    prop_assert!(*usable || health == Some(false), "{:?}", key);
                }
                (Some(_), None) => prop_assert!(!wanted.ready, "{:?} is not there", key),
                (Some(health), Some((_, usable))) => prop_assert!(health && !usable, "{:?} is not ready", key),
            }
        }
        let left = run.cloud.instances.iter().filter(|(_, (attributes, _))| attributes[meta::OWNER] == OURS);
        for (key, _) in left {
            prop_assert!(last.contains_key(key), "{:?} is left", key);
        }
        prop_assert_eq!(others(&run.cloud), before.clone());
        prop_assert!(run.ledger.is_settled());
        for (n, (from, _)) in run.calls.iter().enumerate() {
            let within = run.calls[n..].iter().filter(|(at, _)| *at < *from + Duration::from_secs(1)).count();
            prop_assert!(within <= 10, "{} requests within a second", within);
        }
        let done = run.calls.len();
        run.well(600);
        for (_, call) in &run.calls[done..] {
            prop_assert!(matches!(call, Call::List | Call::Look(_)), "{:?} at rest", call);
        }
        prop_assert!(run.calls.len() - done <= 4 * 11, "{} questions in ten minutes", run.calls.len() - done);
        // And the end.
        run.ledger.leave();
        run.well(60);
        prop_assert!(run.ledger.is_gone());
        prop_assert!(run.cloud.instances.iter().all(|(_, (attributes, _))| attributes[meta::OWNER] != OURS));
        prop_assert_eq!(others(&run.cloud), before);
    }
}
