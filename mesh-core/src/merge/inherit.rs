//! What a name takes over from the services behind it, where nobody says anything about the name itself: their `tls`,
//! `on_agent_death`, ports and protocols.
//!
//! Must not know how such a name is made.

use super::Definition;
use crate::{
    model::{OnAgentDeath, TlsMode},
    owners::Owners,
    services::{PortEntry, ServiceEntry, ServiceSet},
};

impl<'a> Definition<'a> {
    pub(super) fn inherit(&mut self, owners: &Owners, sets: &'a [ServiceSet]) {
        // Of each service what is said about it by each of its names.
        let said: Vec<Vec<Self>> = owners
            .services()
            .map(|names| names.iter().filter_map(|name| Self::said(name, sets, None)).collect())
            .collect();
        let tls = said.iter().map(|names| names.iter().find_map(|it| it.tls));
        self.tls = self.tls.or_else(|| agreed(tls, TlsMode::Strict));
        let on_agent_death = said.iter().map(|names| names.iter().find_map(|it| it.on_agent_death));
        self.on_agent_death = self.on_agent_death.or_else(|| agreed(on_agent_death, OnAgentDeath::Closed));
        // Several services have ports that need not agree.
        let [names] = &said[..] else { return };
        let Some(theirs) = names.iter().map(|it| &it.ports).find(|ports| !ports.is_empty()) else { return };
        if self.ports.is_empty() {
            self.ports.clone_from(theirs);
        }
        for port in self.ports.values_mut().filter(|port| port.protocol.is_none()) {
            port.protocol = theirs.values().find(|other| is_same(port, other)).and_then(|other| other.protocol);
        }
    }
}

/// What holds for several: the `strict` one where one asks for it, the other one only where nobody is silent.
fn agreed<T: Copy + PartialEq>(mut said: impl Iterator<Item = Option<T>> + Clone, strict: T) -> Option<T> {
    if said.clone().any(|it| it == Some(strict)) {
        return Some(strict);
    }
    let first = said.next().flatten();
    first.filter(|_| said.all(|it| it.is_some()))
}

/// Whether an alias's port leads to the same port of the application.
fn is_same(port: &PortEntry, other: &PortEntry) -> bool {
    match port.target {
        Some(target) => target == other.target.unwrap_or(other.port),
        None => port.port == other.port,
    }
}

/// The entries about a service that count: none after one that counts alone.
pub(super) fn counting<'a>(name: &'a str, sets: &'a [ServiceSet]) -> impl Iterator<Item = &'a ServiceEntry> + Clone {
    let mut over = false;
    let entries = sets.iter().filter_map(move |set| set.services.get(name)).map(|entry| &**entry);
    entries.take_while(move |entry| !std::mem::replace(&mut over, entry.alone))
}
