//! The kernel's image of the snapshot, and the difference of two images as ordered writes.
//!
//! Must not know how a map is written; only what belongs in it and in which order it is safe to write.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use mesh_common::{
    addr::Addr,
    maps::{Endpoint, EndpointKey, GrantKey, Service, service},
};

use crate::{
    id::ServiceName,
    model::{self, Health, OnAgentDeath, Protocol, Reach, ServicePort, Snapshot, Target, Workload},
    policy::Effect,
};

/// Contents of the maps that follow from the snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    pub services: BTreeMap<Addr, Service>,
    pub endpoints: BTreeMap<EndpointKey, Endpoint>,
    pub grants: BTreeMap<GrantKey, u32>,
}

/// One map write. In the order given, no hook ever sees a service whose slots are not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    PutEndpoint(EndpointKey, Endpoint),
    PutGrant(GrantKey),
    PutService(Addr, Service),
    RemoveService(Addr),
    RemoveGrant(GrantKey),
    RemoveEndpoint(EndpointKey),
}

/// What the kernel must know of a snapshot.
///
/// A virtual address has the slots of its service port, an endpoint's own address has one slot, or two where the
/// endpoint can be connected to directly. Grants are made only where the kernel may connect by itself: directly,
/// or while the agent is away.
pub fn image(snapshot: &Snapshot) -> Image {
    let mut image = Image::default();
    for (addr, target) in &snapshot.by_address {
        let (Target::Service { service: name, port } | Target::Endpoint { service: name, port, .. }) = target;
        let Some(service) = snapshot.services.get(name) else { continue };
        let Some(port) = service.port_index(*port).map(|index| &service.ports[index]) else { continue };
        let value = match target {
            Target::Service { .. } => {
                let healthy = || port.endpoints.iter().filter(|endpoint| endpoint.health == Health::Healthy);
                image.slots(
                    port.id,
                    healthy().filter_map(|e| direct(snapshot, name, e)),
                    healthy().filter_map(|e| open(snapshot, name, e)),
                )
            }
            // Whoever names an endpoint means it, healthy or not.
            Target::Endpoint { endpoint, .. } => {
                let number = snapshot.endpoint_numbers.get(target);
                let (Some(number), Some(endpoint)) = (number, port.endpoint(endpoint)) else { continue };
                image.slots(
                    *number,
                    direct(snapshot, name, endpoint).into_iter(),
                    open(snapshot, name, endpoint).into_iter(),
                )
            }
        };
        let flags = image.flags(snapshot, service, port, value);
        image.services.insert((*addr).into(), Service { flags, ..value });
    }
    image
}

/// Where other tasks of this host can connect to the endpoint without the agent. A task that is listed under another
/// service's name than its own has two policies to pass, which only the agent asks.
fn direct(snapshot: &Snapshot, listed: &ServiceName, endpoint: &model::Endpoint) -> Option<SocketAddr> {
    match &endpoint.reach {
        Reach::Local { deliver, direct: true, .. } => open(snapshot, listed, endpoint).map(|_| *deliver),
        Reach::Local { direct: false, .. } | Reach::Tunnel { .. } | Reach::Plaintext => None,
    }
}

/// Where any task can connect to the endpoint without the mesh.
fn open(snapshot: &Snapshot, listed: &ServiceName, endpoint: &model::Endpoint) -> Option<SocketAddr> {
    let admitted = |owner| snapshot.policy.admits_everybody(owner);
    snapshot.other_owner(endpoint, listed).is_none_or(admitted).then_some(endpoint.addr)
}

impl Image {
    /// Fills the slots of the service `id`: first those for direct connections, then those for everybody.
    fn slots(
        &mut self,
        id: u32,
        local: impl Iterator<Item = SocketAddr>,
        all: impl Iterator<Item = SocketAddr>,
    ) -> Service {
        let mut slot = 0;
        let mut put = |addr: SocketAddr| {
            self.endpoints.insert(EndpointKey { service: id, slot }, Endpoint { addr: addr.into() });
            slot += 1;
        };
        local.for_each(&mut put);
        let before = slot;
        let mut put = |addr: SocketAddr| {
            self.endpoints.insert(EndpointKey { service: id, slot }, Endpoint { addr: addr.into() });
            slot += 1;
        };
        all.for_each(&mut put);
        Service { id, flags: 0, local: before, total: slot }
    }

    fn flags(&mut self, snapshot: &Snapshot, service: &model::Service, port: &ServicePort, value: Service) -> u32 {
        let mut flags = 0;
        if port.protocol == Protocol::Tcp {
            flags |= service::OPAQUE;
        }
        if service.on_agent_death == OnAgentDeath::Open {
            flags |= service::FAIL_OPEN;
        }
        if !snapshot.policy.admits_everybody(&service.name) {
            flags |= service::GRANTED_ONLY;
            let fails_open = flags & service::FAIL_OPEN != 0 && value.total > value.local;
            if fails_open || port.protocol == Protocol::Tcp && value.local > 0 {
                let allowed = |workload: &&Arc<Workload>| {
                    snapshot.policy.decide(&workload.identity, &service.name).effect == Effect::Allow
                };
                let granted = snapshot.workloads.values().filter(allowed);
                let key = |workload: &Arc<Workload>| GrantKey { workload: workload.number, service: value.id };
                self.grants.extend(granted.map(|workload| (key(workload), 1)));
            }
        }
        flags
    }
}

/// The writes that turn `from` into `to`.
///
/// Slots are put before the service that names them, and removed after it. While a slot that direct connections use
/// is overwritten, its service has `local` 0 for a moment: everybody then goes through the agent, and nobody directly
/// to an address that was meant for another purpose.
pub fn diff(from: &Image, to: &Image) -> Vec<Write> {
    let mut writes = Vec::new();
    let puts: Vec<_> = to.endpoints.iter().filter(|(key, value)| from.endpoints.get(key) != Some(value)).collect();
    let overwritten: BTreeSet<EndpointKey> =
        puts.iter().map(|(key, _)| **key).filter(|key| from.endpoints.contains_key(key)).collect();
    for (addr, service) in &from.services {
        let used =
            EndpointKey { service: service.id, slot: 0 }..EndpointKey { service: service.id, slot: service.local };
        if service.local > 0 && overwritten.range(used).next().is_some() {
            writes.push(Write::PutService(*addr, Service { local: 0, ..*service }));
        }
    }
    let suspended = writes.len();
    writes.extend(puts.into_iter().map(|(key, value)| Write::PutEndpoint(*key, *value)));
    writes.extend(to.grants.keys().filter(|key| !from.grants.contains_key(key)).map(|key| Write::PutGrant(*key)));
    let again: BTreeSet<Addr> = writes[..suspended].iter().filter_map(Write::service).collect();
    for (addr, service) in &to.services {
        if from.services.get(addr) != Some(service) || again.contains(addr) {
            writes.push(Write::PutService(*addr, *service));
        }
    }
    writes.extend(
        from.services.keys().filter(|key| !to.services.contains_key(key)).map(|key| Write::RemoveService(*key)),
    );
    writes.extend(from.grants.keys().filter(|key| !to.grants.contains_key(key)).map(|key| Write::RemoveGrant(*key)));
    let gone = from.endpoints.keys().filter(|key| !to.endpoints.contains_key(key));
    writes.extend(gone.map(|key| Write::RemoveEndpoint(*key)));
    writes
}

impl Write {
    /// The service address that is written.
    fn service(&self) -> Option<Addr> {
        match self {
            Self::PutService(addr, _) | Self::RemoveService(addr) => Some(*addr),
            Self::PutEndpoint(..) | Self::PutGrant(_) | Self::RemoveGrant(_) | Self::RemoveEndpoint(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
