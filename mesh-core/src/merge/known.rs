//! What the sources said at the last merge, and which services may differ because they now say something else.
//!
//! Must not know what is made of a service. To suspect one too many costs a little time, one too few is a fault.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use imbl::{OrdMap, ordmap::DiffItem};
use mesh_common::addr::Addr;

use super::{
    Merged, Sources,
    local::{self, Locals, Member},
};
use crate::{
    id::ServiceName,
    owners::Owners,
    readiness::Gate,
    services::{ServiceEntry, ServiceSet},
    task::Task,
};

#[derive(Clone, Debug)]
pub(super) struct Known {
    sets: Vec<ServiceSet>,
    pub(super) tasks: Arc<Vec<Task>>,
    gate: Gate,
    /// The enrolled ones of `tasks`; the same value for as long as they are the same.
    pub(super) members: Arc<Vec<Member>>,
    pub(super) locals: Arc<Locals>,
    leading: Leading,
    /// Services whose entries in the sets changed, with those that take over from them; `None`: nothing was known before.
    entries: Option<BTreeSet<ServiceName>>,
}

impl Known {
    /// What is known now. The parts whose sources did not change are taken over from `before`.
    pub(super) fn after(before: Option<&Self>, sources: &Sources<'_>) -> Self {
        let before = before.filter(|before| before.sets.len() == sources.sets.len());
        let mut entries = BTreeSet::new();
        let mut families = false;
        let mut owned = BTreeSet::new();
        for (old, new) in before.iter().flat_map(|before| &before.sets).zip(sources.sets) {
            let changes =
                if old.services.ptr_eq(&new.services) { None } else { Some(old.services.diff(&new.services)) };
            for change in changes.into_iter().flatten() {
                let (name, is, was) = match change {
                    DiffItem::Add(name, entry) => (name, Some(entry), None),
                    DiffItem::Remove(name, entry) => (name, None, Some(entry)),
                    DiffItem::Update { old: (_, old), new: (name, new) } => (name, Some(new), Some(old)),
                };
                families |= claimed(is) != claimed(was);
                if is.into_iter().chain(was).any(|entry| entry.owners.is_some()) {
                    owned.insert(name.clone());
                }
                entries.insert(name.clone());
            }
        }
        let mut leading = before.map(|before| before.leading.clone()).unwrap_or_default();
        match before {
            Some(before) => leading.relink(&owned, &before.sets, sources.sets),
            None => leading.relink(&sources.sets.iter().flat_map(owned_in).collect(), &[], sources.sets),
        }
        let heirs: Vec<_> = entries.iter().flat_map(|name| leading.to(name)).cloned().collect();
        entries.extend(heirs);
        let members = match before {
            Some(before) if before.tasks == sources.tasks && !families => before.members.clone(),
            Some(_) | None => Arc::new(local::members(sources)),
        };
        let locals = match before {
            Some(before)
                if Arc::ptr_eq(&before.members, &members)
                    && before.gate == *sources.gate
                    && !members.iter().any(|member| entries.contains(&member.service)) =>
            {
                before.locals.clone()
            }
            Some(_) | None => Arc::new(Locals::of_members(&members, sources)),
        };
        Self {
            sets: sources.sets.to_vec(),
            tasks: sources.tasks.clone(),
            gate: sources.gate.clone(),
            members,
            locals,
            leading,
            entries: before.map(|_| entries),
        }
    }

    /// The services that may differ from those of `before`.
    pub(super) fn suspects(&self, before: &Merged, sets: &[ServiceSet]) -> BTreeSet<ServiceName> {
        let (Some(entries), Some(old)) = (&self.entries, &before.known) else {
            return self.names().cloned().chain(before.snapshot.services.keys().cloned()).collect();
        };
        let mut suspects = entries.clone();
        if !Arc::ptr_eq(&old.locals, &self.locals) {
            suspects.extend(self.locals.differing(&old.locals));
            // Whose task an address is, also those must know who list it.
            let addresses = self.locals.moved(&old.locals);
            suspects.extend(sets.iter().flat_map(|set| listing(set, &addresses)));
        }
        suspects
    }

    /// Every service that a source names, and every service of a local task that has a port.
    pub(super) fn names(&self) -> impl Iterator<Item = &ServiceName> {
        self.sets.iter().flat_map(|set| set.services.keys()).chain(self.locals.names())
    }
}

/// The families of tasks that an entry claims.
fn claimed(entry: Option<&Arc<ServiceEntry>>) -> &[String] {
    entry.map_or(&[], |entry| &entry.families)
}

/// The names that lead to a service, which is behind them.
#[derive(Clone, Debug, Default)]
struct Leading(OrdMap<ServiceName, BTreeSet<ServiceName>>);

impl Leading {
    fn to(&self, service: &ServiceName) -> impl Iterator<Item = &ServiceName> {
        self.0.get(service).into_iter().flatten()
    }

    /// Whom these names lead to has changed.
    fn relink(&mut self, names: &BTreeSet<ServiceName>, was: &[ServiceSet], is: &[ServiceSet]) {
        for name in names {
            for service in behind(name, was) {
                let Some(leading) = self.0.get_mut(service) else { continue };
                leading.remove(name);
                if leading.is_empty() {
                    self.0.remove(service);
                }
            }
            for service in behind(name, is) {
                self.0.entry(service.clone()).or_default().insert(name.clone());
            }
        }
    }
}

/// The services that a source says to be behind a name.
fn behind<'a>(name: &ServiceName, sets: &'a [ServiceSet]) -> impl Iterator<Item = &'a ServiceName> {
    let entries = sets.iter().filter_map(|set| set.services.get(name));
    entries.filter_map(|entry| entry.owners.as_deref()).flat_map(Owners::names)
}

/// The names of a set behind which there are other services.
fn owned_in(set: &ServiceSet) -> impl Iterator<Item = ServiceName> {
    set.services.iter().filter(|(_, entry)| entry.owners.is_some()).map(|(name, _)| name.clone())
}

/// Services of the set with an endpoint at one of the addresses.
fn listing(set: &ServiceSet, addresses: &BTreeSet<Addr>) -> impl Iterator<Item = ServiceName> {
    let lists = |entry: &ServiceEntry| entry.endpoints.iter().any(|e| addresses.contains(&e.endpoint.id.0));
    let entries = if addresses.is_empty() { None } else { Some(&set.services) };
    entries.into_iter().flatten().filter(move |(_, entry)| lists(entry)).map(|(name, _)| name.clone())
}

/// The keys for which two maps have different values.
pub(super) fn differing<'a, K: Ord, V: PartialEq>(
    a: &'a BTreeMap<K, V>,
    b: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = &'a K> {
    let here = a.iter().filter(|(key, value)| b.get(key) != Some(value)).map(|(key, _)| key);
    here.chain(b.keys().filter(|key| !a.contains_key(key)))
}
