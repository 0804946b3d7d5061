//! Names to services: what a DNS question means in the mesh.
//!
//! Must not know DNS's wire format, nor who asked.

use std::{borrow::Cow, net::IpAddr, sync::Arc, time::Duration};

use crate::{
    id::ServiceName,
    model::{Protocol, Service, ServicePort, Snapshot},
};

/// A question about a name, in terms of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    A,
    Aaaa,
    Srv,
    Ptr,
    /// Any other type: a mesh name exists, but has no such record.
    Other,
}

/// What the mesh says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Not a mesh name: ask the resolver that the application had asked.
    Forward,
    /// A mesh name without a record of this type.
    NoData {
        ttl: Duration,
    },
    /// A name under a suffix that belongs to the mesh alone, and no service has it.
    NoSuchName {
        ttl: Duration,
    },
    Addresses {
        ttl: Duration,
        addresses: Vec<IpAddr>,
    },
    /// (priority, weight, port, target)
    Services {
        ttl: Duration,
        records: Vec<(u16, u16, u16, String)>,
    },
    /// PTR: the service's canonical name.
    Name {
        ttl: Duration,
        name: String,
    },
}

/// How names are served.
#[derive(Clone, Debug)]
pub struct Naming<'a> {
    /// From the configuration, e.g. `mesh`, `service.consul`; the first one is the canonical one.
    pub suffixes: &'a [String],
    /// Suffixes of other datacenters, and which.
    pub datacenters: &'a [(String, String)],
    pub ttl: Duration,
    pub ipv6: bool,
}

/// Answers a question. `name` is as asked, in any case, with or without the final dot.
///
/// Mesh names are `<service>`, `<service>.<suffix>` and `<tag>.<service>.<suffix>`, and for SRV also `_http._tcp.<name>`, `_<port>._tcp.<name>`
/// and Consul's `_<service>._tcp.<suffix>`. All names under the first suffix belong to the mesh alone; a name under
/// another suffix that no service has is left to the resolver that the application had asked.
pub fn answer(snapshot: &Snapshot, naming: &Naming<'_>, name: &str, question: Question) -> Answer {
    let (name, ttl) = (normal(name), naming.ttl);
    if question == Question::Ptr
        && let Some(ip) = reverse(&name)
    {
        return snapshot
            .service_at(ip)
            .map_or(Answer::Forward, |service| Answer::Name { ttl, name: canonical(service, naming) });
    }
    if let Some(service) = find(snapshot, naming, &name) {
        return match question {
            Question::A => Answer::Addresses { ttl, addresses: vec![service.vip.v4.into()] },
            Question::Aaaa if naming.ipv6 => Answer::Addresses { ttl, addresses: vec![service.vip.v6.into()] },
            Question::Srv => records(service, naming, |_| true),
            Question::Aaaa | Question::Ptr | Question::Other => Answer::NoData { ttl },
        };
    }
    if let Some((label, service)) = instance(snapshot, naming, &name) {
        return match question {
            Question::Srv => records(service, naming, |port| serves(&label, service, port)),
            Question::A | Question::Aaaa | Question::Ptr | Question::Other => Answer::NoData { ttl },
        };
    }
    match naming.suffixes.first().and_then(|own| name.strip_suffix(own.as_str())) {
        Some("") if name.contains('.') => Answer::NoData { ttl },
        Some(rest) if rest.ends_with('.') => Answer::NoSuchName { ttl },
        _ => Answer::Forward,
    }
}

/// The service that a name stands for.
pub fn service<'a>(snapshot: &'a Snapshot, naming: &Naming<'_>, name: &str) -> Option<&'a Arc<Service>> {
    find(snapshot, naming, &normal(name))
}

/// Lower case, without the final dot (RFC 4343: case does not matter).
fn normal(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn find<'a>(snapshot: &'a Snapshot, naming: &Naming<'_>, name: &str) -> Option<&'a Arc<Service>> {
    let Some((label, rest)) = name.split_once('.') else {
        // RFC 6761: this name is never anybody else's.
        return if name == "localhost" { None } else { snapshot.services.get(name) };
    };
    if let Some(datacenter) = naming.below(rest) {
        return if label == "localhost" { None } else { snapshot.services.get(&*datacenter.name(label)?) };
    }
    // `v2.world.service.consul`: the instances of a service that bear a tag.
    let (service, suffix) = rest.split_once('.')?;
    let service = of_tag(&service.parse().ok()?, label)?;
    snapshot.services.get(&*naming.below(suffix)?.name(service.as_str())?)
}

/// Where a name's suffix leads.
enum Datacenter<'a> {
    Home,
    Other(&'a str),
}

impl Datacenter<'_> {
    fn name<'a>(&self, service: &'a str) -> Option<Cow<'a, str>> {
        match self {
            Self::Home => Some(service.into()),
            Self::Other(datacenter) => {
                of_datacenter(&service.parse().ok()?, datacenter).map(|name| name.to_string().into())
            }
        }
    }
}

impl<'a> Naming<'a> {
    fn below(&self, suffix: &str) -> Option<Datacenter<'a>> {
        if self.suffixes.iter().any(|known| known == suffix) {
            return Some(Datacenter::Home);
        }
        let other = self.datacenters.iter().find(|(known, _)| known == suffix);
        other.map(|(_, datacenter)| Datacenter::Other(datacenter))
    }
}

/// The name in the mesh of those instances of a service that bear a tag: a service of its own, `world--tag-v2`.
/// `None` where the tag is no DNS label, or the name too long.
pub fn of_tag(service: &ServiceName, tag: &str) -> Option<ServiceName> {
    let tag: ServiceName = tag.to_ascii_lowercase().parse().ok()?;
    format!("{service}--tag-{tag}").parse().ok()
}

/// The name in the mesh of another datacenter's service.
pub fn of_datacenter(service: &ServiceName, datacenter: &str) -> Option<ServiceName> {
    format!("{service}--dc-{}", datacenter.replace('_', "-")).parse().ok()
}

/// `_http._tcp.world.mesh` to `http` and the service (RFC 2782). UDP and others have nothing here.
fn instance<'a>(snapshot: &'a Snapshot, naming: &Naming<'_>, name: &str) -> Option<(String, &'a Arc<Service>)> {
    let (label, rest) = name.strip_prefix('_')?.split_once('.')?;
    let rest = rest.strip_prefix("_tcp.")?;
    let consul = || naming.suffixes.iter().any(|known| known == rest).then(|| snapshot.services.get(label)).flatten();
    Some((label.to_owned(), find(snapshot, naming, rest).or_else(consul)?))
}

/// Whether a port is meant by the service label of an SRV name. An unknown label has no record: gRPC clients, for
/// one, take any answer to `_grpclb` for a balancer.
fn serves(label: &str, service: &Service, port: &ServicePort) -> bool {
    match label {
        "http" => port.protocol != Protocol::Tcp,
        "grpc" if port.protocol == Protocol::Grpc => true,
        label => label == service.name.as_str() || label.parse() == Ok(port.port),
    }
}

fn records(service: &Service, naming: &Naming<'_>, meant: impl Fn(&ServicePort) -> bool) -> Answer {
    let target = canonical(service, naming);
    // One target, so no weights (RFC 2782): balancing is the mesh's own business.
    let records: Vec<_> =
        service.ports.iter().filter(|port| meant(port)).map(|port| (0, 0, port.port, target.clone())).collect();
    match records.is_empty() {
        true => Answer::NoData { ttl: naming.ttl },
        false => Answer::Services { ttl: naming.ttl, records },
    }
}

fn canonical(service: &Service, naming: &Naming<'_>) -> String {
    match naming.suffixes.first() {
        Some(suffix) => format!("{}.{suffix}", service.name),
        None => service.name.to_string(),
    }
}

/// The address of a name below `in-addr.arpa` (RFC 1035, 3.5) or `ip6.arpa` (RFC 3596, 2.5).
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(digits) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0_u8; 4];
        let mut parts = digits.split('.');
        for octet in octets.iter_mut().rev() {
            *octet = parts.next()?.parse().ok()?;
        }
        return parts.next().is_none().then(|| IpAddr::from(octets));
    }
    let mut bits = 0_u128;
    let mut count = 0;
    for nibble in name.strip_suffix(".ip6.arpa")?.split('.') {
        let [digit] = nibble.as_bytes() else { return None };
        bits = (bits >> 4) | (u128::from(char::from(*digit).to_digit(16)?) << 124);
        count += 1;
    }
    (count == 32).then(|| IpAddr::from(bits.to_be_bytes()))
}

#[cfg(test)]
mod tests;
