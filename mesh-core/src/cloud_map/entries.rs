//! From the instances of one Cloud Map service to what a source says about services.
//!
//! Must not know how an instance was learnt.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    addr::canonical,
    config::cloud_map::{CloudMap, Health},
    id::ServiceName,
    instance::{Contribution, Interned, foremost, meshed, meta, missing, owners, ports, service, tags},
    model::Endpoint,
    owners::Owners,
    resolve::of_datacenter,
    services::{Attributes, EndpointEntry},
};

/// One instance, as Cloud Map has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    pub id: String,
    pub health: Said,
    pub attributes: BTreeMap<String, String>,
}

/// What is said about an instance's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Said {
    Healthy,
    /// Nobody looks after it.
    Unknown,
    Unhealthy,
}

/// Attributes that Cloud Map itself knows.
pub mod attribute {
    /// Every key of Cloud Map's own begins so; none of them is an attribute of the endpoint.
    pub const PREFIX: &str = "AWS_";
    pub const IPV4: &str = "AWS_INSTANCE_IPV4";
    pub const IPV6: &str = "AWS_INSTANCE_IPV6";
    pub const PORT: &str = "AWS_INSTANCE_PORT";
    /// Instances that are names.
    pub const NAMES: [&str; 2] = ["AWS_INSTANCE_CNAME", "AWS_ALIAS_DNS_NAME"];
    pub const FIRST_HEALTH: &str = "AWS_INIT_HEALTH_STATUS";
    pub const UNHEALTHY: &str = "UNHEALTHY";
}

/// Attributes that name an instance's zone, in order of precedence: ours, ECS's, Service Connect's, custom ones.
const ZONES: [&str; 5] = [meta::ZONE, "AVAILABILITY_ZONE", "AvailabilityZone", "availability-zone", "zone"];

/// The most instances that one answer holds.
pub const LARGEST_ANSWER: usize = 1000;

/// What the instances of a service say about services; `namespace` is `None` for the first one, whose services bear the
/// bare name. The second is what was left out, and why.
///
/// The service is there also when no instance is usable: it exists, and nobody serves it at the moment.
pub fn entries(
    name: &ServiceName,
    namespace: Option<&str>,
    instances: &[Instance],
    config: &CloudMap,
) -> (Vec<Contribution>, Vec<String>) {
    let mut problems = Vec::new();
    if instances.len() >= LARGEST_ANSWER {
        problems.push(format!("there are {LARGEST_ANSWER} instances or more, and Cloud Map tells no more of them"));
    }
    // ECS registers a task, perhaps without its port, and the agent of its host may do so too.
    let at = |instance: &Instance| addr(instance, config.default_port).ok();
    let (counting, _) = foremost(instances.iter().collect(), at, |it| missing(&it.attributes));
    let (counting, _) = foremost(counting, |it| at(it).map(|addr| addr.ip()), |it| is_assumed(&it.attributes));
    // Which of them serve: whoever is not said to be ill, and if that is nobody, all where that is wanted.
    let well = |instance: &&Instance| instance.health != Said::Unhealthy;
    let anybody = config.health == Health::HealthyOrElseAll && !counting.iter().any(well);
    let mut interned = Interned::default();
    let mut by_addr: BTreeMap<SocketAddr, (&Instance, Endpoint)> = BTreeMap::new();
    for instance in counting.into_iter().filter(|instance| anybody || well(instance)) {
        let endpoint = match endpoint(instance, config, &mut interned) {
            Ok(endpoint) => endpoint,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        match by_addr.entry(endpoint.addr()) {
            Entry::Vacant(vacant) => drop(vacant.insert((instance, endpoint))),
            Entry::Occupied(mut held) => {
                if instance.id < held.get().0.id {
                    held.insert((instance, endpoint));
                }
            }
        }
    }
    let behind: Vec<_> = namespace.map(|_| name.clone()).into_iter().collect();
    let owners = owners(name, &behind, by_addr.values().map(|(instance, _)| &instance.attributes));
    let mut own = Vec::new();
    // A service of the mesh of which Cloud Map knows each port by a name of its own.
    let mut others: BTreeMap<ServiceName, Vec<EndpointEntry>> = BTreeMap::new();
    for (instance, endpoint) in by_addr.into_values() {
        let ports = ports(endpoint.addr().port(), &instance.attributes);
        let endpoint = Arc::new(endpoint);
        let assumed = is_assumed(&instance.attributes);
        let served = ports.into_iter();
        let served = served.map(|(port, alias)| EndpointEntry { port, alias, assumed, endpoint: endpoint.clone() });
        let served: Vec<_> = served.collect();
        if let Some(service) = service(&instance.attributes).filter(|service| service != name) {
            others.entry(service).or_default().extend(served.iter().cloned());
        }
        own.extend(served);
    }
    let named = |name: ServiceName| namespace.map_or(Some(name.clone()), |label| of_datacenter(&name, label));
    let first = named(name.clone()).map(|name| Contribution::of(name, own, true, owners));
    let others = others.into_iter().filter_map(|(name, served)| {
        let owners = namespace.and_then(|_| Owners::of([vec![name.clone()]]));
        Some(Contribution::of(named(name)?, served, false, owners))
    });
    (first.into_iter().chain(others).collect(), problems)
}

/// The instance's endpoint, without the ports of the service that it serves.
fn endpoint(instance: &Instance, config: &CloudMap, interned: &mut Interned) -> Result<Endpoint, String> {
    let says = &instance.attributes;
    let addr = addr(instance, config.default_port)?;
    let (agent, identity) =
        meshed(addr, says)?.map_or((None, None), |(agent, id)| (Some(agent), Some(interned.identity(id))));
    let zone = ZONES.iter().find_map(|key| says.get(*key)).filter(|zone| !zone.is_empty());
    let zone = zone.map(|zone| interned.zone(zone));
    let besides = |key: &str| !key.starts_with(meta::PREFIX) && !key.starts_with(attribute::PREFIX);
    let meta = says.iter().filter(|(key, _)| besides(key)).map(|(key, value)| (key.clone(), value.clone()));
    let attributes = interned.of(Attributes { tags: tags(says), meta: meta.collect() });
    Ok(Endpoint { zone, attributes, ..Endpoint::listed(addr, agent, identity) })
}

/// Whether nobody has said the port. Of an instance with a tunnel it is known where that leads.
fn is_assumed(says: &BTreeMap<String, String>) -> bool {
    !says.contains_key(attribute::PORT) && !says.contains_key(meta::AGENT)
}

fn addr(instance: &Instance, default_port: u16) -> Result<SocketAddr, String> {
    let Instance { id, attributes, .. } = instance;
    let id = id.escape_debug();
    let ip = [attribute::IPV4, attribute::IPV6].iter().find_map(|key| attributes.get(*key));
    let Some(ip) = ip else {
        let is_name = attribute::NAMES.iter().any(|name| attributes.contains_key(*name));
        let why = if is_name { "is a name and has no address" } else { "has no address" };
        return Err(format!("the instance {id} {why}: it needs {} or {}", attribute::IPV4, attribute::IPV6));
    };
    let parsed: Option<IpAddr> = ip.parse().ok().filter(|ip: &IpAddr| !ip.is_unspecified() && !ip.is_multicast());
    let Some(ip) = parsed else {
        return Err(format!("the instance {id} is at `{}`, where nothing can be reached", ip.escape_debug()));
    };
    let port = match attributes.get(attribute::PORT) {
        None => default_port,
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(|| {
            format!("the instance {id} has the port `{}`, which is none: see {}", port.escape_debug(), attribute::PORT)
        })?,
    };
    Ok(canonical(SocketAddr::new(ip, port)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::cloud_map::tests::cloud_map;

    pub(in crate::cloud_map) fn instance(id: &str, health: Said, attributes: &[(&str, &str)]) -> Instance {
        let attributes = attributes.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        Instance { id: id.into(), health, attributes }
    }

    /// `name: port[*] addr [by agent], …` and the problems.
    fn show(instances: &[Instance], namespace: Option<&str>, config: &CloudMap) -> (Vec<String>, Vec<String>) {
        let (found, problems) = entries(&"server".parse().expect("valid"), namespace, instances, config);
        let endpoint = |e: &EndpointEntry| {
            let agent = e.endpoint.agent().map(|agent| format!(" by {agent}")).unwrap_or_default();
            format!("{}{} {}{agent}", e.port.unwrap_or(0), if e.alias { "*" } else { "" }, e.endpoint.addr())
        };
        let entry = |c: &Contribution| {
            let endpoints: Vec<_> = c.entry.endpoints.iter().map(endpoint).collect();
            format!("{}: {}", c.entry.name, endpoints.join(", "))
        };
        (found.iter().map(entry).collect(), problems)
    }

    #[test]
    fn addresses_and_ports() {
        let config = cloud_map("");
        for (attributes, expected) in [
            (&[("AWS_INSTANCE_IPV4", "10.0.0.1"), ("AWS_INSTANCE_PORT", "32768")][..], Ok("server: 0* 10.0.0.1:32768")),
            (
                &[("AWS_INSTANCE_IPV4", "10.0.0.1"), ("AWS_INSTANCE_PORT", "8080")],
                Ok("server: 8080 10.0.0.1:8080, 0* 10.0.0.1:8080"),
            ),
            (&[("AWS_INSTANCE_IPV4", "10.0.0.1")], Ok("server: 80 10.0.0.1:80")),
            (&[("AWS_INSTANCE_IPV6", "fd00::1")], Ok("server: 80 [fd00::1]:80")),
            (&[("AWS_INSTANCE_CNAME", "a.example")], Err("the instance i is a name and has no address")),
            (&[], Err("the instance i has no address: it needs AWS_INSTANCE_IPV4")),
            (&[("AWS_INSTANCE_IPV4", "0.0.0.0")], Err("the instance i is at `0.0.0.0`, where nothing")),
            (&[("AWS_INSTANCE_IPV4", "x\n")], Err("the instance i is at `x\\n`")),
            (&[("AWS_INSTANCE_IPV4", "10.0.0.1"), ("AWS_INSTANCE_PORT", "0")], Err("the instance i has the port `0`")),
        ] {
            let (found, problems) = show(&[instance("i", Said::Unknown, attributes)], None, &config);
            match expected {
                Ok(expected) => assert_eq!((found, problems), (vec![expected.to_owned()], vec![])),
                Err(expected) => {
                    assert_eq!(found, ["server: "]);
                    assert!(problems.len() == 1 && problems[0].starts_with(expected), "{problems:?}");
                }
            }
        }
    }

    #[test]
    fn who_is_said_to_be_ill_is_left_out() {
        let two = |a: Said, b: Said| {
            [
                instance("a", a, &[("AWS_INSTANCE_IPV4", "10.0.0.1")]),
                instance("b", b, &[("AWS_INSTANCE_IPV4", "10.0.0.2")]),
            ]
        };
        let (strict, lenient) = (cloud_map(""), cloud_map("health = \"healthy_or_else_all\""));
        let (one, all) = ("server: 80 10.0.0.1:80", "server: 80 10.0.0.1:80, 80 10.0.0.2:80");
        for (a, b, expected, or_else) in [
            (Said::Healthy, Said::Unhealthy, one, one),
            (Said::Unknown, Said::Unhealthy, one, one),
            (Said::Unknown, Said::Healthy, all, all),
            (Said::Unhealthy, Said::Unhealthy, "server: ", all),
        ] {
            assert_eq!(show(&two(a, b), None, &strict).0, [expected]);
            assert_eq!(show(&two(a, b), None, &lenient).0, [or_else]);
        }
    }

    #[test]
    fn meshed_or_not_is_known() {
        let config = cloud_map("");
        let addr = [("AWS_INSTANCE_IPV4", "10.0.0.1"), ("AWS_INSTANCE_PORT", "32768")];
        let tunnel = [(meta::AGENT, "10.0.0.1:15008"), (meta::IDENTITY, "spiffe://t/ns/demo/sa/server")];
        let by_ecs = instance("0a", Said::Healthy, &addr);
        let by_us = instance("ecs-mesh:1", Said::Healthy, &[addr, tunnel].concat());
        let expected = "server: 0* 10.0.0.1:32768 by 10.0.0.1:15008";
        assert_eq!(show(&[by_ecs.clone(), by_us.clone()], None, &config).0, [expected]);
        assert_eq!(show(&[by_us, by_ecs], None, &config).0, [expected], "in whatever order");
        let half = instance("x", Said::Healthy, &[&addr[..], &tunnel[..1]].concat());
        let (found, problems) = show(&[half], None, &config);
        assert_eq!((found, problems.len()), (vec!["server: ".to_owned()], 1));
    }

    #[test]
    fn one_in_the_mesh_stands_for_its_address_also_when_it_is_ill() {
        use Said::{Healthy, Unhealthy};
        let config = cloud_map("");
        let (addr, port) = (("AWS_INSTANCE_IPV4", "10.0.0.1"), ("AWS_INSTANCE_PORT", "8080"));
        let tunnel = [(meta::AGENT, "10.0.0.1:15008"), (meta::IDENTITY, "spiffe://t/ns/demo/sa/server")];
        let by = "server: 8080 10.0.0.1:8080 by 10.0.0.1:15008, 0* 10.0.0.1:8080 by 10.0.0.1:15008";
        let ours = |said| instance("ecs-mesh:1", said, &[&[addr, port], &tunnel[..]].concat());
        // With A records, ECS does not even tell the port.
        for says in [&[addr, port][..], &[addr]] {
            for (by_ecs, by_us, expected) in
                [(Healthy, Healthy, by), (Unhealthy, Healthy, by), (Healthy, Unhealthy, "server: ")]
            {
                let mut both = [instance("0a", by_ecs, says), ours(by_us)];
                for _ in 0..2 {
                    assert_eq!(show(&both, None, &config), (vec![expected.to_owned()], vec![]), "{both:?}");
                    both.reverse();
                }
            }
        }
        let lenient = cloud_map("health = \"healthy_or_else_all\"");
        assert_eq!(
            show(&[instance("0a", Healthy, &[addr]), ours(Unhealthy)], None, &lenient).0,
            [by],
            "nobody else is well"
        );
    }

    #[test]
    fn attributes_are_carried() {
        let says = [
            ("AWS_INSTANCE_IPV4", "10.0.0.1"),
            ("AVAILABILITY_ZONE", "eu-central-1a"),
            ("ECS_TASK_DEFINITION_FAMILY", "server"),
            ("color", "green"),
            (meta::OWNER, "ecs-mesh@10.0.0.1"),
        ];
        let (found, _) =
            entries(&"server".parse().expect("valid"), None, &[instance("i", Said::Healthy, &says)], &cloud_map(""));
        let endpoint = &found[0].entry.endpoints[0].endpoint;
        assert_eq!(endpoint.zone.as_deref(), Some("eu-central-1a"));
        let meta: Vec<_> = endpoint.attributes.meta.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(meta, ["AVAILABILITY_ZONE=eu-central-1a", "ECS_TASK_DEFINITION_FAMILY=server", "color=green"]);
    }

    #[test]
    fn other_namespaces_and_services() {
        let says = [("AWS_INSTANCE_IPV4", "10.0.0.1"), (meta::SERVICE, "shop"), (meta::PORTS, "8080")];
        let (found, _) = show(&[instance("i", Said::Healthy, &says)], Some("my-demo"), &cloud_map(""));
        assert_eq!(found, ["server--dc-my-demo: 8080 10.0.0.1:80", "shop--dc-my-demo: 8080 10.0.0.1:80"]);
    }
}
