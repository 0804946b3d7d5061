//! What an instance in any registry says of itself in its key-value pairs: Consul's meta, Cloud Map's attributes. By
//! these words every agent knows where the tunnel to an instance is and which identity must be proved there.
//!
//! Must not know which registry was asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use crate::{
    addr::canonical,
    id::{ServiceName, SpiffeId},
    owners::Owners,
    services::{Attributes, EndpointEntry, ServiceEntry},
};

/// Keys of instances that an agent has registered. Consul allows letters, digits, `-` and `_` only.
pub mod meta {
    /// Every key of ours begins so; none of them is an attribute of the endpoint.
    pub const PREFIX: &str = "ecs-mesh-";
    /// Address and port at which the tunnel to the instance ends.
    pub const AGENT: &str = "ecs-mesh-agent";
    /// SPIFFE ID that is proved there.
    pub const IDENTITY: &str = "ecs-mesh-identity";
    /// Ports of the service under which the instance is reached, with commas between.
    pub const PORTS: &str = "ecs-mesh-ports";
    /// The service in the mesh, where the registry's name is another: one of several ports, or a name that the task
    /// chose.
    pub const SERVICE: &str = "ecs-mesh-service";
    /// The port that the application itself listens on.
    pub const TARGET: &str = "ecs-mesh-target";
    /// Which agent keeps the registration up to date.
    pub const OWNER: &str = "ecs-mesh-owner";
    /// Tags with commas between, where the registry has none of its own.
    pub const TAGS: &str = "ecs-mesh-tags";
    pub const TASK: &str = "ecs-mesh-task";
    pub const ZONE: &str = "ecs-mesh-zone";
}

/// The port that clients use where nobody says which.
pub(crate) const USUAL_PORT: u16 = 80;
/// From here on, Linux and docker give ports as they come: no client has such a number in its configuration.
const DYNAMIC_PORTS: u16 = 32_768;

/// A part of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contribution {
    pub entry: Arc<ServiceEntry>,
    /// It follows from the registry's name of the service; otherwise the instances say that they belong to it.
    pub own: bool,
}

impl Contribution {
    /// A service of which nothing is said but where it is.
    pub(crate) fn of(name: ServiceName, endpoints: Vec<EndpointEntry>, own: bool, owners: Option<Arc<Owners>>) -> Self {
        let entry = ServiceEntry {
            name,
            ports: Vec::new(),
            endpoints,
            tls: None,
            on_agent_death: None,
            families: Vec::new(),
            alone: false,
            owners,
        };
        Self { entry: Arc::new(entry), own }
    }
}

/// Tunnel and identity, where the instance has both; `None`: it is not in the mesh.
///
/// # Errors
/// Half of it, or what cannot be read, is neither: such an instance is left out, because it is not known what would be
/// sent where.
pub(crate) fn meshed(
    addr: SocketAddr,
    says: &BTreeMap<String, String>,
) -> Result<Option<(SocketAddr, SpiffeId)>, String> {
    let (agent, identity) = (says.get(meta::AGENT), says.get(meta::IDENTITY));
    if agent.is_none() && identity.is_none() {
        return Ok(None);
    }
    let agent = agent.and_then(|agent| agent.parse::<SocketAddr>().ok()).map(canonical);
    let agent = agent.filter(|agent| agent.port() != 0 && !agent.ip().is_unspecified() && !agent.ip().is_multicast());
    let identity = identity.and_then(|identity| identity.parse::<SpiffeId>().ok());
    match (agent, identity) {
        (Some(agent), Some(identity)) => Ok(Some((agent, identity))),
        _ => Err(format!(
            "the instance at {addr} is half in the mesh: its meta must have both {} and {}",
            meta::AGENT,
            meta::IDENTITY
        )),
    }
}

/// How much of what [`meshed`] wants is missing: an instance of which less is missing stands for all at its address.
///
/// Somebody else may have registered the same task too, and knows nothing of a tunnel. Whether the task may be called is
/// then the word of its own host's agent alone: were the other one used because it is said to be well, whoever could not
/// be reached by mTLS would be sent plaintext.
pub(crate) fn missing(says: &BTreeMap<String, String>) -> usize {
    [meta::AGENT, meta::IDENTITY].iter().filter(|key| !says.contains_key(**key)).count()
}

/// Those with the lowest rank of their group, in their order, and those in whose place they stand. Who has no group
/// stands for himself.
pub(crate) fn foremost<T: Copy, G: Ord, R: Ord>(
    all: Vec<T>,
    group: impl Fn(T) -> Option<G>,
    rank: impl Fn(T) -> R,
) -> (Vec<T>, Vec<T>) {
    // Mostly all are alike.
    if all.windows(2).all(|two| rank(two[0]) == rank(two[1])) {
        return (all, Vec::new());
    }
    let mut lowest: BTreeMap<G, R> = BTreeMap::new();
    for one in &all {
        let (Some(group), rank) = (group(*one), rank(*one)) else { continue };
        if lowest.get(&group).is_none_or(|lowest| rank < *lowest) {
            lowest.insert(group, rank);
        }
    }
    let lowest = |one: &T| lowest.get(&group(*one)?);
    all.into_iter().partition(|one| lowest(one).is_none_or(|lowest| rank(*one) <= *lowest))
}

/// (service port, whether it is only an alias) under which an instance is reached: those that it names. Otherwise its
/// own port, where somebody chose it, and whatever clients use that were told no port.
pub(crate) fn ports(own: u16, says: &BTreeMap<String, String>) -> Vec<(Option<u16>, bool)> {
    let number = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port != 0);
    let target = says.get(meta::TARGET).and_then(|text| number(text)).unwrap_or(own);
    let given: BTreeSet<u16> = match says.get(meta::PORTS) {
        Some(text) => text.split(',').filter_map(number).collect(),
        None => BTreeSet::new(),
    };
    let alias = |port: u16| port == USUAL_PORT && target != USUAL_PORT;
    if !given.is_empty() {
        return given.into_iter().map(|port| (Some(port), alias(port))).collect();
    }
    let chosen = (own < DYNAMIC_PORTS).then_some((Some(own), false));
    chosen.into_iter().chain((own != USUAL_PORT).then_some((None, true))).collect()
}

/// The service in the mesh that it says it belongs to.
pub(crate) fn service(says: &BTreeMap<String, String>) -> Option<ServiceName> {
    says.get(meta::SERVICE).and_then(|service| service.parse().ok())
}

/// The owners of what a registry knows under a name, by the service that each of its instances says that it belongs to.
/// `names` are those from which that name is made, nearest first; instances that say nothing are of the nearest. What one
/// says that no tunnel proves counts only besides: nobody opens a service by saying that it is another one.
pub(crate) fn owners<'a>(
    registered: &ServiceName,
    names: &[ServiceName],
    instances: impl Iterator<Item = &'a BTreeMap<String, String>>,
) -> Option<Arc<Owners>> {
    let mut said = BTreeSet::new();
    for says in instances {
        let service = service(says).filter(|service| service != registered);
        if service.is_some() && !says.contains_key(meta::AGENT) {
            said.insert(None);
        }
        said.insert(service);
    }
    // Without an instance the name is still made of the others.
    let said = if said.is_empty() { BTreeSet::from([None]) } else { said };
    Owners::of(said.into_iter().map(|service| names.iter().cloned().chain(service).collect()))
}

/// Tags of an instance in a registry that has none of its own.
pub(crate) fn tags(says: &BTreeMap<String, String>) -> BTreeSet<String> {
    let all = says.get(meta::TAGS).into_iter().flat_map(|text| text.split(','));
    all.map(str::trim).filter(|tag| !tag.is_empty()).map(str::to_owned).collect()
}

/// The same in one value: as many tags as fit into `most` octets.
pub(crate) fn joined(tags: &BTreeSet<String>, most: usize) -> String {
    let mut text = String::new();
    for tag in tags.iter().filter(|tag| !tag.is_empty() && !tag.contains(',')) {
        let comma = usize::from(!text.is_empty());
        if text.len() + comma + tag.len() > most {
            continue;
        }
        if comma == 1 {
            text.push(',');
        }
        text.push_str(tag);
    }
    text
}

/// Makes what is said `now` of the parts of what was said `before` where they are equal, so that nobody who still holds those
/// holds a second copy.
pub(crate) fn share(before: &[Contribution], now: &mut [Contribution]) {
    for it in now {
        let Some(old) = before.iter().find(|old| old.entry.name == it.entry.name) else { continue };
        if old.entry == it.entry {
            it.entry = old.entry.clone();
            continue;
        }
        let known: BTreeMap<_, _> = old.entry.endpoints.iter().map(|old| (old.endpoint.id, &old.endpoint)).collect();
        for EndpointEntry { endpoint, .. } in &mut Arc::make_mut(&mut it.entry).endpoints {
            if let Some(known) = known.get(&endpoint.id).filter(|known| **known == endpoint) {
                *endpoint = (*known).clone();
            }
        }
    }
}

/// Equal attributes are one value.
#[derive(Debug, Default)]
pub(crate) struct Interned {
    attributes: BTreeSet<Arc<Attributes>>,
    identities: BTreeSet<SpiffeId>,
    zones: BTreeSet<Arc<str>>,
}

impl Interned {
    pub(crate) fn of(&mut self, attributes: Attributes) -> Arc<Attributes> {
        if attributes == Attributes::default() {
            return Attributes::none();
        }
        let attributes = Arc::new(attributes);
        if let Some(known) = self.attributes.get(&attributes) {
            return known.clone();
        }
        self.attributes.insert(attributes.clone());
        attributes
    }

    pub(crate) fn identity(&mut self, identity: SpiffeId) -> SpiffeId {
        if let Some(known) = self.identities.get(&identity) {
            return known.clone();
        }
        self.identities.insert(identity.clone());
        identity
    }

    pub(crate) fn zone(&mut self, zone: &str) -> Arc<str> {
        if let Some(known) = self.zones.get(zone) {
            return known.clone();
        }
        let zone: Arc<str> = zone.into();
        self.zones.insert(zone.clone());
        zone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Nobody is lost, each group is stood for, and only by its lowest; the order of all does not matter.
        #[test]
        fn the_lowest_of_each_group_stand_for_it(all in prop::collection::vec((prop::option::of(0_u8..4), 0_u8..3), 0..12)) {
            let (group, rank) = (|it: (Option<u8>, u8)| it.0, |it: (Option<u8>, u8)| it.1);
            let (stand, behind) = foremost(all.clone(), group, rank);
            for one in &stand {
                prop_assert!(one.0.is_none() || all.iter().all(|other| other.0 != one.0 || other.1 >= one.1));
            }
            for one in &behind {
                prop_assert!(one.0.is_some() && stand.iter().any(|other| other.0 == one.0 && other.1 < one.1));
            }
            let sorted = |mut all: Vec<_>| { all.sort_unstable(); all };
            prop_assert_eq!(sorted([stand.clone(), behind].concat()), sorted(all.clone()));
            let turned = foremost(all.into_iter().rev().collect(), group, rank).0;
            prop_assert_eq!(turned.into_iter().rev().collect::<Vec<_>>(), stand);
        }
    }
}
