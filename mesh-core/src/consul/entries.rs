//! From the instances of one Consul service to what a source says about services: the service itself, one for each of
//! its tags, and the same under the name of another datacenter.
//!
//! Also the words that instances of the mesh carry in their meta, by which every agent knows where the tunnel to them
//! is and which identity must be proved there. Must not know how an instance was learnt.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use super::answer::{Instance, Status};
use crate::{
    addr::canonical,
    config::discovery::{Consul, Health, TagNames},
    id::{ServiceName, SpiffeId},
    resolve::{of_datacenter, of_tag},
    services::{Attributes, DEFAULT_WEIGHT, EndpointEntry, MAX_WEIGHT, ServiceEntry},
};

/// Meta keys of instances that an agent has registered. Consul allows letters, digits, `-` and `_` only.
pub mod meta {
    /// Every key of ours begins so; none of them is an attribute of the endpoint.
    pub const PREFIX: &str = "ecs-mesh-";
    /// Address and port at which the tunnel to the instance ends.
    pub const AGENT: &str = "ecs-mesh-agent";
    /// SPIFFE ID that is proved there.
    pub const IDENTITY: &str = "ecs-mesh-identity";
    /// Ports of the service under which the instance is reached, with commas between.
    pub const PORTS: &str = "ecs-mesh-ports";
    /// The service in the mesh, where Consul's name is another: one of several ports, or a name that the task chose.
    pub const SERVICE: &str = "ecs-mesh-service";
    /// The port that the application itself listens on.
    pub const TARGET: &str = "ecs-mesh-target";
    /// Which agent keeps the registration up to date.
    pub const OWNER: &str = "ecs-mesh-owner";
    pub const TASK: &str = "ecs-mesh-task";
    pub const ZONE: &str = "ecs-mesh-zone";
}

/// Meta of an instance, or of its node, that names its zone, in order of precedence.
const ZONES: [&str; 4] = [meta::ZONE, "zone", "availability-zone", "availability_zone"];
/// The port that clients use where nobody says which.
const USUAL_PORT: u16 = 80;
/// From here on, Linux and docker give ports as they come: no client has such a number in its configuration.
const DYNAMIC_PORTS: u16 = 32_768;

/// A part of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contribution {
    pub entry: Arc<ServiceEntry>,
    /// It follows from Consul's name of the service; otherwise the instances say by their meta that they belong to it.
    pub own: bool,
}

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
    let usable: Vec<&Instance> = instances.iter().filter(|instance| is_usable(instance, config.health)).collect();
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
    let mut interned = BTreeSet::new();
    let mut endpoints: Vec<(&Instance, EndpointEntry)> = Vec::with_capacity(usable.len());
    for instance in usable {
        for endpoint in endpoints_of(instance, &mut interned, &mut problems) {
            endpoints.push((instance, endpoint));
        }
    }
    let mut found = Vec::new();
    if let Some(name) = named(None) {
        found.push(part(name, endpoints.iter().map(|(_, endpoint)| endpoint.clone()).collect(), true));
    }
    // A service of the mesh of which Consul knows each port by a name of its own.
    let mut others: BTreeMap<ServiceName, Vec<EndpointEntry>> = BTreeMap::new();
    for (instance, endpoint) in &endpoints {
        let service = instance.meta.get(meta::SERVICE).and_then(|service| service.parse::<ServiceName>().ok());
        if let Some(service) = service.filter(|service| service != name) {
            others.entry(service).or_default().push(endpoint.clone());
        }
    }
    for (service, endpoints) in others {
        let service = datacenter.map_or(Some(service.clone()), |datacenter| of_datacenter(&service, datacenter));
        found.extend(service.map(|service| part(service, endpoints, false)));
    }
    // Of all instances, so that a tag's name does not vanish with the health of those that bear it.
    let tags: BTreeSet<&str> = instances.iter().flat_map(|instance| &instance.tags).map(String::as_str).collect();
    for tag in tags.into_iter().filter(|tag| wants(&config.tag_names, tag)) {
        let Some(name) = named(Some(tag)) else { continue };
        let tagged = endpoints.iter().filter(|(instance, _)| instance.tags.contains(tag));
        found.push(part(name, tagged.map(|(_, endpoint)| endpoint.clone()).collect(), true));
    }
    (found, problems)
}

fn wants(names: &TagNames, tag: &str) -> bool {
    match names {
        TagNames::All => true,
        TagNames::These(tags) => tags.contains(tag),
    }
}

fn part(name: ServiceName, endpoints: Vec<EndpointEntry>, own: bool) -> Contribution {
    let entry = ServiceEntry {
        name,
        ports: Vec::new(),
        endpoints,
        tls: None,
        on_agent_death: None,
        families: Vec::new(),
        alone: false,
    };
    Contribution { entry: Arc::new(entry), own }
}

/// One entry for each port of the service under which the instance is reached.
fn endpoints_of(
    instance: &Instance,
    interned: &mut BTreeSet<Arc<Attributes>>,
    problems: &mut Vec<String>,
) -> Vec<EndpointEntry> {
    let (agent, identity) = match meshed(instance) {
        Ok(meshed) => meshed.map_or((None, None), |(agent, identity)| (Some(agent), Some(identity))),
        Err(problem) => {
            problems.push(problem);
            return Vec::new();
        }
    };
    let zone = ZONES.iter().find_map(|key| instance.meta.get(*key).or_else(|| instance.node_meta.get(*key)));
    let endpoint = EndpointEntry {
        port: None,
        alias: false,
        addr: instance.addr,
        agent,
        identity,
        weight: weight(instance),
        zone: zone.filter(|zone| !zone.is_empty()).cloned(),
        attributes: attributes(instance, interned),
    };
    let ports = ports(instance);
    ports.into_iter().map(|(port, alias)| EndpointEntry { port, alias, ..endpoint.clone() }).collect()
}

/// Tunnel and identity, where the instance has both; `None`: it is not in the mesh. Half of it, or what cannot be
/// read, is neither: such an instance is left out, because it is not known what would be sent where.
fn meshed(instance: &Instance) -> Result<Option<(SocketAddr, SpiffeId)>, String> {
    let (agent, identity) = (instance.meta.get(meta::AGENT), instance.meta.get(meta::IDENTITY));
    if agent.is_none() && identity.is_none() {
        return Ok(None);
    }
    let agent = agent.and_then(|agent| agent.parse::<SocketAddr>().ok()).map(canonical);
    let agent = agent.filter(|agent| agent.port() != 0 && !agent.ip().is_unspecified() && !agent.ip().is_multicast());
    let identity = identity.and_then(|identity| identity.parse::<SpiffeId>().ok());
    match (agent, identity) {
        (Some(agent), Some(identity)) => Ok(Some((agent, identity))),
        _ => Err(format!(
            "the instance at {} is half in the mesh: its meta must have both {} and {}",
            instance.addr,
            meta::AGENT,
            meta::IDENTITY
        )),
    }
}

/// Consul's default weight is 1, ours is 100: the shares between instances stay what they are.
fn weight(instance: &Instance) -> u32 {
    let weight = if instance.status == Status::Passing { instance.weights.passing } else { instance.weights.warning };
    weight.saturating_mul(DEFAULT_WEIGHT).min(MAX_WEIGHT)
}

/// What the instance says besides; equal ones are shared.
fn attributes(instance: &Instance, interned: &mut BTreeSet<Arc<Attributes>>) -> Arc<Attributes> {
    let own = instance.meta.iter().filter(|(key, _)| !key.starts_with(meta::PREFIX));
    let attributes = Arc::new(Attributes {
        tags: instance.tags.clone(),
        meta: own.map(|(key, value)| (key.clone(), value.clone())).collect::<BTreeMap<_, _>>(),
    });
    if let Some(known) = interned.get(&attributes) {
        return known.clone();
    }
    interned.insert(attributes.clone());
    attributes
}

/// (service port, whether it is only an alias) under which an instance is reached: those in its meta. Otherwise its own
/// port, where somebody chose it, and whatever clients use that were told no port.
fn ports(instance: &Instance) -> Vec<(Option<u16>, bool)> {
    let own = instance.addr.port();
    let number = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port != 0);
    let target = instance.meta.get(meta::TARGET).and_then(|text| number(text)).unwrap_or(own);
    let given: BTreeSet<u16> = match instance.meta.get(meta::PORTS) {
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
            let agent = e.agent.map(|agent| format!(" by {agent}")).unwrap_or_default();
            format!("{}{} {}{agent} {}", e.port.unwrap_or(0), if e.alias { "*" } else { "" }, e.addr, e.weight)
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
        assert_eq!((one.attributes.meta.len(), &*one.attributes.meta["color"]), (1, "blue"));
        assert!(Arc::ptr_eq(&one.attributes, &other.attributes));
    }
}
