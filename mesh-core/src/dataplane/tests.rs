//! The image of a snapshot, and the promise that no prefix of a difference shows a service without its slots.

use proptest::prelude::*;

use super::*;
use crate::{
    arb::{self, World, bridge_task},
    merge::{self, Merged},
    services,
    task::{ContainerHealth, NetworkMode, Task},
};

const FILE: &str = r#"
[[service]]
name = "cache"
on_agent_death = "closed"
ports = [ { port = 6379 } ]
[[service.endpoint]]
address = "10.90.1.11:6379"
agent = "10.90.1.11:15008"
[policy]
[[policy.rule]]
name = "no-batch"
effect = "deny"
from = ["spiffe://a/ns/demo/sa/batch"]
to = ["cache"]
"#;

fn apply(image: &mut Image, write: &Write) {
    match write {
        Write::PutEndpoint(key, value) => drop(image.endpoints.insert(*key, *value)),
        Write::PutGrant(key) => drop(image.grants.insert(*key, 1)),
        Write::PutService(key, value) => drop(image.services.insert(*key, *value)),
        Write::RemoveService(key) => assert!(image.services.remove(key).is_some()),
        Write::RemoveGrant(key) => assert!(image.grants.remove(key).is_some()),
        Write::RemoveEndpoint(key) => assert!(image.endpoints.remove(key).is_some()),
    }
}

/// Addresses to which the hooks may connect directly for a key.
fn directly(image: &Image, service: &Service) -> BTreeSet<Addr> {
    let slot = |slot| image.endpoints.get(&EndpointKey { service: service.id, slot }).map(|endpoint| endpoint.addr);
    (0..service.local).filter_map(slot).collect()
}

fn slots_exist(image: &Image) -> Result<(), TestCaseError> {
    for service in image.services.values() {
        prop_assert!(service.local <= service.total);
        for slot in 0..service.total {
            prop_assert!(
                image.endpoints.contains_key(&EndpointKey { service: service.id, slot }),
                "{service:?} {slot}"
            );
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn the_writes_lead_from_one_to_the_other_and_are_safe_on_the_way(worlds in prop::collection::vec(arb::world(), 1..4)) {
        let (mut snapshot, mut now) = (Snapshot::default(), Image::default());
        for world in &worlds {
            snapshot = world.after(&snapshot);
            let (before, after) = (now.clone(), image(&snapshot));
            slots_exist(&after)?;
            for write in diff(&before, &after) {
                apply(&mut now, &write);
                slots_exist(&now)?;
                for (addr, service) in &now.services {
                    let allowed = |image: &Image| image.services.get(addr).map(|service| directly(image, service)).unwrap_or_default();
                    let (old, new) = (allowed(&before), allowed(&after));
                    let direct = directly(&now, service);
                    prop_assert!(direct.iter().all(|a| old.contains(a) || new.contains(a)), "{direct:?} {old:?} {new:?}");
                }
            }
            prop_assert_eq!(&now, &after);
            prop_assert!(diff(&after, &after).is_empty());
        }
    }

    #[test]
    fn the_difference_of_two_snapshots_is_that_of_their_images(worlds in arb::worlds()) {
        let mut last = Merged::default();
        for world in &worlds {
            let next = merge::merge(&last, &world.sources());
            let (before, after) = (image(&last.snapshot), image(&next.snapshot));
            let (from, to) = around(&last.snapshot, &next.snapshot);
            prop_assert_eq!(diff(&from, &to), diff(&before, &after));
            prop_assert_eq!(after.services.len() - to.services.len(), before.services.len() - from.services.len());
            prop_assert_eq!(after.endpoints.len() - to.endpoints.len(), before.endpoints.len() - from.endpoints.len());
            prop_assert_eq!(after.grants.len() - to.grants.len(), before.grants.len() - from.grants.len());
            last = next;
        }
    }

    #[test]
    fn an_image_says_what_the_snapshot_says(world in arb::world()) {
        let snapshot = world.snapshot();
        let image = image(&snapshot);
        prop_assert_eq!(image.services.len(), snapshot.by_address.len());
        let used: usize = image.services.values().map(|s| (s.id, s.total)).collect::<BTreeSet<_>>().iter().map(|(_, n)| *n as usize).sum();
        prop_assert_eq!(used, image.endpoints.len(), "no slot without a service");
        for (addr, destination) in &snapshot.by_address {
            let value = &image.services[addr];
            prop_assert_eq!(snapshot.by_service_number.get(&value.id), Some(destination));
            let target = &destination.target;
            let (Target::Service { service: name, port } | Target::Endpoint { service: name, port, .. }) = target;
            let service = &snapshot.services[name];
            let port = &service.ports[service.port_index(*port).expect("a port")];
            prop_assert_eq!(value.flags & service::FAIL_OPEN != 0, service.on_agent_death == OnAgentDeath::Open);
            prop_assert_eq!(value.flags & service::OPAQUE != 0, port.protocol == Protocol::Tcp);
            for workload in snapshot.workloads.values() {
                let may = service.verdict(&snapshot.policy, &workload.identity).effect == Effect::Allow;
                let granted = value.flags & service::GRANTED_ONLY == 0
                    || image.grants.contains_key(&GrantKey { workload: workload.number, service: value.id });
                prop_assert!(may || !granted, "the kernel must not allow what the policy denies");
                let direct = value.flags & service::OPAQUE != 0 && value.local > 0;
                if may && (direct || value.flags & service::FAIL_OPEN != 0 && value.total > value.local) {
                    prop_assert!(granted);
                }
            }
            for endpoint in &port.endpoints {
                let direct = directly(&image, value);
                if let Reach::Local { deliver, direct: false, .. } = &endpoint.reach {
                    prop_assert!(!direct.contains(&Addr::from(*deliver)));
                }
                if snapshot.other_owner(endpoint, name).is_some_and(|owner| !snapshot.policy.admits_everybody(owner)) {
                    let Reach::Local { deliver, .. } = &endpoint.reach else { unreachable!("only those have owners") };
                    prop_assert!(!direct.contains(&Addr::from(*deliver)), "the owner's policy was not asked");
                }
            }
        }
    }
}

#[test]
fn a_service_whose_slot_changes_is_direct_again_afterwards() {
    let addr = |text: &str| Addr::from(text.parse::<SocketAddr>().expect("a literal"));
    let service = Service { id: 1, flags: service::OPAQUE, local: 1, total: 2 };
    let image = |local: &str| Image {
        services: [(addr("240.240.0.1:80"), service)].into(),
        endpoints: [(0, local), (1, "10.0.0.9:1")]
            .map(|(slot, at)| (EndpointKey { service: 1, slot }, Endpoint { addr: addr(at) }))
            .into(),
        grants: BTreeMap::new(),
    };
    let (before, after) = (image("10.0.0.1:80"), image("10.0.0.2:80"));
    let mut now = before.clone();
    for write in diff(&before, &after) {
        apply(&mut now, &write);
    }
    assert_eq!(now, after);
}

fn shown(world: &World) -> Vec<String> {
    let snapshot = world.snapshot();
    let image = image(&snapshot);
    let mut lines = Vec::new();
    for (addr, service) in &image.services {
        let slots = (0..service.total).map(|slot| {
            let addr = image.endpoints[&EndpointKey { service: service.id, slot }].addr;
            SocketAddr::from(addr).to_string()
        });
        let addr = SocketAddr::from(*addr);
        let virtual_one = snapshot.services.values().find(|s| addr.ip() == s.vip.v4);
        let name = virtual_one.map_or(addr.to_string(), |service| format!("{}:{}", service.name, addr.port()));
        if addr.ip().to_string().starts_with("fd65") {
            continue;
        }
        lines.push(format!(
            "{name} flags={} local={} [{}]",
            service.flags,
            service.local,
            slots.collect::<Vec<_>>().join(" ")
        ));
    }
    lines.sort();
    lines
}

#[test]
fn an_image_by_example() {
    let mut unwell = bridge_task("c2", "cache", "172.17.0.3", &[6379]);
    unwell.containers[0].published[0].host.set_port(32_800);
    unwell.containers[0].health = Some(ContainerHealth::Unhealthy);
    let eni = Task { mode: NetworkMode::Awsvpc, ..bridge_task("w", "web", "10.0.0.9", &[80]) };
    let tasks = vec![
        bridge_task("c1", "cache", "172.17.0.2", &[6379]),
        unwell,
        eni,
        bridge_task("b", "batch", "172.17.0.4", &[]),
    ];
    let world = World { sets: vec![services::parse(FILE).expect("parses")], tasks, ..World::default() };
    // flags: 1 opaque, 2 fail-open, 4 granted only
    assert_eq!(
        shown(&world),
        [
            "10.0.0.9:80 flags=2 local=0 [10.0.0.9:80]",
            "10.90.1.10:32768 flags=5 local=1 [172.17.0.2:6379 10.90.1.10:32768]",
            "10.90.1.10:32800 flags=5 local=1 [172.17.0.3:6379 10.90.1.10:32800]",
            "10.90.1.11:6379 flags=5 local=0 [10.90.1.11:6379]",
            "172.17.0.2:6379 flags=5 local=1 [172.17.0.2:6379 10.90.1.10:32768]",
            "172.17.0.3:6379 flags=5 local=1 [172.17.0.3:6379 10.90.1.10:32800]",
            "cache:6379 flags=5 local=1 [172.17.0.2:6379 10.90.1.10:32768 10.90.1.11:6379]",
            "web:80 flags=2 local=0 [10.0.0.9:80]",
        ]
    );
    let snapshot = world.snapshot();
    let granted: BTreeSet<_> =
        image(&snapshot).grants.keys().map(|key| snapshot.by_number[&key.workload].task.to_string()).collect();
    assert_eq!(granted, ["c1", "c2", "w"].map(String::from).into(), "all but batch");
}
