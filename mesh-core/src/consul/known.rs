//! Everything learnt from Consul so far, and the set of services that it makes.
//!
//! The last good answer about each service is kept, whatever happens to Consul. Must not know when anything is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{
    answer::{Instances, Names},
    entries,
};
use crate::{
    config::discovery::Consul,
    id::ServiceName,
    instance::{Contribution, share},
    owners::Owners,
    services::{ServiceEntry, ServiceSet},
};

/// For so long after Consul was away or has begun anew, an answer that knows less does not take anything away: whoever
/// registers there may not have been back yet.
pub const GRACE: Duration = Duration::from_secs(60);

/// A service to be asked for: datacenter by its place in the configuration, and Consul's own name.
pub type Key = (usize, Arc<str>);

/// See the module's text.
#[derive(Debug, Default)]
pub struct Known {
    services: BTreeMap<Key, Learnt>,
    /// Who says something about a service of the mesh.
    by_name: BTreeSet<(ServiceName, Key)>,
    /// What it all comes to.
    set: ServiceSet,
    /// How many of them nobody has asked for yet.
    missing: usize,
    /// Names of which no DNS label can be made.
    unnameable: BTreeSet<String>,
    /// Until when nothing is taken away, by datacenter.
    grace: BTreeMap<usize, Duration>,
}

#[derive(Debug, Default)]
struct Learnt {
    tags: BTreeSet<String>,
    /// `None`: not asked for yet.
    entries: Option<Vec<Contribution>>,
    /// Why something of it is not used.
    problems: Vec<String>,
}

/// What a list of services has changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: Vec<Key>,
    pub removed: Vec<Key>,
    /// Still there, but with other tags.
    pub touched: Vec<Key>,
}

impl Known {
    /// Consul has begun anew at `now` (since any fixed moment), or was away.
    pub fn began_anew(&mut self, datacenter: usize, now: Duration) {
        self.grace.insert(datacenter, now + GRACE);
    }

    fn in_grace(&self, datacenter: usize, now: Duration) -> bool {
        self.grace.get(&datacenter).is_some_and(|until| now < *until)
    }

    /// A datacenter's list of services has come; those that the configuration asks for are taken.
    pub fn names(&mut self, datacenter: usize, names: &Names, config: &Consul, now: Duration) -> Changes {
        let mut changes = Changes::default();
        let mut wanted: BTreeMap<Arc<str>, &BTreeSet<String>> = BTreeMap::new();
        for (consul, tags) in names.iter().filter(|(name, tags)| config.wants(name, tags)) {
            if name(consul).is_some() {
                wanted.insert(consul.as_str().into(), tags);
            } else {
                self.unnameable.insert(consul.clone());
            }
        }
        if !self.in_grace(datacenter, now) {
            let gone = self.services.keys().filter(|(dc, name)| *dc == datacenter && !wanted.contains_key(name));
            changes.removed = gone.cloned().collect();
            for key in &changes.removed {
                let Some(gone) = self.services.remove(key) else { continue };
                self.missing -= usize::from(gone.entries.is_none());
                self.compose(key, gone.entries.as_deref().unwrap_or_default(), &[]);
            }
        }
        for (name, tags) in wanted {
            let key = (datacenter, name);
            match self.services.get_mut(&key) {
                Some(learnt) if learnt.tags == *tags => {}
                Some(learnt) => {
                    learnt.tags.clone_from(tags);
                    changes.touched.push(key);
                }
                None => {
                    self.services.insert(key.clone(), Learnt { tags: tags.clone(), ..Learnt::default() });
                    self.missing += 1;
                    changes.added.push(key);
                }
            }
        }
        changes
    }

    /// The instances of a service have come. Whether they make a difference.
    pub fn instances(&mut self, key: &Key, answer: &Instances, config: &Consul, now: Duration) -> bool {
        let grace = self.in_grace(key.0, now);
        let Some(learnt) = self.services.get_mut(key) else { return false };
        let Some(name) = name(&key.1) else { return false };
        let datacenter = config.datacenters.get(key.0).filter(|_| key.0 > 0);
        let (mut entries, problems) = entries::entries(&name, datacenter.map(String::as_str), &answer.usable, config);
        learnt.problems = answer.left_out.iter().cloned().chain(problems).collect();
        if let (true, Some(before)) = (grace, &learnt.entries) {
            keep(before, answer, &mut entries);
        }
        let before = learnt.entries.take();
        share(before.as_deref().unwrap_or_default(), &mut entries);
        self.missing -= usize::from(before.is_none());
        let changed = before.as_ref() != Some(&entries);
        learnt.entries = Some(entries.clone());
        if changed {
            self.compose(key, before.as_deref().unwrap_or_default(), &entries);
        }
        changed
    }

    /// Makes those services anew about which `key` said and says something.
    fn compose(&mut self, key: &Key, before: &[Contribution], now: &[Contribution]) {
        for Contribution { entry, .. } in before {
            self.by_name.remove(&(entry.name.clone(), key.clone()));
        }
        for Contribution { entry, .. } in now {
            self.by_name.insert((entry.name.clone(), key.clone()));
        }
        let names: BTreeSet<&ServiceName> = before.iter().chain(now).map(|it| &it.entry.name).collect();
        for name in names {
            match self.composed(name) {
                // What did not change stays the same value, so that nobody has to compare it again.
                Some(entry) if self.set.services.get(name) == Some(&entry) => {}
                Some(entry) => drop(self.set.services.insert(name.clone(), entry)),
                None => drop(self.set.services.remove(name)),
            }
        }
    }

    /// A service of the mesh. Of two of Consul's names that are one to the mesh (`my_app`, `my-app`) it is the one that is
    /// written as the mesh writes it, else the first; and whatever says by its meta that it belongs to the service.
    fn composed(&self, name: &ServiceName) -> Option<Arc<ServiceEntry>> {
        let all: Vec<(&Key, &Contribution)> = self
            .saying(name)
            .flat_map(|key| self.services.get(key).map(|learnt| (key, learnt)))
            .flat_map(|(key, learnt)| learnt.entries.iter().flatten().map(move |it| (key, it)))
            .filter(|(_, it)| it.entry.name == *name)
            .collect();
        let exact = |(_, consul): &Key| self::name(consul).is_some_and(|name| name.as_str() == &**consul);
        let own = all.iter().filter(|(_, it)| it.own).min_by_key(|(key, _)| (!exact(key), *key));
        let others = all.iter().filter(|(_, it)| !it.own);
        let mut chosen = own.into_iter().chain(others).map(|(_, it)| &it.entry);
        // Of all who bear the name, also those of whom nothing else counts: whose it is, nobody may hide.
        let owners = Owners::joined(all.iter().map(|(_, it)| &*it.entry), false);
        let first = chosen.next()?;
        let rest: Vec<_> = chosen.flat_map(|entry| entry.endpoints.iter().cloned()).collect();
        if rest.is_empty() && owners == first.owners {
            return Some(first.clone());
        }
        let endpoints = first.endpoints.iter().cloned().chain(rest).collect();
        Some(Arc::new(ServiceEntry { endpoints, owners, ..ServiceEntry::clone(first) }))
    }

    /// Services that nobody has asked for yet.
    pub fn missing(&self) -> usize {
        self.missing
    }

    pub fn len(&self) -> usize {
        self.services.len()
    }

    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.services.keys()
    }

    /// What Consul calls the services that a service of the mesh is made of.
    pub fn keys_of(&self, name: &ServiceName) -> Vec<Key> {
        self.saying(name).cloned().collect()
    }

    fn saying(&self, name: &ServiceName) -> impl Iterator<Item = &Key> {
        let first = (name.clone(), (0, Arc::from("")));
        self.by_name.range(first..).take_while(move |(other, _)| other == name).map(|(_, key)| key)
    }

    /// The datacenters whose grace is over at `now`; it is not told again.
    pub fn grace_over(&mut self, now: Duration) -> Vec<usize> {
        let over: Vec<usize> = self.grace.iter().filter(|(_, until)| **until <= now).map(|(dc, _)| *dc).collect();
        self.grace.retain(|_, until| *until > now);
        over
    }

    /// When the next grace is over.
    pub fn next_grace(&self) -> Option<Duration> {
        self.grace.values().min().copied()
    }

    /// What is left out, with its reason: `<service>: <reason>`.
    pub fn problems(&self) -> Vec<String> {
        let one = |((_, name), learnt): (&Key, &Learnt)| {
            learnt.problems.iter().map(|problem| format!("{name}: {problem}")).collect::<Vec<_>>()
        };
        let unnameable = self.unnameable.iter();
        let unnameable = unnameable.map(|name| format!("{}: no DNS label can be made of it", name.escape_debug()));
        self.services.iter().flat_map(one).chain(unnameable).collect()
    }

    /// All services known, as one source.
    pub fn set(&self) -> ServiceSet {
        self.set.clone()
    }
}

/// Endpoints known before of which the answer says nothing stay; what it says of others, also that they are ill, counts.
fn keep(before: &[Contribution], answer: &Instances, entries: &mut Vec<Contribution>) {
    let said: BTreeSet<_> = answer.usable.iter().map(|instance| instance.addr).collect();
    for Contribution { entry: known, own } in before {
        let kept = known.endpoints.iter().filter(|it| !said.contains(&it.endpoint.addr())).cloned();
        match entries.iter_mut().find(|it| it.entry.name == known.name) {
            Some(it) => {
                let kept = ServiceEntry { endpoints: kept.collect(), ..ServiceEntry::clone(known) };
                let owners = Owners::joined([&*it.entry, &kept].into_iter(), false);
                let entry = Arc::make_mut(&mut it.entry);
                entry.owners = owners;
                entry.endpoints.extend(kept.endpoints);
            }
            None => {
                let entry = Arc::new(ServiceEntry { endpoints: kept.collect(), ..ServiceEntry::clone(known) });
                entries.push(Contribution { entry, own: *own });
            }
        }
    }
    for it in entries {
        Arc::make_mut(&mut it.entry).endpoints.sort_by_key(|it| (it.endpoint.addr(), it.alias, it.port));
    }
}

/// The mesh's name of a Consul service.
fn name(consul: &str) -> Option<ServiceName> {
    ServiceName::sanitised(consul)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::discovery::tests::consul,
        consul::answer::{Instance, Status, Weights},
    };
    use proptest::prelude::*;

    fn names(list: &[&str]) -> Names {
        list.iter().map(|name| ((*name).to_owned(), BTreeSet::new())).collect()
    }

    fn instances(last: &[u8]) -> Instances {
        let one = |n: &u8| Instance {
            addr: ([10, 0, 0, *n], 80).into(),
            tags: BTreeSet::new(),
            meta: BTreeMap::new(),
            weights: Weights { passing: 1, warning: 1 },
            status: Status::Passing,
            node_meta: BTreeMap::new(),
        };
        Instances { usable: last.iter().map(one).collect(), left_out: Vec::new() }
    }

    fn key(name: &str) -> Key {
        (0, name.into())
    }

    fn show(known: &Known) -> Vec<String> {
        known.set().services.values().map(|entry| format!("{} {}", entry.name, entry.endpoints.len())).collect()
    }

    const T0: Duration = Duration::ZERO;

    #[test]
    fn a_restart_of_consul_takes_nothing_away_at_once() {
        let (mut known, config) = (Known::default(), consul(""));
        assert_eq!(known.names(0, &names(&["a", "b", "consul"]), &config, T0).added, [key("a"), key("b")]);
        assert!(known.instances(&key("a"), &instances(&[1, 2]), &config, T0));
        assert!(!known.instances(&key("a"), &instances(&[1, 2]), &config, T0), "nothing new");
        assert_eq!((known.missing(), show(&known)), (1, vec!["a 2".to_owned()]));
        known.began_anew(0, T0);
        let soon = GRACE / 2;
        assert_eq!(known.names(0, &names(&["consul"]), &config, soon), Changes::default());
        assert!(!known.instances(&key("a"), &instances(&[]), &config, soon));
        assert!(known.instances(&key("a"), &instances(&[2, 3]), &config, soon), "the third is new, the first is kept");
        let mut ill = instances(&[2, 3]);
        ill.usable[0].status = Status::Critical;
        assert!(known.instances(&key("a"), &ill, &config, soon), "what is said to be ill goes");
        assert_eq!(
            (show(&known), known.grace_over(soon), known.next_grace()),
            (vec!["a 2".to_owned()], vec![], Some(GRACE))
        );
        assert_eq!((known.grace_over(GRACE), known.next_grace()), (vec![0], None));
        assert!(known.instances(&key("a"), &instances(&[]), &config, GRACE));
        assert_eq!(known.names(0, &names(&["a"]), &config, GRACE).removed, [key("b")]);
        assert_eq!(show(&known), ["a 0"], "it exists, and nobody serves it");
    }

    #[test]
    fn what_is_said_again_is_not_held_twice() {
        let (mut known, config) = (Known::default(), consul(""));
        known.names(0, &names(&["a"]), &config, T0);
        let endpoints = |known: &Known| {
            let entry = known.set().services["a"].clone();
            entry.endpoints.iter().map(|it| it.endpoint.clone()).collect::<Vec<_>>()
        };
        known.instances(&key("a"), &instances(&[1, 2]), &config, T0);
        let [one, two] = &endpoints(&known)[..] else { panic!("two endpoints") };
        known.instances(&key("a"), &instances(&[1, 2]), &config, T0);
        // The test has one, and Known the other, in one entry that its set shares.
        assert_eq!((Arc::strong_count(one), Arc::strong_count(two)), (2, 2));
        let held = known.services[&key("a")].entries.as_ref().expect("was asked for")[0].entry.clone();
        assert!(Arc::ptr_eq(&held, &known.set().services["a"]));
        known.instances(&key("a"), &instances(&[2, 3]), &config, T0);
        assert!(Arc::ptr_eq(two, &endpoints(&known)[0]), "what stays is the same value");
    }

    #[test]
    fn names_that_are_one_to_the_mesh() {
        let (mut known, config) = (Known::default(), consul(""));
        known.names(0, &names(&["My-App", "my-app", "my_app", "___"]), &config, T0);
        for (n, name) in (1..).zip(["My-App", "my-app", "my_app"]) {
            known.instances(&key(name), &instances(&[n]), &config, T0);
        }
        let set = known.set();
        assert_eq!(set.services.len(), 1);
        assert_eq!(set.services["my-app"].endpoints[0].endpoint.addr().to_string(), "10.0.0.2:80");
        assert_eq!(known.problems(), ["___: no DNS label can be made of it"]);
    }

    proptest! {
        /// Whatever came before, the last answers decide, and what did not change is the same value.
        #[test]
        fn the_last_answers_decide(answers in prop::collection::vec((0_usize..3, prop::collection::vec(0_u8..4, 0..3)), 1..20)) {
            let (mut known, config) = (Known::default(), consul(""));
            let all = ["a", "b", "c"];
            known.names(0, &names(&all), &config, T0);
            for (which, last) in &answers {
                let before = known.set();
                let changed = known.instances(&key(all[*which]), &instances(last), &config, T0);
                let after = known.set();
                prop_assert_eq!(changed, before != after);
                let moved = after.services.iter().filter(|(name, entry)| {
                    !before.services.get(*name).is_some_and(|old| Arc::ptr_eq(old, entry))
                });
                prop_assert!(moved.count() <= 1);
            }
            let mut fresh = Known::default();
            fresh.names(0, &names(&all), &config, T0);
            for (which, name) in all.iter().enumerate() {
                if let Some((_, last)) = answers.iter().rfind(|(n, _)| *n == which) {
                    fresh.instances(&key(name), &instances(last), &config, T0);
                }
            }
            prop_assert_eq!(fresh.set(), known.set());
        }
    }
}
