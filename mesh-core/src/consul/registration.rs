//! What Consul has to be told about this host's tasks, and what has to be done so that it knows exactly that.
//!
//! Which tasks, and under which names, is [`crate::registration`]'s to say. Must not know HTTP.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use crate::{
    addr::canonical,
    config::discovery,
    instance::meta,
    model::Snapshot,
    registration::{self, Form, OWN_META, Registration},
    task::Task,
};

/// What is registered, as Consul's agent says it. Only what bears our mark is ever looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    pub id: String,
    pub name: String,
    pub addr: Option<SocketAddr>,
    pub tags: BTreeSet<String>,
    pub meta: BTreeMap<String, String>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Deregister { id: String },
    Register(Registration),
}

/// The check of an instance.
pub fn check_id(id: &str) -> String {
    format!("service:{id}")
}

/// Meta of one instance that Consul takes: entries, octets of a key, octets of a value.
const META_LIMITS: (usize, usize, usize) = (64, 128, 512);

/// Everything of this host that has to be registered with Consul, by id; see [`registration::desired`].
pub fn desired(
    snapshot: &Snapshot,
    tasks: &[Task],
    tunnel: SocketAddr,
    config: &discovery::Registration,
) -> BTreeMap<String, Registration> {
    let form = Form { tags: &config.tags, meta: META_LIMITS.0 - OWN_META, takes };
    registration::desired(snapshot, tasks, tunnel, &form)
}

fn takes(key: &str, value: &str) -> bool {
    let (_, key_length, value_length) = META_LIMITS;
    (1..=key_length).contains(&key.len())
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        && value.len() <= value_length
        && !key.to_ascii_lowercase().starts_with("consul-")
}

/// What of `desired` is to be registered now: what is ready, and what is registered already, which its check then calls
/// critical. A task that has never been ready is nobody's to see: not everybody who asks a registry looks at checks.
pub fn due(
    desired: &BTreeMap<String, Registration>,
    observed: &[Observed],
    owner: &str,
) -> BTreeMap<String, Registration> {
    let of = |observed: &&Observed| observed.meta.get(meta::OWNER).is_some_and(|of| of == owner);
    let known: BTreeSet<&str> = observed.iter().filter(of).map(|observed| observed.id.as_str()).collect();
    let due = desired.iter().filter(|(id, wanted)| wanted.ready || known.contains(id.as_str()));
    due.map(|(id, wanted)| (id.clone(), wanted.clone())).collect()
}

/// What has to be done so that exactly `desired` is registered: leftovers go first, also those of an agent that crashed
/// or of a host that bore this address before; what others have registered is not touched. At rest it is nothing.
pub fn actions(desired: &BTreeMap<String, Registration>, observed: &[Observed], owner: &str) -> Vec<Action> {
    let ours: BTreeMap<&str, &Observed> = observed
        .iter()
        .filter(|observed| observed.meta.get(meta::OWNER).is_some_and(|of| of == owner))
        .map(|observed| (observed.id.as_str(), observed))
        .collect();
    let gone = ours.keys().filter(|id| !desired.contains_key(**id));
    let wrong = desired.values().filter(|wanted| !ours.get(wanted.id.as_str()).is_some_and(|it| is(wanted, it)));
    let gone = gone.map(|id| Action::Deregister { id: (*id).to_owned() });
    gone.chain(wrong.cloned().map(Action::Register)).collect()
}

/// Whether it is registered so. Readiness is not part of it: that is the check's.
fn is(wanted: &Registration, observed: &Observed) -> bool {
    wanted.name == observed.name
        && Some(wanted.addr) == observed.addr.map(canonical)
        && wanted.tags == observed.tags
        && wanted.meta == observed.meta
}

#[cfg(test)]
mod tests;
