//! That registering comes to rest whatever was there before.

use proptest::prelude::*;

use super::*;
use crate::{arb, config::discovery::Registration as Config, registration::owner};

fn config() -> Config {
    let (ttl, deregister_after) = (std::time::Duration::from_secs(30), std::time::Duration::from_secs(600));
    Config { ttl, deregister_after, tags: vec!["mesh".into()] }
}

fn perform(actions: Vec<Action>, observed: &mut Vec<Observed>) {
    for action in actions {
        match action {
            Action::Deregister { id } => observed.retain(|it| it.id != id),
            Action::Register(Registration { id, name, addr, tags, meta, .. }) => {
                observed.retain(|it| it.id != id);
                observed.push(Observed { id, name, addr: Some(addr), tags, meta });
            }
        }
    }
}

fn observed() -> impl Strategy<Value = Vec<Observed>> {
    let one =
        (0_u8..6, any::<bool>(), prop::option::of(Just("10.90.1.10:32768"))).prop_map(|(n, ours, addr)| Observed {
            id: if ours { format!("ecs-mesh:10.90.1.10:32768:task-{n}") } else { format!("other-{n}") },
            name: "web".into(),
            addr: addr.map(|addr| addr.parse().expect("a literal")),
            tags: BTreeSet::new(),
            meta: if ours {
                [(meta::OWNER.to_owned(), "ecs-mesh@10.90.1.10".to_owned())].into()
            } else {
                BTreeMap::new()
            },
        });
    prop::collection::btree_map(0_u8..12, one, 0..8).prop_map(|map| {
        let mut all: Vec<Observed> = map.into_values().collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all.dedup_by(|a, b| a.id == b.id);
        all
    })
}

proptest! {
    /// Whatever was registered, afterwards it is what is wanted, and nothing of others was touched; then it rests.
    #[test]
    fn it_converges_and_rests(world in arb::world(), mut there in observed()) {
        let snapshot = world.snapshot();
        let desired = desired(&snapshot, &world.tasks, world.tunnel, &config());
        let owner = owner(world.host);
        let others: Vec<_> = there.iter().filter(|it| it.id.starts_with("other")).cloned().collect();
        perform(actions(&desired, &there, &owner), &mut there);
        prop_assert_eq!(actions(&desired, &there, &owner), vec![]);
        let left: Vec<_> = there.iter().filter(|it| it.id.starts_with("other")).cloned().collect();
        prop_assert_eq!(left, others);
        let ours: BTreeSet<_> = there.iter().filter(|it| !it.id.starts_with("other")).map(|it| it.id.clone()).collect();
        prop_assert_eq!(ours, desired.keys().cloned().collect::<BTreeSet<_>>());
    }

    /// What another agent reads of a registration is what the static file would say of the task.
    #[test]
    fn meta_fits_into_consul(world in arb::world()) {
        for registration in desired(&world.snapshot(), &world.tasks, world.tunnel, &config()).values() {
            prop_assert!(registration.meta.len() <= META_LIMITS.0);
            prop_assert!(registration.meta.contains_key(meta::AGENT) && registration.meta.contains_key(meta::IDENTITY));
            prop_assert!(registration.addr.port() != 0 && !registration.addr.ip().is_loopback());
        }
    }
}
