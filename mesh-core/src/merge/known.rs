//! What the sources said at the last merge, and which services may differ because they now say something else.
//!
//! Must not know what is made of a service. To suspect one too many costs a little time, one too few is a fault.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use imbl::ordmap::DiffItem;
use mesh_common::addr::Addr;

use super::{
    Merged, Sources,
    local::{self, Locals, Member},
};
use crate::{
    id::ServiceName,
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
    /// Services whose entries in the sets changed; `None`: nothing was known before.
    entries: Option<BTreeSet<ServiceName>>,
}

impl Known {
    /// What is known now. The parts whose sources did not change are taken over from `before`.
    pub(super) fn after(before: Option<&Self>, sources: &Sources<'_>) -> Self {
        let before = before.filter(|before| before.sets.len() == sources.sets.len());
        let mut entries = BTreeSet::new();
        let mut families = false;
        for (old, new) in before.iter().flat_map(|before| &before.sets).zip(sources.sets) {
            let changes =
                if old.services.ptr_eq(&new.services) { None } else { Some(old.services.diff(&new.services)) };
            for change in changes.into_iter().flatten() {
                let none: &[String] = &[];
                let (name, is, was) = match change {
                    DiffItem::Add(name, entry) => (name, entry.families.as_slice(), none),
                    DiffItem::Remove(name, entry) => (name, none, entry.families.as_slice()),
                    DiffItem::Update { old: (_, old), new: (name, new) } => (name, &*new.families, &*old.families),
                };
                families |= is != was;
                entries.insert(name.clone());
            }
        }
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
