//! Consul's answers, read and checked: what cannot be understood is refused, an instance that cannot be used is
//! left out with its reason.
//!
//! Must not know what an instance becomes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use serde::Deserialize;

use super::registration::Observed;
use crate::addr::canonical;

/// An answer that is none. Nothing of it is used.
#[derive(Debug, thiserror::Error)]
#[error("the answer is not what Consul gives for {what}: is another program answering at this address?")]
pub struct Malformed {
    what: &'static str,
    source: serde_json::Error,
}

/// `GET /v1/catalog/services`: every name with the tags of all its instances.
pub type Names = BTreeMap<String, BTreeSet<String>>;

/// One instance of a service, as Consul has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    pub addr: SocketAddr,
    pub tags: BTreeSet<String>,
    pub meta: BTreeMap<String, String>,
    pub weights: Weights,
    pub status: Status,
    /// Of the node, where the instance says none itself.
    pub node_meta: BTreeMap<String, String>,
}

/// Relative shares, by health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    pub passing: u32,
    pub warning: u32,
}

/// The worst of an instance's checks and its node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    Passing,
    Warning,
    /// Also what Consul calls maintenance.
    Critical,
}

/// `GET /v1/health/service/<name>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instances {
    /// Ordered, so that an answer in another order is the same.
    pub usable: Vec<Instance>,
    /// Instances that nothing can connect to, and why.
    pub left_out: Vec<String>,
}

/// Reads the list of services.
///
/// # Errors
/// It is not such a list.
pub fn names(body: &[u8]) -> Result<Names, Malformed> {
    let raw: BTreeMap<String, Option<BTreeSet<String>>> =
        serde_json::from_slice(body).map_err(|source| Malformed { what: "the list of services", source })?;
    Ok(raw.into_iter().map(|(name, tags)| (name, tags.unwrap_or_default())).collect())
}

/// Reads the instances of a service.
///
/// # Errors
/// It is no list of instances.
pub fn instances(body: &[u8]) -> Result<Instances, Malformed> {
    let raw: Vec<Entry> =
        serde_json::from_slice(body).map_err(|source| Malformed { what: "the health of a service", source })?;
    let mut read = Instances::default();
    for entry in raw {
        match instance(entry) {
            Ok(instance) => read.usable.push(instance),
            Err(reason) => read.left_out.push(reason),
        }
    }
    read.usable.sort_by(|a, b| (a.addr, a.status, &a.tags, &a.meta).cmp(&(b.addr, b.status, &b.tags, &b.meta)));
    read.left_out.sort();
    Ok(read)
}

/// A check of `GET /v1/health/state/<state>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct BadCheck {
    /// Empty: it is the node's.
    #[serde(rename = "ServiceName", default)]
    pub service: String,
    #[serde(rename = "Node", default)]
    pub node: String,
    #[serde(rename = "CheckID", default)]
    pub id: String,
}

/// Reads the checks of a state, ordered.
///
/// # Errors
/// It is no list of checks.
pub fn bad_checks(body: &[u8]) -> Result<Vec<BadCheck>, Malformed> {
    let mut checks: Vec<BadCheck> =
        serde_json::from_slice(body).map_err(|source| Malformed { what: "the checks in a state", source })?;
    checks.sort();
    Ok(checks)
}

#[derive(Deserialize)]
struct AgentService {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Service")]
    name: String,
    #[serde(rename = "Tags", default)]
    tags: Option<BTreeSet<String>>,
    #[serde(rename = "Meta", default)]
    meta: Option<BTreeMap<String, String>>,
    #[serde(rename = "Address", default)]
    address: String,
    #[serde(rename = "Port", default)]
    port: i64,
}

/// Reads `GET /v1/agent/services`: what is registered with the agent that was asked.
///
/// # Errors
/// It is no such list.
pub fn registered(body: &[u8]) -> Result<Vec<Observed>, Malformed> {
    let raw: BTreeMap<String, AgentService> =
        serde_json::from_slice(body).map_err(|source| Malformed { what: "the agent's services", source })?;
    let observed = |raw: AgentService| Observed {
        addr: raw.address.parse().ok().zip(u16::try_from(raw.port).ok()).map(|(ip, port)| SocketAddr::new(ip, port)),
        id: raw.id,
        name: raw.name,
        tags: raw.tags.unwrap_or_default(),
        meta: raw.meta.unwrap_or_default(),
    };
    Ok(raw.into_values().map(observed).collect())
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "Node", default)]
    node: Option<Node>,
    #[serde(rename = "Service")]
    service: Service,
    #[serde(rename = "Checks", default)]
    checks: Option<Vec<Check>>,
}

#[derive(Default, Deserialize)]
struct Node {
    #[serde(rename = "Address", default)]
    address: String,
    #[serde(rename = "Meta", default)]
    meta: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Service {
    #[serde(rename = "ID", default)]
    id: String,
    #[serde(rename = "Tags", default)]
    tags: Option<BTreeSet<String>>,
    #[serde(rename = "Address", default)]
    address: String,
    #[serde(rename = "Port", default)]
    port: i64,
    #[serde(rename = "Meta", default)]
    meta: Option<BTreeMap<String, String>>,
    #[serde(rename = "Weights", default)]
    weights: Option<RawWeights>,
}

#[derive(Deserialize)]
struct RawWeights {
    #[serde(rename = "Passing", default)]
    passing: i64,
    #[serde(rename = "Warning", default)]
    warning: i64,
}

#[derive(Deserialize)]
struct Check {
    #[serde(rename = "Status", default)]
    status: String,
}

fn instance(entry: Entry) -> Result<Instance, String> {
    let Entry { node, service, checks } = entry;
    let node = node.unwrap_or_default();
    let id: String = service.id.chars().take(80).flat_map(char::escape_debug).collect();
    // The service's own address, where it has one, before its node's.
    let address = [&service.address, &node.address].into_iter().find(|address| !address.is_empty());
    let address = address.ok_or_else(|| format!("instance {id} has no address"))?;
    let ip: IpAddr = address.parse().map_err(|_not_an_ip| {
        let address: String = address.chars().take(80).flat_map(char::escape_debug).collect();
        format!("instance {id} has the address {address}, which is no IP address")
    })?;
    let port = u16::try_from(service.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| format!("instance {id} has no port"))?;
    if ip.is_unspecified() || ip.is_multicast() {
        return Err(format!("instance {id} has the address {ip}, at which nothing can be reached"));
    }
    // Before Consul 1.2.3 there were none. A passing one has a share in any case.
    let weight = |weight: i64, least: u32| u32::try_from(weight).unwrap_or(0).max(least);
    let weights = service.weights.map_or(Weights { passing: 1, warning: 1 }, |raw| Weights {
        passing: weight(raw.passing, 1),
        warning: weight(raw.warning, 0),
    });
    Ok(Instance {
        addr: canonical(SocketAddr::new(ip, port)),
        tags: service.tags.unwrap_or_default(),
        meta: service.meta.unwrap_or_default(),
        weights,
        status: checks.unwrap_or_default().iter().map(Check::status).max().unwrap_or(Status::Passing),
        node_meta: node.meta.unwrap_or_default(),
    })
}

impl Check {
    fn status(&self) -> Status {
        match self.status.as_str() {
            "passing" => Status::Passing,
            "warning" => Status::Warning,
            // `critical`, `maintenance`, and what nobody knows.
            _ => Status::Critical,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEALTH: &str = r#"[
      {"Node": {"Node": "n1", "Address": "10.0.0.5", "Meta": {"zone": "a"}},
       "Service": {"ID": "w2", "Service": "world", "Tags": null, "Address": "", "Port": 32768,
         "Meta": null, "Weights": {"Passing": 3, "Warning": 0}},
       "Checks": [{"Status": "passing"}, {"Status": "warning"}]},
      {"Node": {"Address": "10.0.0.6"},
       "Service": {"ID": "w1", "Address": "10.0.0.4", "Port": 80, "Tags": ["v1"], "Meta": {"a": "b"}},
       "Checks": null},
      {"Node": {"Address": "10.0.0.6"}, "Service": {"ID": "w3", "Address": "db.example.com", "Port": 80}},
      {"Node": {"Address": "10.0.0.6"}, "Service": {"ID": "w4\n", "Port": 0}, "Checks": [{"Status": "gone"}]},
      {"Service": {"ID": "w5", "Port": 80}}
    ]"#;

    #[test]
    fn instances_are_read() {
        let read = instances(HEALTH.as_bytes()).expect("an answer");
        let short: Vec<_> = read.usable.iter().map(|i| (i.addr.to_string(), i.status, i.weights.passing)).collect();
        assert_eq!(
            short,
            [("10.0.0.4:80".into(), Status::Passing, 1), ("10.0.0.5:32768".into(), Status::Warning, 3)],
            "ordered, the service's address before the node's"
        );
        assert_eq!(read.usable[1].node_meta["zone"], "a");
        assert_eq!(
            read.left_out,
            [
                "instance w3 has the address db.example.com, which is no IP address",
                "instance w4\\n has no port",
                "instance w5 has no address",
            ]
        );
    }

    #[test]
    fn names_are_read() {
        let read = names(br#"{"consul": [], "world": ["v1", "v1"], "odd": null}"#).expect("an answer");
        assert_eq!(read.keys().collect::<Vec<_>>(), ["consul", "odd", "world"]);
        assert_eq!(read["world"].len(), 1);
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for bad in ["", "null", "{}", "<html>", "[{}]", r#"[{"Service": {"Port": "80"}}]"#, "[1]"] {
            assert!(instances(bad.as_bytes()).is_err(), "{bad}");
        }
        for bad in ["", "null", "[]", r#"{"a": "b"}"#, "<html>"] {
            assert!(names(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_reading_panic(text: String, port: i64, address in "[0-9a-f.:]{0,20}", status: String) {
            drop(instances(text.as_bytes()));
            drop(names(text.as_bytes()));
            let body = serde_json::json!([{
                "Node": { "Address": address }, "Service": { "ID": text, "Port": port }, "Checks": [{ "Status": status }],
            }]);
            let read = instances(body.to_string().as_bytes()).expect("has the form");
            prop_assert_eq!(read.usable.len() + read.left_out.len(), 1);
        }
    }
}
