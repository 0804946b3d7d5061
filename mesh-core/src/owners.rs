//! Whose endpoints a name leads to, where they are not only its own service's: a tag's name, that of another datacenter,
//! an alias. By that, the rules and settings of a service hold under each name that leads to it.
//!
//! Must not know how a name is made of another one.

use std::{
    collections::{BTreeSet, btree_set},
    sync::Arc,
};

use crate::{
    id::ServiceName,
    services::{EndpointEntry, ServiceEntry},
};

/// The services behind a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owners(BTreeSet<Vec<ServiceName>>);

impl Owners {
    /// Of several services with all the names that each is known by, nearest first; one without a name is the service that
    /// bears the name itself. `None`: there is no other service than that.
    pub fn of(services: impl IntoIterator<Item = Vec<ServiceName>>) -> Option<Arc<Self>> {
        let services: BTreeSet<_> = services.into_iter().collect();
        services.iter().any(|names| !names.is_empty()).then(|| Arc::new(Self(services)))
    }

    /// Of a name of which several entries speak. It is a service of its own as well if there are endpoints that nobody
    /// says to be another's, or `local` tasks.
    pub(crate) fn joined<'a>(
        entries: impl Iterator<Item = &'a ServiceEntry> + Clone,
        local: bool,
    ) -> Option<Arc<Self>> {
        let owned = || entries.clone().filter_map(|entry| Some((entry.owners.as_ref()?, &entry.endpoints)));
        let (first, _) = owned().next()?;
        let addresses: BTreeSet<_> = owned().flat_map(|(_, all)| all).map(|it| it.endpoint.addr()).collect();
        let rest = entries.clone().filter(|entry| entry.owners.is_none()).flat_map(|entry| &entry.endpoints);
        let is_known = |it: &EndpointEntry| match it.endpoint.addr() {
            // Of a port that is only assumed, the address alone tells whose it is.
            at if it.assumed => addresses.iter().any(|known| known.ip() == at.ip()),
            at => addresses.contains(&at),
        };
        let own = local || rest.into_iter().any(|it| !is_known(it));
        let all: BTreeSet<_> = owned().flat_map(|(owners, _)| owners.services()).collect();
        if all.len() == first.0.len() && (!own || all.iter().any(|names| names.is_empty())) {
            return Some(first.clone());
        }
        Self::of(all.into_iter().cloned().chain(own.then(Vec::new)))
    }

    /// The names of each service.
    pub fn services(&self) -> btree_set::Iter<'_, Vec<ServiceName>> {
        self.0.iter()
    }

    /// Every name of another service.
    pub(crate) fn names(&self) -> impl Iterator<Item = &ServiceName> {
        self.0.iter().flatten()
    }
}
