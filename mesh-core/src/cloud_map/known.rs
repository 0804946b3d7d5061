//! Everything learnt from Cloud Map so far, and the set of services that it makes.
//!
//! The last good answer about each service is kept, whatever happens to Cloud Map. A service goes only when a list of
//! its namespace's services no longer names it: instances that cannot be had take nothing away. Must not know when
//! anything is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::entries::{Instance, entries};
use crate::{
    config::cloud_map::CloudMap,
    id::ServiceName,
    instance::{Contribution, share},
    owners::Owners,
    services::{ServiceEntry, ServiceSet},
};

/// A service to be asked for: namespace by its place in the configuration, and Cloud Map's own name.
pub type Key = (usize, Arc<str>);

/// See the module's text.
#[derive(Debug, Default)]
pub struct Known {
    services: BTreeMap<Key, Learnt>,
    /// Names of which no DNS label can be made.
    unnameable: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Learnt {
    /// `None`: not asked for yet.
    said: Option<(Vec<Contribution>, Vec<String>)>,
}

/// What a list of services has changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: Vec<Key>,
    pub removed: Vec<Key>,
}

impl Known {
    /// A namespace's list of services has come; those that the configuration asks for are taken.
    pub fn names(&mut self, namespace: usize, names: &BTreeSet<String>, config: &CloudMap) -> Changes {
        let mut wanted = BTreeSet::new();
        for name in names.iter().filter(|name| config.wants(name)) {
            if label(name).is_some() {
                wanted.insert(Arc::<str>::from(name.as_str()));
            } else {
                self.unnameable.insert(name.clone());
            }
        }
        let gone = self.services.keys().filter(|(of, name)| *of == namespace && !wanted.contains(name));
        let removed: Vec<Key> = gone.cloned().collect();
        removed.iter().for_each(|key| drop(self.services.remove(key)));
        let new = wanted.into_iter().map(|name| (namespace, name));
        let added: Vec<Key> = new.filter(|key| !self.services.contains_key(key)).collect();
        self.services.extend(added.iter().map(|key| (key.clone(), Learnt::default())));
        Changes { added, removed }
    }

    /// The instances of a service have come. Whether they make a difference.
    pub fn instances(&mut self, key: &Key, instances: &[Instance], config: &CloudMap) -> bool {
        let (Some(learnt), Some(name)) = (self.services.get_mut(key), label(&key.1)) else { return false };
        let namespace = config.namespaces.get(key.0).filter(|_| key.0 > 0).and_then(|name| namespace_label(name));
        let mut said = entries(&name, namespace.as_deref(), instances, config);
        if let Some((before, _)) = &learnt.said {
            share(before, &mut said.0);
        }
        let changed = learnt.said.as_ref() != Some(&said);
        learnt.said = Some(said);
        changed
    }

    /// Whether the service is in its namespace's list.
    pub fn has(&self, key: &Key) -> bool {
        self.services.contains_key(key)
    }

    pub fn len(&self) -> usize {
        self.services.len()
    }

    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// What Cloud Map calls the services that a service of the mesh is made of.
    pub fn keys_of(&self, name: &ServiceName) -> Vec<Key> {
        let says = |learnt: &Learnt| learnt.said.iter().flat_map(|(all, _)| all).any(|it| it.entry.name == *name);
        self.services.iter().filter(|(_, learnt)| says(learnt)).map(|(key, _)| key.clone()).collect()
    }

    /// What is left out, with its reason: `<service>: <reason>`.
    pub fn problems(&self) -> Vec<String> {
        let one = |((_, name), learnt): (&Key, &Learnt)| {
            let problems = learnt.said.iter().flat_map(|(_, problems)| problems);
            problems.map(|problem| format!("{name}: {problem}")).collect::<Vec<_>>()
        };
        let unnameable = self.unnameable.iter();
        let unnameable = unnameable.map(|name| format!("{}: no DNS label can be made of it", name.escape_debug()));
        self.services.iter().flat_map(one).chain(unnameable).collect()
    }

    /// All services known, as one source. Of two of Cloud Map's names that are one to the mesh (`my_app`, `my-app`) it is
    /// the one that is written as the mesh writes it, else the first; and whatever says that it belongs to the service.
    pub fn set(&self) -> ServiceSet {
        let mut own: BTreeMap<&ServiceName, (bool, &Contribution)> = BTreeMap::new();
        let mut others: BTreeMap<&ServiceName, Vec<&Contribution>> = BTreeMap::new();
        for ((_, name), learnt) in &self.services {
            let exact = label(name).is_some_and(|label| label.as_str() == &**name);
            for contribution in learnt.said.iter().flat_map(|(all, _)| all) {
                let service = &contribution.entry.name;
                if !contribution.own {
                    others.entry(service).or_default().push(contribution);
                } else if own.get(service).is_none_or(|(before, _)| exact && !before) {
                    own.insert(service, (exact, contribution));
                }
            }
        }
        let names: BTreeSet<_> = own.keys().chain(others.keys()).copied().collect();
        let entry = |name: &ServiceName| {
            let own = own.get(name).map(|(_, it)| *it);
            let mut all = own.into_iter().chain(others.get(name).into_iter().flatten().copied());
            let owners = Owners::joined(all.clone().map(|it| &*it.entry), false);
            let first = &all.next()?.entry;
            let more: Vec<_> = all.flat_map(|it| it.entry.endpoints.iter().cloned()).collect();
            if more.is_empty() {
                return Some(first.clone());
            }
            let endpoints = first.endpoints.iter().cloned().chain(more).collect();
            Some(Arc::new(ServiceEntry { endpoints, owners, ..ServiceEntry::clone(first) }))
        };
        let services = names.into_iter().filter_map(|name| Some((name.clone(), entry(name)?))).collect();
        ServiceSet { services, policy: None }
    }
}

/// What the mesh calls a service of this name.
fn label(name: &str) -> Option<ServiceName> {
    ServiceName::sanitised(name)
}

/// What stands for a namespace in the names of its services, where it is not the first one.
pub fn namespace_label(namespace: &str) -> Option<String> {
    ServiceName::sanitised(namespace).map(|label| label.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cloud_map::entries::Said, config::cloud_map::tests::cloud_map};
    use proptest::prelude::*;

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn key(name: &str) -> Key {
        (0, name.into())
    }

    fn instances(last: &[u8]) -> Vec<Instance> {
        let one = |n: &u8| Instance {
            id: n.to_string(),
            health: Said::Healthy,
            attributes: [("AWS_INSTANCE_IPV4".to_owned(), format!("10.0.0.{n}"))].into(),
        };
        last.iter().map(one).collect()
    }

    /// `name last-octet…`
    fn show(known: &Known) -> Vec<String> {
        let set = known.set();
        let one = |entry: &Arc<ServiceEntry>| {
            let addresses: Vec<_> =
                entry.endpoints.iter().map(|e| e.endpoint.addr().ip().to_string()[7..].to_owned()).collect();
            format!("{} {}", entry.name, addresses.join(" ")).trim_end().to_owned()
        };
        set.services.values().map(one).collect()
    }

    #[test]
    fn what_left_the_list_is_not_known() {
        let (config, mut known) = (cloud_map(""), Known::default());
        known.names(0, &names(&["a", "b"]), &config);
        assert!(known.has(&key("a")));
        known.names(0, &names(&["b"]), &config);
        assert!(!known.has(&key("a")) && known.has(&key("b")));
    }

    #[test]
    fn services_come_and_go_with_the_list() {
        let (mut known, config) = (Known::default(), cloud_map("exclude = [\"not\"]"));
        let changes = known.names(0, &names(&["a", "b", "not", "___"]), &config);
        assert_eq!((changes.added, changes.removed), (vec![key("a"), key("b")], vec![]));
        assert!(show(&known).is_empty(), "nobody has been asked for yet");
        assert!(known.instances(&key("a"), &instances(&[1]), &config));
        assert!(!known.instances(&key("a"), &instances(&[1]), &config));
        assert!(known.instances(&key("b"), &[], &config));
        assert_eq!(show(&known), ["a 1", "b"], "b exists, and nobody serves it");
        assert_eq!(known.names(0, &names(&["b"]), &config), Changes { added: vec![], removed: vec![key("a")] });
        assert_eq!(show(&known), ["b"]);
        assert!(!known.instances(&key("a"), &instances(&[1]), &config), "an answer that comes late");
        assert_eq!(known.problems(), ["___: no DNS label can be made of it"]);
    }

    #[test]
    fn names_that_are_one_to_the_mesh() {
        let (mut known, config) = (Known::default(), cloud_map(""));
        known.names(0, &names(&["My-App", "my-app", "my_app"]), &config);
        for (n, name) in (1..).zip(["My-App", "my-app", "my_app"]) {
            known.instances(&key(name), &instances(&[n]), &config);
        }
        assert_eq!(show(&known), ["my-app 2"]);
        assert_eq!(known.keys_of(&"my-app".parse().expect("valid")).len(), 3);
    }

    #[test]
    fn another_namespace_has_names_of_its_own() {
        let (mut known, config) = (Known::default(), cloud_map("namespaces = [\"my.demo\", \"Other.demo\"]"));
        known.names(0, &names(&["a"]), &config);
        known.names(1, &names(&["a"]), &config);
        known.instances(&key("a"), &instances(&[1]), &config);
        known.instances(&(1, "a".into()), &instances(&[2]), &config);
        assert_eq!(show(&known), ["a 1", "a--dc-other-demo 2"]);
        known.names(0, &names(&[]), &config);
        assert_eq!(show(&known), ["a--dc-other-demo 2"]);
    }

    proptest! {
        /// Whatever came before, the last answers decide.
        #[test]
        fn the_last_answers_decide(answers in prop::collection::vec((0_usize..3, prop::collection::vec(0_u8..4, 0..3)), 1..20)) {
            let (mut known, mut fresh, config) = (Known::default(), Known::default(), cloud_map(""));
            let all = ["a", "b", "c"];
            known.names(0, &names(&all), &config);
            fresh.names(0, &names(&all), &config);
            for (which, last) in &answers {
                let before = known.set();
                let changed = known.instances(&key(all[*which]), &instances(last), &config);
                prop_assert_eq!(changed, before != known.set());
            }
            for (which, name) in all.iter().enumerate() {
                if let Some((_, last)) = answers.iter().rfind(|(n, _)| *n == which) {
                    fresh.instances(&key(name), &instances(last), &config);
                }
            }
            prop_assert_eq!(fresh.set(), known.set());
        }
    }
}
