//! The kernel's image of the snapshot, and the difference of two images as ordered writes.
//!
//! Must not know how a map is written; only what belongs in it and in which order it is safe to write.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use imbl::ordmap::DiffItem;
use mesh_common::{
    addr::{Addr, Ip},
    maps::{Endpoint, EndpointKey, GrantKey, Service, service},
};

use crate::{
    id::ServiceName,
    model::{self, Destination, Health, OnAgentDeath, Protocol, Reach, ServicePort, Snapshot, Target, Workload},
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
    for (addr, destination) in &snapshot.by_address {
        image.put(snapshot, *addr, destination);
    }
    image
}

/// The part of the image that is about one address.
pub fn image_at(snapshot: &Snapshot, addr: SocketAddr) -> Image {
    let mut image = Image::default();
    let addr = Addr::from(addr);
    if let Some(destination) = snapshot.by_address.get(&addr) {
        image.put(snapshot, addr, destination);
    }
    image
}

/// The images of two snapshots without what is the same in both, at a cost that goes with the difference: their [`diff`]
/// is that of the whole images.
///
/// What the kernel knows of a destination follows from its service, from the policy, and from who works here. So these
/// are compared, and the images are made of the destinations that one of them is about.
pub fn around(from: &Snapshot, to: &Snapshot) -> (Image, Image) {
    if from.policy != to.policy {
        return (image(from), image(to));
    }
    let mut targets = BTreeSet::new();
    let services = from.services.diff(&to.services).flat_map(|change| match change {
        DiffItem::Add(_, service) | DiffItem::Remove(_, service) => [Some(service), None],
        DiffItem::Update { old: (_, old), new: (_, new) } => [Some(old), Some(new)],
    });
    services.flatten().for_each(|service| targets_around(service, [from, to], &mut targets));
    if from.workloads != to.workloads {
        let guarded = to.services.values().filter(|service| !service.admits_everybody(&to.policy));
        guarded.for_each(|service| targets_around(service, [from, to], &mut targets));
    }
    let part = |snapshot: &Snapshot| {
        let mut image = Image::default();
        for target in &targets {
            for addr in addresses(snapshot, target) {
                match snapshot.by_address.get(&addr) {
                    Some(destination) if destination.target == **target => image.put(snapshot, addr, destination),
                    Some(_) | None => {}
                }
            }
        }
        image
    };
    (part(from), part(to))
}

/// Whoever has an address that the service claims, in either snapshot.
fn targets_around<'a>(service: &model::Service, snapshots: [&'a Snapshot; 2], targets: &mut BTreeSet<&'a Target>) {
    for port in &service.ports {
        let own = service_addresses(service, port);
        let endpoints = port.endpoints.iter().flat_map(|endpoint| endpoint.addresses()).map(Addr::from);
        for addr in own.into_iter().chain(endpoints) {
            let owners = snapshots.iter().filter_map(|snapshot| snapshot.by_address.get(&addr));
            targets.extend(owners.map(|destination| &destination.target));
        }
    }
}

/// The addresses that may be the target's.
fn addresses(snapshot: &Snapshot, target: &Target) -> Vec<Addr> {
    let Some(service) = snapshot.services.get(target.service()) else { return Vec::new() };
    let Some(port) = service.port_index(target.port()).map(|index| &service.ports[index]) else { return Vec::new() };
    match target {
        Target::Service { .. } => service_addresses(service, port).into(),
        Target::Endpoint { endpoint, .. } => {
            port.endpoint(endpoint).into_iter().flat_map(|endpoint| endpoint.addresses()).map(Addr::from).collect()
        }
    }
}

fn service_addresses(service: &model::Service, port: &ServicePort) -> [Addr; 2] {
    [Addr::new(Ip::v4(service.vip.v4.octets()), port.port), Addr::new(Ip(service.vip.v6.octets()), port.port)]
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
    snapshot.other_owner(endpoint, listed).is_none_or(admitted).then_some(endpoint.addr())
}

impl Image {
    /// Adds what the kernel must know of an address.
    fn put(&mut self, snapshot: &Snapshot, addr: Addr, destination: &Destination) {
        let Destination { number, target } = destination;
        let name = target.service();
        let Some(service) = snapshot.services.get(name) else { return };
        let Some(port) = service.port_index(target.port()).map(|index| &service.ports[index]) else { return };
        let value = match target {
            Target::Service { .. } => {
                let healthy = || port.endpoints.iter().filter(|endpoint| endpoint.health == Health::Healthy);
                self.slots(
                    *number,
                    healthy().filter_map(|e| direct(snapshot, name, e)),
                    healthy().filter_map(|e| open(snapshot, name, e)),
                )
            }
            // Whoever names an endpoint means it, healthy or not.
            Target::Endpoint { endpoint, .. } => {
                let Some(endpoint) = port.endpoint(endpoint) else { return };
                self.slots(
                    *number,
                    direct(snapshot, name, endpoint).into_iter(),
                    open(snapshot, name, endpoint).into_iter(),
                )
            }
        };
        let flags = self.flags(snapshot, service, port, value);
        self.services.insert(addr, Service { flags, ..value });
    }

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
        if !service.admits_everybody(&snapshot.policy) {
            flags |= service::GRANTED_ONLY;
            let fails_open = flags & service::FAIL_OPEN != 0 && value.total > value.local;
            if fails_open || port.protocol == Protocol::Tcp && value.local > 0 {
                let allowed = |workload: &&Arc<Workload>| {
                    service.verdict(&snapshot.policy, &workload.identity).effect == Effect::Allow
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
