//! The look-up tables of a snapshot, made from its services and workloads.
//!
//! Must not know the sources.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    net::{IpAddr, SocketAddr},
};

use super::next;
use crate::model::{Endpoint, Health, Reach, Service, ServicePort, Snapshot, Target};

/// Who has an address when several claim it: the lower one.
type Rank = (u8, bool);

const VIRTUAL: Rank = (0, false);

/// Fills `by_address`, `by_service_number` and `endpoint_numbers`. Numbers are taken over from `previous`.
pub(super) fn fill(snapshot: &mut Snapshot, previous: &Snapshot) {
    let addresses = addresses(snapshot);
    let mut by_service_number = HashMap::with_capacity(addresses.len());
    for service in snapshot.services.values() {
        for port in &service.ports {
            by_service_number.insert(port.id, Target::Service { service: service.name.clone(), port: port.port });
        }
    }
    let targets: BTreeSet<&Target> = addresses.values().map(|(_, target)| target).collect();
    let mut endpoint_numbers = BTreeMap::new();
    for target in targets.into_iter().filter(|target| matches!(target, Target::Endpoint { .. })) {
        let taken = |n| previous.by_service_number.contains_key(&n) || by_service_number.contains_key(&n);
        let known = previous.endpoint_numbers.get(target).copied();
        let number = known.unwrap_or_else(|| next(&mut snapshot.last.service, taken));
        by_service_number.insert(number, target.clone());
        endpoint_numbers.insert(target.clone(), number);
    }
    snapshot.by_address = addresses.into_iter().map(|(addr, (_, target))| (addr, target)).collect();
    snapshot.by_service_number = by_service_number;
    snapshot.endpoint_numbers = endpoint_numbers;
}

fn addresses(snapshot: &Snapshot) -> HashMap<SocketAddr, (Rank, Target)> {
    let mut addresses = HashMap::new();
    for service in snapshot.services.values() {
        for port in &service.ports {
            let target = Target::Service { service: service.name.clone(), port: port.port };
            for ip in [IpAddr::V4(service.vip.v4), IpAddr::V6(service.vip.v6)] {
                claim(&mut addresses, SocketAddr::new(ip, port.port), VIRTUAL, &target);
            }
            for endpoint in &port.endpoints {
                endpoint_addresses(snapshot, service, port, endpoint, &mut addresses);
            }
        }
    }
    addresses
}

fn endpoint_addresses(
    snapshot: &Snapshot,
    service: &Service,
    port: &ServicePort,
    endpoint: &Endpoint,
    addresses: &mut HashMap<SocketAddr, (Rank, Target)>,
) {
    let id = endpoint.id.clone();
    let target = Target::Endpoint { service: service.name.clone(), port: port.port, endpoint: id };
    match &endpoint.reach {
        Reach::Local { task, deliver, .. } => {
            let health = match endpoint.health {
                Health::Healthy => 0,
                Health::Unhealthy => 1,
                Health::Draining => 2,
            };
            // The task's own service before another one that lists its address; a live task before a stopping one;
            // and the port that is really its own before an alias.
            let own = snapshot.workloads.get(task).is_some_and(|workload| workload.service == service.name);
            let rank = (1 + health + if own { 0 } else { 3 }, port.port != deliver.port());
            claim(addresses, endpoint.addr, rank, &target);
            claim(addresses, *deliver, rank, &target);
        }
        Reach::Tunnel { .. } | Reach::Plaintext => {
            claim(addresses, endpoint.addr, (7, port.port != endpoint.addr.port()), &target);
        }
    }
}

fn claim(addresses: &mut HashMap<SocketAddr, (Rank, Target)>, addr: SocketAddr, rank: Rank, target: &Target) {
    match addresses.entry(addr) {
        Entry::Vacant(entry) => {
            entry.insert((rank, target.clone()));
        }
        Entry::Occupied(mut entry) if rank < entry.get().0 => {
            entry.insert((rank, target.clone()));
        }
        Entry::Occupied(_) => {}
    }
}
