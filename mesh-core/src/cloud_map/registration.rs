//! This host's tasks as instances of Cloud Map: their ids and attributes, within what Cloud Map takes.
//!
//! Which tasks, and under which names, is [`crate::registration`]'s to say. Must not know what Cloud Map knows already.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::entries::attribute;
use crate::{
    config::cloud_map,
    instance::{joined, meta},
    model::Snapshot,
    registration::{self, Form, OWN_META, Registration},
    task::Task,
};

/// An instance: the service's name, and the instance's id, which is unique in its service only.
pub type Key = (Arc<str>, String);

/// An instance as it has to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub attributes: BTreeMap<String, String>,
    /// Whether it may be used.
    pub ready: bool,
}

/// What Cloud Map takes: characters of an id, attributes of an instance, characters of a key, of a value, and of all
/// keys and values together.
const ID: usize = 64;
const ATTRIBUTES: usize = 30;
const KEY: usize = 255;
const VALUE: usize = 1024;
const ALL: usize = 5000;
/// Attributes besides [`OWN_META`]: address, port, tags; and how an instance begins.
const OWN: usize = OWN_META + 4;

/// Everything of this host that has to be registered.
pub fn desired(
    snapshot: &Snapshot,
    tasks: &[Task],
    tunnel: SocketAddr,
    config: &cloud_map::Registration,
) -> BTreeMap<Key, Wanted> {
    let form = Form { tags: &config.tags, meta: ATTRIBUTES - OWN, takes };
    let all = registration::desired(snapshot, tasks, tunnel, &form);
    let wanted = all.into_values().map(|it| {
        let key = (it.name.as_str().into(), id(&it.id));
        (key, Wanted { ready: it.ready, attributes: attributes(it) })
    });
    wanted.collect()
}

fn takes(key: &str, value: &str) -> bool {
    (1..=KEY).contains(&key.len())
        && key.bytes().all(|b| b.is_ascii_graphic())
        && !key.starts_with(attribute::PREFIX)
        && is_value(value)
}

fn is_value(text: &str) -> bool {
    text.len() <= VALUE
        && text.bytes().all(|b| b.is_ascii_graphic() || matches!(b, b' ' | b'\t'))
        && text.trim() == text
}

/// What is too long ends early. The address comes first, so that two instances at a time never have the same id.
fn id(text: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '/' | ':' | '.' | '@' | '-');
    text.chars().filter(|c| allowed(*c)).take(ID).collect()
}

fn attributes(it: Registration) -> BTreeMap<String, String> {
    let address = match it.addr.ip() {
        IpAddr::V4(_) => attribute::IPV4,
        IpAddr::V6(_) => attribute::IPV6,
    };
    let (own, said): (BTreeMap<_, _>, BTreeMap<_, _>) =
        it.meta.into_iter().partition(|(key, _)| key.starts_with(meta::PREFIX));
    let mut attributes = own;
    attributes.insert(address.to_owned(), it.addr.ip().to_string());
    attributes.insert(attribute::PORT.to_owned(), it.addr.port().to_string());
    let tags: BTreeSet<String> = it.tags.into_iter().filter(|tag| is_value(tag)).collect();
    let tags = joined(&tags, VALUE);
    if !tags.is_empty() {
        attributes.insert(meta::TAGS.to_owned(), tags);
    }
    attributes.retain(|_, value| is_value(value));
    let size = |key: &str, value: &str| key.len() + value.len();
    // How it begins may come along.
    let first = size(attribute::FIRST_HEALTH, attribute::UNHEALTHY);
    let mut left = ALL.saturating_sub(first + attributes.iter().map(|(key, value)| size(key, value)).sum::<usize>());
    for (key, value) in said {
        // What a task says of itself gives way to what the mesh needs.
        let Some(rest) = left.checked_sub(size(&key, &value)) else { continue };
        left = rest;
        attributes.insert(key, value);
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        arb::{self, World, bridge_task},
        cloud_map::entries::{Instance, Said, entries},
        config::cloud_map::tests::{cloud_map, registration},
        task::NetworkMode,
    };
    use proptest::prelude::*;

    const TUNNEL: &str = "10.90.1.10:15008";

    fn wanted(task: Task) -> (Key, Wanted) {
        let world = World { tasks: vec![task], ..World::default() };
        let tunnel = TUNNEL.parse().expect("a literal");
        let mut all = desired(&world.snapshot(), &world.tasks, tunnel, &registration("tags = [\"ecs\", \"a b\"]"));
        assert_eq!(all.len(), 1, "{all:?}");
        all.pop_first().expect("one")
    }

    #[test]
    fn a_task_has_what_the_reader_looks_for() {
        let mut task = bridge_task("t1", "world", "172.17.0.2", &[8080]);
        task.labels.insert("ecs-mesh.meta.version".into(), "2".into());
        task.labels.insert("ecs-mesh.meta.AWS_INSTANCE_IPV4".into(), "10.6.6.6".into());
        let ((name, id), wanted) = wanted(task);
        assert_eq!((&*name, id.as_str()), ("world", "ecs-mesh:10.90.1.10:32768:t1"));
        assert_eq!(wanted.attributes["AWS_INSTANCE_IPV4"], "10.90.1.10");
        let instance = Instance { id, health: Said::Healthy, attributes: wanted.attributes };
        let (read, problems) = entries(&"world".parse().expect("valid"), None, &[instance], &cloud_map(""));
        assert!(problems.is_empty(), "{problems:?}");
        let endpoint = &read[0].entry.endpoints[0].endpoint;
        assert_eq!((endpoint.addr().to_string().as_str(), endpoint.agent()), ("10.90.1.10:32768", TUNNEL.parse().ok()));
        assert_eq!(endpoint.identity.as_ref().map(|id| id.as_str()), Some("spiffe://a/ns/demo/sa/world"));
        assert_eq!(endpoint.attributes.tags.iter().collect::<Vec<_>>(), ["a b", "ecs"]);
        assert_eq!(endpoint.attributes.meta["version"], "2");
    }

    #[test]
    fn an_id_keeps_the_rules() {
        let long = "9".repeat(64);
        let task = Task { mode: NetworkMode::Awsvpc, ..bridge_task(&long, "world", "2001:db8::7", &[8080]) };
        let ((_, id), wanted) = wanted(task);
        assert!(id.len() == 64 && id.starts_with("ecs-mesh:2001:db8::7:8080:999"), "{id}");
        assert_eq!(wanted.attributes["AWS_INSTANCE_IPV6"], "2001:db8::7");
    }

    #[test]
    fn too_much_is_cut() {
        let mut task = bridge_task("t1", "world", "172.17.0.2", &[8080]);
        let tags: Vec<String> = (0..500).map(|n| format!("tag-{n}")).collect();
        task.labels.insert("ecs-mesh.tags".into(), tags.join(","));
        for n in 0..40 {
            task.labels.insert(format!("ecs-mesh.meta.key-{n}"), "v".repeat(600));
        }
        task.labels.insert("ecs-mesh.meta.odd".into(), "ä".into());
        let (_, Wanted { attributes, .. }) = wanted(task);
        let size: usize = attributes.iter().map(|(key, value)| key.len() + value.len()).sum();
        assert!(size <= ALL && size > ALL - 700, "{size}");
        assert!(attributes.contains_key(meta::AGENT) && !attributes.contains_key("odd"));
        assert!(attributes[meta::TAGS].len() <= VALUE && attributes[meta::TAGS].len() > VALUE - 10);
    }

    proptest! {
        /// Whatever the world is like, Cloud Map takes it.
        #[test]
        fn it_fits_into_cloud_map(world in arb::world()) {
            for ((_, id), wanted) in desired(&world.snapshot(), &world.tasks, world.tunnel, &registration("")) {
                let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_/:.@-".contains(&b);
                prop_assert!((1..=ID).contains(&id.len()) && id.bytes().all(allowed), "{}", id);
                prop_assert!(wanted.attributes.len() < ATTRIBUTES);
                prop_assert!(wanted.attributes.contains_key(meta::AGENT));
                prop_assert!(wanted.attributes.values().all(|value| is_value(value)));
            }
        }
    }
}
