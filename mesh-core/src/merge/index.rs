//! The look-up tables of a snapshot, brought up to date with the services that changed.
//!
//! Who gets an address is decided anew only where somebody's claim to it changed, and from all claims, so that the
//! order of changes does not matter. Must not know the sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::OrdMap;
use mesh_common::addr::{Addr, Ip};

use super::{Change, next};
use crate::model::{Destination, Endpoint, Health, Reach, Service, Snapshot, Target};

/// Who has an address when several claim it: the lower one.
type Rank = (u8, bool);
/// A change of one part in so many is large: to fill a table anew costs no more than some of the other work then.
const MANY: usize = 32;
/// Below so many entries it does not matter how full the nodes of a table are.
const FEW: usize = 4096;

/// Brings everything up to date that follows from services and workloads, which are those of `snapshot` already. Numbers
/// are taken over from `previous`.
pub(super) fn update(snapshot: &mut Snapshot, previous: &Snapshot, changes: &[Change]) {
    let mut named = BTreeMap::new();
    for service in changes.iter().filter_map(|change| change.old.as_ref()) {
        named.extend(addresses_of(service).map(|ip| (Ip::from(ip), None)));
    }
    for service in changes.iter().filter_map(|change| change.new.as_ref()) {
        named.extend(addresses_of(service).map(|ip| (Ip::from(ip), Some(service.name.clone()))));
    }
    put(&mut snapshot.by_vip, &named);
    let moves = moves(snapshot, changes);
    number(snapshot, previous, changes, &moves);
}

fn addresses_of(service: &Service) -> [IpAddr; 2] {
    [service.vip.v4.into(), service.vip.v6.into()]
}

/// Settles all claims that changed. Returns who has which address from now on, where that is not who had it.
fn moves(snapshot: &mut Snapshot, changes: &[Change]) -> BTreeMap<Addr, Option<Target>> {
    let mut claims = Vec::new();
    for Change { old, new } in changes {
        let (old, new) = (old.as_deref(), new.as_deref());
        old.into_iter().for_each(|service| claim(service, |addr, target| claims.push((addr, false, target))));
        new.into_iter().for_each(|service| claim(service, |addr, target| claims.push((addr, true, target))));
    }
    // What is given up comes before what is claimed.
    claims.sort_unstable();
    let mut moves = BTreeMap::new();
    for group in claims.chunk_by(|(a, ..), (b, ..)| a == b) {
        let Some((addr, ..)) = group.first() else { continue };
        let owner = snapshot.by_address.get(addr).map(|destination| &destination.target);
        let mut claimants = match snapshot.contested.get(addr) {
            Some(all) => BTreeSet::clone(all),
            None => owner.cloned().into_iter().collect(),
        };
        for (_, claims, target) in group {
            if *claims {
                claimants.insert(target.clone());
            } else {
                claimants.remove(target);
            }
        }
        let winner = claimants.iter().min_by_key(|target| (rank(snapshot, *addr, target), *target));
        if winner != owner {
            moves.insert(*addr, winner.cloned());
        }
        if claimants.len() > 1 {
            if snapshot.contested.get(addr).is_none_or(|before| **before != claimants) {
                snapshot.contested.insert(*addr, Arc::new(claimants));
            }
        } else {
            snapshot.contested.remove(addr);
        }
    }
    moves
}

/// All addresses that a service, its ports and endpoints claim.
pub(super) fn claim(service: &Service, mut push: impl FnMut(Addr, Target)) {
    for port in &service.ports {
        for ip in addresses_of(service) {
            let target = Target::Service { service: service.name.clone(), port: port.port };
            push(SocketAddr::new(ip, port.port).into(), target);
        }
        for endpoint in &port.endpoints {
            for addr in endpoint.addresses() {
                let service = service.name.clone();
                push(addr.into(), Target::Endpoint { service, port: port.port, endpoint: endpoint.id });
            }
        }
    }
}

pub(super) fn rank(snapshot: &Snapshot, addr: Addr, target: &Target) -> Rank {
    let Some((service, endpoint)) = endpoint_of(snapshot, target) else { return (0, false) };
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
            (1 + health + if own { 0 } else { 3 }, target.port() != deliver.port())
        }
        Reach::Tunnel { .. } | Reach::Plaintext => (7, target.port() != addr.port()),
    }
}

/// The endpoint that a target is, and its service; `None` for a service port.
fn endpoint_of<'a>(snapshot: &'a Snapshot, target: &Target) -> Option<(&'a Service, &'a Arc<Endpoint>)> {
    let Target::Endpoint { service, port, endpoint } = target else { return None };
    let service = snapshot.services.get(service)?;
    Some((service, service.ports[service.port_index(*port)?].endpoint(endpoint)?))
}

/// Carries out the moves, with a number for every destination that has an address.
fn number(snapshot: &mut Snapshot, previous: &Snapshot, changes: &[Change], moves: &BTreeMap<Addr, Option<Target>>) {
    // Service ports have theirs already.
    for service in changes.iter().filter_map(|change| change.new.as_deref()) {
        for port in &service.ports {
            if !snapshot.by_service_number.contains_key(&port.id) {
                let target = Target::Service { service: service.name.clone(), port: port.port };
                let destination = Destination { number: port.id, target };
                snapshot.by_service_number.insert(port.id, Arc::new(destination));
            }
        }
    }
    let winners: BTreeSet<&Target> = moves.values().flatten().collect();
    let mut destinations = BTreeMap::new();
    let mut numbered = Vec::new();
    for target in winners {
        let known = match target {
            Target::Service { service, port } => snapshot.services.get(service).and_then(|service| {
                snapshot.by_service_number.get(&service.ports[service.port_index(*port)?].id).cloned()
            }),
            Target::Endpoint { .. } => held(previous, target).next().cloned(),
        };
        let destination = known.unwrap_or_else(|| {
            let taken = |n| previous.by_service_number.contains_key(&n) || snapshot.by_service_number.contains_key(&n);
            let number = next(&mut snapshot.last.service, taken);
            Arc::new(Destination { number, target: target.clone() })
        });
        numbered.push((destination.number, destination.clone()));
        destinations.insert(target, destination);
    }
    for (number, destination) in dense(numbered.iter()) {
        snapshot.by_service_number.insert(*number, destination.clone());
    }
    let has = |winner: &Option<Target>| winner.as_ref().and_then(|winner| destinations.get(winner)).cloned();
    put(&mut snapshot.by_address, &moves.iter().map(|(addr, winner)| (*addr, has(winner))).collect());
    // Whoever has lost its last address is no destination any more.
    let losers = moves.keys().filter_map(|addr| previous.by_address.get(addr));
    let gone: Vec<u32> = losers
        .filter(|destination| match &destination.target {
            Target::Service { service, port } => {
                snapshot.services.get(service).is_none_or(|service| service.port_index(*port).is_none())
            }
            target @ Target::Endpoint { .. } => held(snapshot, target).next().is_none(),
        })
        .map(|destination| destination.number)
        .collect();
    for number in gone {
        snapshot.by_service_number.remove(&number);
    }
}

/// Gives keys the values that they have from now on, or none.
///
/// Where many change, all nodes would be divided and left half empty, if it happened little by little as well. So the map is
/// filled anew then.
fn put<K: Copy + Ord, V: Clone>(map: &mut OrdMap<K, V>, changes: &BTreeMap<K, Option<V>>) {
    if changes.len() * MANY < map.len().max(FEW) {
        for (key, value) in changes {
            match value {
                Some(value) => drop(map.insert(*key, value.clone())),
                None => drop(map.remove(key)),
            }
        }
        return;
    }
    let stay = map.iter().filter(|(key, _)| !changes.contains_key(*key)).map(|(key, value)| (*key, value));
    let come = changes.iter().filter_map(|(key, value)| Some((*key, value.as_ref()?)));
    let mut all: Vec<_> = stay.chain(come).collect();
    all.sort_unstable_by_key(|(key, _)| *key);
    let filled = dense(all.iter()).map(|(key, value)| (*key, (*value).clone())).collect();
    *map = filled;
}

/// Every other one, then those between. A B-tree that is filled in order is left with nodes half empty; those between
/// fill them up.
fn dense<T>(sorted: impl Iterator<Item = T> + Clone) -> impl Iterator<Item = T> {
    sorted.clone().step_by(2).chain(sorted.skip(1).step_by(2))
}

/// The endpoint as the destination that it is, once for each address that it has.
fn held<'a>(snapshot: &'a Snapshot, target: &'a Target) -> impl Iterator<Item = &'a Arc<Destination>> {
    let endpoint = endpoint_of(snapshot, target).map(|(_, endpoint)| endpoint);
    let destinations = endpoint.into_iter().flat_map(|endpoint| endpoint.addresses());
    destinations
        .filter_map(|addr| snapshot.by_address.get(&Addr::from(addr)))
        .filter(move |destination| destination.target == *target)
}
