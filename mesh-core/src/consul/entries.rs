//! From the instances of one Consul service to what a source says about services: the service itself, one for each of
//! its tags, and the same under the name of another datacenter.
//!
//! Must not know how an instance was learnt.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use super::answer::{Instance, Status};
use crate::{
    config::discovery::{Consul, Health, TagNames},
    id::ServiceName,
    instance::{Contribution, Interned, foremost, meshed, meta, missing, owners, ports, service},
    model::Endpoint,
    owners::Owners,
    resolve::{of_datacenter, of_tag},
    services::{Attributes, DEFAULT_WEIGHT, EndpointEntry, MAX_WEIGHT},
};

/// Meta of an instance, or of its node, that names its zone, in order of precedence.
const ZONES: [&str; 4] = [meta::ZONE, "zone", "availability-zone", "availability_zone"];
/// Whether an instance may be chosen.
pub fn is_usable(instance: &Instance, health: Health) -> bool {
    match health {
        Health::Passing => instance.status == Status::Passing,
        Health::Warning => instance.status <= Status::Warning,
    }
}

/// What the instances of `name` in a datacenter say about services; `datacenter` is `None` at home. The second is what
/// was left out, and why.
///
/// The service is there also when no instance is usable: it exists, and nobody serves it at the moment.
pub fn entries(
    name: &ServiceName,
    datacenter: Option<&str>,
    instances: &[Instance],
    config: &Consul,
) -> (Vec<Contribution>, Vec<String>) {
    let (counting, behind) = foremost(instances.iter().collect(), |it| Some(it.addr), |it| missing(&it.meta));
    let mut twins: BTreeMap<SocketAddr, Vec<&Instance>> = BTreeMap::new();
    for twin in behind {
        twins.entry(twin.addr).or_default().push(twin);
    }
    let usable: Vec<&Instance> = counting.into_iter().filter(|instance| is_usable(instance, config.health)).collect();
    let mut problems = Vec::new();
    let named = |tag: Option<&str>| {
        let name = match tag {
            Some(tag) => of_tag(name, tag),
            None => Some(name.clone()),
        };
        match datacenter {
            Some(datacenter) => name.and_then(|name| of_datacenter(&name, datacenter)),
            None => name,
        }
    };
    let mut interned = Interned::default();
    let mut endpoints: Vec<(&Instance, EndpointEntry)> = Vec::with_capacity(usable.len());
    for instance in usable {
        for endpoint in endpoints_of(instance, &mut interned, &mut problems) {
            endpoints.push((instance, endpoint));
        }
    }
    let mut found = Vec::new();
    // The names behind that of a tag: the datacenter's, and the one at home.
    let elsewhere = datacenter.and_then(|_| named(None));
    let behind = |tag: Option<&str>| {
        let at_home = (tag.is_some() || elsewhere.is_some()).then(|| name.clone());
        tag.and_then(|_| elsewhere.clone()).into_iter().chain(at_home).collect::<Vec<_>>()
    };
    if let Some(service) = named(None) {
        let owners = owners(name, &behind(None), endpoints.iter().map(|(instance, _)| &instance.meta));
        let all = endpoints.iter().map(|(_, endpoint)| endpoint.clone()).collect();
        found.push(Contribution::of(service, all, true, owners));
    }
    // A service of the mesh of which Consul knows each port by a name of its own.
    let mut others: BTreeMap<ServiceName, Vec<EndpointEntry>> = BTreeMap::new();
    for (instance, endpoint) in &endpoints {
        if let Some(service) = service(&instance.meta).filter(|service| service != name) {
            others.entry(service).or_default().push(endpoint.clone());
        }
    }
    for (service, endpoints) in others {
        let owners = datacenter.and_then(|_| Owners::of([vec![service.clone()]]));
        let service = datacenter.map_or(Some(service.clone()), |datacenter| of_datacenter(&service, datacenter));
        found.extend(service.map(|service| Contribution::of(service, endpoints, false, owners)));
    }
    // Of all instances, so that a tag's name does not vanish with the health of those that bear it.
    let tags: BTreeSet<&str> = instances.iter().flat_map(|instance| &instance.tags).map(String::as_str).collect();
    for tag in tags.into_iter().filter(|tag| wants(&config.tag_names, tag)) {
        let Some(service) = named(Some(tag)) else { continue };
        let bears = |instance: &Instance| {
            let mut twins = twins.get(&instance.addr).into_iter().flatten();
            instance.tags.contains(tag) || twins.any(|twin| twin.tags.contains(tag))
        };
        let tagged = || endpoints.iter().filter(|(instance, _)| bears(instance));
        let owners = owners(name, &behind(Some(tag)), tagged().map(|(instance, _)| &instance.meta));
        found.push(Contribution::of(service, tagged().map(|(_, endpoint)| endpoint.clone()).collect(), true, owners));
    }
    (found, problems)
}

fn wants(names: &TagNames, tag: &str) -> bool {
    match names {
        TagNames::All => true,
        TagNames::These(tags) => tags.contains(tag),
    }
}

/// One entry for each port of the service under which the instance is reached.
fn endpoints_of(instance: &Instance, interned: &mut Interned, problems: &mut Vec<String>) -> Vec<EndpointEntry> {
    let (agent, identity) = match meshed(instance.addr, &instance.meta) {
        Ok(meshed) => meshed.map_or((None, None), |(agent, identity)| (Some(agent), Some(interned.identity(identity)))),
        Err(problem) => {
            problems.push(problem);
            return Vec::new();
        }
    };
    let zone = ZONES.iter().find_map(|key| instance.meta.get(*key).or_else(|| instance.node_meta.get(*key)));
    let endpoint = Arc::new(Endpoint {
        weight: weight(instance),
        zone: zone.filter(|zone| !zone.is_empty()).map(|zone| interned.zone(zone)),
        attributes: interned.of(attributes(instance)),
        ..Endpoint::listed(instance.addr, agent, identity)
    });
    let ports = ports(instance.addr.port(), &instance.meta);
    let entry = |(port, alias)| EndpointEntry { port, alias, assumed: false, endpoint: endpoint.clone() };
    ports.into_iter().map(entry).collect()
}

/// Consul's default weight is 1, ours is 100: the shares between instances stay what they are.
fn weight(instance: &Instance) -> u32 {
    let weight = if instance.status == Status::Passing { instance.weights.passing } else { instance.weights.warning };
    weight.saturating_mul(DEFAULT_WEIGHT).min(MAX_WEIGHT)
}

/// What the instance says besides.
fn attributes(instance: &Instance) -> Attributes {
    let own = instance.meta.iter().filter(|(key, _)| !key.starts_with(meta::PREFIX));
    Attributes { tags: instance.tags.clone(), meta: own.map(|(key, value)| (key.clone(), value.clone())).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consul::answer::Weights;

    fn instance(addr: &str, tags: &[&str], meta: &[(&str, &str)]) -> Instance {
        Instance {
            addr: addr.parse().expect("a literal"),
            tags: tags.iter().map(|tag| (*tag).into()).collect(),
            meta: meta.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            weights: Weights { passing: 1, warning: 0 },
            status: Status::Passing,
            node_meta: BTreeMap::new(),
        }
    }

    /// `name: port[*] addr agent weight`, `*` for an alias.
    fn show(datacenter: Option<&str>, instances: &[Instance], config: &Consul) -> Vec<String> {
        let (found, _) = entries(&"world".parse().expect("valid"), datacenter, instances, config);
        let endpoint = |e: &EndpointEntry| {
            let agent = e.endpoint.agent().map(|agent| format!(" by {agent}")).unwrap_or_default();
            let (alias, addr) = (if e.alias { "*" } else { "" }, e.endpoint.addr());
            format!("{}{alias} {addr}{agent} {}", e.port.unwrap_or(0), e.endpoint.weight)
        };
        found
            .iter()
            .map(|Contribution { entry, .. }| {
                format!("{}: {}", entry.name, entry.endpoints.iter().map(endpoint).collect::<Vec<_>>().join(", "))
            })
            .collect()
    }

    fn config() -> Consul {
        crate::config::discovery::tests::consul("")
    }

    #[test]
    fn ports_are_what_clients_would_use() {
        for (addr, meta, expected) in [
            ("10.0.0.1:32768", &[][..], "world: 0* 10.0.0.1:32768 100"),
            ("10.0.0.1:6379", &[], "world: 6379 10.0.0.1:6379 100, 0* 10.0.0.1:6379 100"),
            ("10.0.0.1:80", &[], "world: 80 10.0.0.1:80 100"),
            (
                "10.0.0.1:32768",
                &[(meta::PORTS, "80,8080"), (meta::TARGET, "8080")],
                "world: 80* 10.0.0.1:32768 100, 8080 10.0.0.1:32768 100",
            ),
            ("10.0.0.1:32768", &[(meta::PORTS, "0, x")], "world: 0* 10.0.0.1:32768 100"),
        ] {
            assert_eq!(show(None, &[instance(addr, &[], meta)], &config()), [expected], "{addr} {meta:?}");
        }
    }

    #[test]
    fn meshed_or_not_is_known() {
        let (agent, identity) = ((meta::AGENT, "10.0.0.1:15008"), (meta::IDENTITY, "spiffe://a/ns/demo/sa/world"));
        let both = [agent, identity];
        assert_eq!(
            show(None, &[instance("10.0.0.1:32768", &[], &both)], &config()),
            ["world: 0* 10.0.0.1:32768 by 10.0.0.1:15008 100"]
        );
        let bad = [(meta::AGENT, "0.0.0.0:15008"), identity];
        let worse = [agent, (meta::IDENTITY, "world")];
        for half in [&both[..1], &both[1..], &bad, &worse] {
            let instances = [instance("10.0.0.1:32768", &[], half)];
            let (found, problems) = entries(&"world".parse().expect("valid"), None, &instances, &config());
            assert_eq!((found.len(), found[0].entry.endpoints.len(), problems.len()), (1, 0, 1), "{half:?}");
        }
    }

    /// Registrator and an agent have both registered the task.
    #[test]
    fn of_two_at_one_address_the_one_in_the_mesh_counts_whatever_health_they_have() {
        let (agent, identity) = ((meta::AGENT, "10.0.0.1:15008"), (meta::IDENTITY, "spiffe://a/ns/demo/sa/world"));
        let at = |tags: &[&str], meta: &[(&str, &str)], status| Instance {
            status,
            ..instance("10.0.0.1:32768", tags, meta)
        };
        let (passing, critical) = (Status::Passing, Status::Critical);
        let (by, plain) = ("world: 0* 10.0.0.1:32768 by 10.0.0.1:15008 100", "world: 0* 10.0.0.1:32768 100");
        for (theirs, ours, ours_status, theirs_status, expected) in [
            (&["v1"][..], &[agent, identity][..], passing, passing, by),
            // Theirs tells nothing of a task that its own host's agent knows.
            (&["v1"], &[agent, identity], passing, critical, by),
            (&["v1"], &[agent, identity], critical, passing, "world: "),
            // It is not known what would be sent where.
            (&["v1"], &[agent], passing, passing, "world: "),
            // Nobody is in the mesh: whoever is well serves.
            (&["v1"], &[], critical, passing, plain),
            (&["v1"], &[], passing, critical, plain),
        ] {
            let mut both = [at(theirs, &[], theirs_status), at(&[], ours, ours_status)];
            for _ in 0..2 {
                let shown = show(None, &both, &config());
                assert_eq!(shown[0], expected, "{both:?}");
                // Whatever only theirs is tagged with stays a name, and leads the same way.
                let tagged = expected != plain || theirs_status == passing;
                let expected =
                    if tagged { expected.replace("world:", "world--tag-v1:") } else { "world--tag-v1: ".into() };
                assert_eq!(shown[1..], [expected], "{both:?}");
                both.reverse();
            }
        }
    }

    #[test]
    fn tags_and_datacenters_are_services_of_their_own() {
        let two = [instance("10.0.0.1:80", &["v1"], &[]), instance("10.0.0.2:80", &["V2", "a=b"], &[])];
        let (one, other) = ("80 10.0.0.1:80 100", "80 10.0.0.2:80 100");
        let all = format!("{one}, {other}");
        assert_eq!(
            show(None, &two, &config()),
            [format!("world: {all}"), format!("world--tag-v2: {other}"), format!("world--tag-v1: {one}")]
        );
        let some = crate::config::discovery::tests::consul("tag_names = [\"v1\"]");
        assert_eq!(
            show(Some("dc2"), &two, &some),
            [format!("world--dc-dc2: {all}"), format!("world--tag-v1--dc-dc2: {one}")]
        );
    }

    #[test]
    fn health_and_weight_decide_together() {
        let mut warned = instance("10.0.0.1:80", &[], &[]);
        warned.status = Status::Warning;
        warned.weights = Weights { passing: 7, warning: 2 };
        let lenient = crate::config::discovery::tests::consul("health = \"warning\"");
        assert_eq!(show(None, &[warned.clone()], &config()), ["world: "]);
        assert_eq!(show(None, &[warned.clone()], &lenient), ["world: 80 10.0.0.1:80 200"]);
        warned.status = Status::Passing;
        assert_eq!(show(None, &[warned.clone()], &config()), ["world: 80 10.0.0.1:80 700"]);
        warned.weights.passing = u32::MAX;
        assert_eq!(show(None, &[warned.clone()], &config()), ["world: 80 10.0.0.1:80 1000000"]);
        warned.status = Status::Critical;
        assert_eq!(show(None, &[warned], &lenient), ["world: "]);
    }

    #[test]
    fn attributes_are_carried_and_shared() {
        let meta = [("color", "blue"), (meta::TASK, "t1")];
        let two = [instance("10.0.0.1:80", &["v1"], &meta), instance("10.0.0.2:80", &["v1"], &meta[..1])];
        let (found, _) = entries(&"world".parse().expect("valid"), None, &two, &config());
        let [one, other] = &found[0].entry.endpoints[..] else { panic!("two endpoints") };
        let (one, other) = (&one.endpoint.attributes, &other.endpoint.attributes);
        assert_eq!((one.meta.len(), &*one.meta["color"]), (1, "blue"));
        assert!(Arc::ptr_eq(one, other));
    }

    #[test]
    fn identities_are_shared() {
        let meta = [(meta::AGENT, "10.0.0.1:15008"), (meta::IDENTITY, "spiffe://a/ns/demo/sa/world")];
        let two = [instance("10.0.0.1:80", &[], &meta), instance("10.0.0.2:80", &[], &meta)];
        let (found, _) = entries(&"world".parse().expect("valid"), None, &two, &config());
        let texts: Vec<_> = found[0]
            .entry
            .endpoints
            .iter()
            .filter_map(|it| Some(it.endpoint.identity.as_ref()?.as_str().as_ptr()))
            .collect();
        assert_eq!((texts.len(), texts[0]), (2, texts[1]));
    }
}
