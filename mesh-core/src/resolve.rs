//! Names to services: what a DNS question means in the mesh.
//!
//! Must not know DNS's wire format, nor who asked.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    config::{self, VipRanges},
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
    /// Whatever there is (RFC 8482 leaves to us how much of it we say).
    Any,
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
    /// (priority, weight, port, target), and the addresses of the target, which all records share.
    Services {
        ttl: Duration,
        records: Vec<(u16, u16, u16, String)>,
        addresses: Vec<IpAddr>,
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
    /// The reverse names of these addresses are the mesh's.
    pub vip: &'a VipRanges,
    pub ttl: Duration,
    pub ipv6: bool,
}

/// Answers a question. `name` is as asked, in any case, with or without the final dot.
///
/// Mesh names are `<service>`, `<service>.<suffix>` and `<tag>.<service>.<suffix>`, and for SRV also `_http._tcp.<name>`,
/// `_<port>._tcp.<name>` and Consul's `_<service>._tcp.<suffix>` and `_<service>._<tag>.<suffix>`. All names under the
/// first suffix belong to the mesh alone, and so do the reverse names of virtual addresses; a name under another suffix
/// that no service has is left to the resolver that the application had asked.
///
/// A name that has something below it exists, whatever is asked about it (RFC 8020).
pub fn answer(snapshot: &Snapshot, naming: &Naming<'_>, name: &str, question: Question) -> Answer {
    let (name, ttl) = (normal(name), naming.ttl);
    if let Some(net) = reverse(&name) {
        return naming.reverse(snapshot, net, question);
    }
    if let Some(service) = find(snapshot, naming, &name) {
        return match question {
            Question::A => Answer::Addresses { ttl, addresses: vec![service.vip.v4.into()] },
            Question::Aaaa if naming.ipv6 => Answer::Addresses { ttl, addresses: vec![service.vip.v6.into()] },
            Question::Any => Answer::Addresses { ttl, addresses: naming.addresses(service) },
            Question::Srv => records(service, naming, |_| true),
            Question::Aaaa | Question::Ptr | Question::Other => Answer::NoData { ttl },
        };
    }
    if let Some((label, service)) = instance(snapshot, naming, &name) {
        return match question {
            Question::Srv | Question::Any => records(service, naming, |port| serves(label.as_deref(), service, port)),
            Question::A | Question::Aaaa | Question::Ptr | Question::Other => Answer::NoData { ttl },
        };
    }
    if name.strip_prefix("_tcp.").is_some_and(|below| find(snapshot, naming, below).is_some()) {
        return Answer::NoData { ttl };
    }
    match naming.suffixes.first().and_then(|own| name.strip_suffix(own.as_str())) {
        Some("") if name.contains('.') => Answer::NoData { ttl },
        Some(rest) if rest.ends_with('.') && naming.is_above_a_suffix(&name) => Answer::NoData { ttl },
        Some(rest) if rest.ends_with('.') => Answer::NoSuchName { ttl },
        _ => Answer::Forward,
    }
}

/// Whether a service of this name may come to be: what others say against it is not to be believed for long.
pub fn may_appear(naming: &Naming<'_>, name: &str) -> bool {
    let name = normal(name);
    let below = |suffix: &str| name.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.'));
    let mut suffixes = naming.suffixes.iter().chain(naming.datacenters.iter().map(|(suffix, _)| suffix));
    if name.contains('.') { suffixes.any(|suffix| below(suffix)) } else { name != "localhost" && !name.is_empty() }
}

/// Whether `name` is a name of the mesh with one of the `searched` domains behind it. A stub resolver asks for that
/// first, and for the mesh's name only when it has heard that this one does not exist.
pub fn is_searched(snapshot: &Snapshot, naming: &Naming<'_>, searched: &[String], name: &str) -> bool {
    let name = normal(name);
    searched.iter().filter(|domain| !domain.is_empty()).any(|domain| {
        let meant = name.strip_suffix(&normal(domain)).and_then(|rest| rest.strip_suffix('.'));
        meant
            .is_some_and(|meant| find(snapshot, naming, meant).is_some() || instance(snapshot, naming, meant).is_some())
    })
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
    /// As configured.
    pub fn of(config: &'a config::Dns) -> Self {
        let config::Dns { suffixes, datacenters, vip, ttl, ipv6, .. } = config;
        Self { suffixes, datacenters, vip, ttl: *ttl, ipv6: *ipv6 }
    }

    fn addresses(&self, service: &Service) -> Vec<IpAddr> {
        let v6 = self.ipv6.then_some(service.vip.v6.into());
        [service.vip.v4.into()].into_iter().chain(v6).collect()
    }

    /// Whether a suffix lies below this name.
    fn is_above_a_suffix(&self, name: &str) -> bool {
        let below = |suffix: &str| suffix.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        self.suffixes.iter().chain(self.datacenters.iter().map(|(suffix, _)| suffix)).any(|suffix| below(suffix))
    }

    /// About the name of an address, or of the part of it that the name has so far.
    fn reverse(&self, snapshot: &Snapshot, net: IpNet, question: Question) -> Answer {
        let ours = match net {
            IpNet::V4(net) => self.vip.v4.contains(&net),
            IpNet::V6(net) => self.vip.v6.contains(&net),
        };
        let ttl = self.ttl;
        let one = net.prefix_len() == net.max_prefix_len();
        match (one.then(|| snapshot.service_at(net.addr())).flatten(), question) {
            (Some(service), Question::Ptr | Question::Any) => Answer::Name { ttl, name: canonical(service, self) },
            (Some(_), _) => Answer::NoData { ttl },
            (None, _) if !ours => Answer::Forward,
            (None, _) if one => Answer::NoSuchName { ttl },
            (None, _) => Answer::NoData { ttl },
        }
    }

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

/// `_http._tcp.world.mesh` to `http` and the service (RFC 2782), and Consul's forms, of which the one with a tag means
/// every port. UDP and others have nothing here.
fn instance<'a>(snapshot: &'a Snapshot, naming: &Naming<'_>, name: &str) -> Option<(Option<String>, &'a Arc<Service>)> {
    let (label, rest) = name.strip_prefix('_')?.split_once('.')?;
    let (protocol, rest) = rest.strip_prefix('_')?.split_once('.')?;
    let consul = |service: &str| snapshot.services.get(&*naming.below(rest)?.name(service)?);
    if protocol == "tcp" {
        return Some((Some(label.to_owned()), find(snapshot, naming, rest).or_else(|| consul(label))?));
    }
    Some((None, consul(of_tag(&label.parse().ok()?, protocol)?.as_str())?))
}

/// Whether a port is meant by the service label of an SRV name. An unknown label has no record: gRPC clients, for
/// one, take any answer to `_grpclb` for a balancer.
fn serves(label: Option<&str>, service: &Service, port: &ServicePort) -> bool {
    match label {
        None => true,
        Some("http") => port.protocol != Protocol::Tcp,
        Some("grpc") if port.protocol == Protocol::Grpc => true,
        Some(label) => label == service.name.as_str() || label.parse() == Ok(port.port),
    }
}

fn records(service: &Service, naming: &Naming<'_>, meant: impl Fn(&ServicePort) -> bool) -> Answer {
    let target = canonical(service, naming);
    // One target, so no weights (RFC 2782): balancing is the mesh's own business.
    let records: Vec<_> =
        service.ports.iter().filter(|port| meant(port)).map(|port| (0, 0, port.port, target.clone())).collect();
    match records.is_empty() {
        true => Answer::NoData { ttl: naming.ttl },
        false => Answer::Services { ttl: naming.ttl, records, addresses: naming.addresses(service) },
    }
}

fn canonical(service: &Service, naming: &Naming<'_>) -> String {
    match naming.suffixes.first() {
        Some(suffix) => format!("{}.{suffix}", service.name),
        None => service.name.to_string(),
    }
}

/// The addresses that a name below `in-addr.arpa` (RFC 1035, 3.5) or `ip6.arpa` (RFC 3596, 2.5) is about: one, or with
/// fewer labels all that begin so.
fn reverse(name: &str) -> Option<IpNet> {
    if let Some(labels) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0_u8; 4];
        let mut rest = octets.iter_mut();
        for label in labels.rsplit('.') {
            let octet: u8 = label.parse().ok()?;
            // `01` is another name than `1`.
            if octet.to_string() != label {
                return None;
            }
            *rest.next()? = octet;
        }
        let given = u8::try_from(4 - rest.len()).ok()?;
        return Ipv4Net::new(Ipv4Addr::from(octets), given * 8).ok().map(IpNet::V4);
    }
    let (mut bits, mut given) = (0_u128, 0_u8);
    for label in name.strip_suffix(".ip6.arpa")?.rsplit('.') {
        let [digit] = label.as_bytes() else { return None };
        given += 4;
        bits |= u128::from(char::from(*digit).to_digit(16)?) << 128_u8.checked_sub(given)?;
    }
    Ipv6Net::new(Ipv6Addr::from(bits), given).ok().map(IpNet::V6)
}

#[cfg(test)]
mod tests;
