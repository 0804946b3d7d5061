//! Keeps the kernel's image of the snapshot: only differences are written, and after a failure the truth is read back.
//!
//! Must not know what an image means; `mesh_core::dataplane` makes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_common::maps::GrantKey;
use mesh_core::{
    dataplane::{Image, Write, around, diff, image},
    model::{Numbers, Snapshot},
};

use crate::sys::maps::{Enrolled, Maps};

/// The highest numbers in what another agent left.
pub(super) fn given(found: &Image, enrolled: &Enrolled) -> Numbers {
    let services = found.services.values().map(|service| service.id);
    let workloads = enrolled.namespaces.values().map(|namespace| namespace.workload);
    Numbers {
        service: services.chain(found.grants.keys().map(|key| key.service)).max().unwrap_or_default(),
        workload: workloads
            .chain(enrolled.cgroups.values().copied())
            .chain(found.grants.keys().map(|key| key.workload))
            .max()
            .unwrap_or_default(),
    }
}

pub(super) struct Dataplane {
    held: Held,
    /// How many services, endpoints and grants that are.
    sizes: [usize; 3],
    /// What another agent had granted to the workloads that it knew.
    old_grants: BTreeSet<GrantKey>,
}

/// What the kernel holds.
enum Held {
    /// The image of a snapshot.
    Of(Arc<Snapshot>),
    /// What another agent left, or was read back after a failure.
    Found(Image),
}

impl Dataplane {
    /// Starts from what another agent left. Its services stay until ours are known, and its grants until its
    /// namespaces are ours: our numbers go on from its (see [`given`]), so no entry means two things.
    pub(super) fn adopt(found: Image) -> Self {
        let old_grants = found.grants.keys().copied().collect();
        let found = Image { grants: BTreeMap::new(), ..found };
        Self { sizes: sizes(&found), held: Held::Found(found), old_grants }
    }

    /// Nobody bears the numbers of the agent before us any more.
    pub(super) fn forget_old(&mut self, maps: &mut Maps) {
        let writes: Vec<_> = std::mem::take(&mut self.old_grants).into_iter().map(Write::RemoveGrant).collect();
        if let Err(error) = maps.apply(&writes) {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot remove grants of an earlier agent");
        }
    }

    /// Entries of services, endpoints and grants in the kernel.
    pub(super) fn sizes(&self) -> [usize; 3] {
        self.sizes
    }

    /// Writes what differs. True: a write failed, which is said if `aloud`, and this has to be tried again.
    pub(super) fn apply(&mut self, maps: &mut Maps, snapshot: &Arc<Snapshot>, aloud: bool) -> bool {
        let part;
        let (from, to) = match &self.held {
            Held::Of(held) if Arc::ptr_eq(held, snapshot) => return false,
            Held::Of(held) => {
                let (from, to) = around(held, snapshot);
                part = from;
                (&part, to)
            }
            Held::Found(found) => (found, image(snapshot)),
        };
        let (gone, come) = (sizes(from), sizes(&to));
        match maps.apply(&diff(from, &to)) {
            Ok(()) => {
                for ((size, gone), come) in self.sizes.iter_mut().zip(gone).zip(come) {
                    *size = *size - gone + come;
                }
                self.held = Held::Of(snapshot.clone());
                false
            }
            Err(error) => {
                if aloud {
                    tracing::error!(error = &error as &dyn std::error::Error, "kernel maps are behind the snapshot");
                }
                match maps.image() {
                    Ok(image) => {
                        self.sizes = sizes(&image);
                        self.held = Held::Found(image);
                    }
                    Err(error) => {
                        tracing::error!(error = &error as &dyn std::error::Error, "cannot read the kernel maps back");
                    }
                }
                true
            }
        }
    }
}

fn sizes(image: &Image) -> [usize; 3] {
    [image.services.len(), image.endpoints.len(), image.grants.len()]
}

#[cfg(test)]
mod tests {
    use mesh_common::maps::{Namespace, Service};

    use super::*;

    #[test]
    fn no_number_of_an_earlier_agent_is_given_again() {
        assert_eq!(given(&Image::default(), &Enrolled::default()), Numbers::default());
        let found = Image {
            services: [(Default::default(), Service { id: 9, ..Service::default() })].into(),
            grants: [(GrantKey { workload: 3, service: 11 }, 1)].into(),
            ..Image::default()
        };
        let enrolled =
            Enrolled { namespaces: [(77, Namespace { workload: 5, flags: 0 })].into(), cgroups: [(88, 6)].into() };
        assert_eq!(given(&found, &enrolled), Numbers { workload: 6, service: 11 });
    }
}
