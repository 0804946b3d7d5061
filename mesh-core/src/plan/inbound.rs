//! The steps of an inbound decision: find the task, authorise the peer.
//!
//! Must not know how the peer proved its identity, nor how a stream is delivered.

use mesh_common::refusal::Refusal;

use super::{Inbound, InboundPlan, Trace, authorise, authorise_owner};
use crate::{
    addr::canonical,
    model::{Health, Reach, Snapshot, Target},
};

pub(super) fn decide(snapshot: &Snapshot, ask: &Inbound<'_>, trace: &mut Trace) -> Result<InboundPlan, Refusal> {
    let target = canonical(ask.target);
    let found = match snapshot.target(target) {
        Some(Target::Endpoint { service, port, endpoint }) => snapshot.services.get(service).and_then(|service| {
            let index = service.port_index(*port)?;
            let endpoint = service.ports[index].endpoint(endpoint)?;
            match &endpoint.reach {
                Reach::Local { task, deliver, .. } => Some((service, index, task, *deliver, endpoint.health)),
                Reach::Tunnel { .. } | Reach::Plaintext => None,
            }
        }),
        Some(Target::Service { .. }) | None => None,
    };
    let Some((service, port, task, to, health)) = found else {
        trace.say(|| format!("{target} is no endpoint of this host"));
        return Err(Refusal::NotLocal);
    };
    let Some(workload) = snapshot.workloads.get(task) else {
        trace.say(|| format!("{target} was task {task}, which is gone"));
        return Err(Refusal::TaskGone);
    };
    trace.say(|| format!("{target} is port {} of service {}, task {task}", service.ports[port].port, service.name));
    // The peer checked a certificate and then named an address. Where its registry is stale, or it lies, the two are of
    // different tasks, and it would talk to one in the belief that it is the other.
    if *ask.presented != workload.identity {
        trace.say(|| format!("the peer expects {}, but the task there is {}", ask.presented, workload.identity));
        return Err(Refusal::UnexpectedIdentity);
    }
    // One bundle, one trust domain: a peer of another one is nobody whom our rules speak about.
    if ask.peer.domain() != workload.identity.domain() {
        trace.say(|| format!("{} is not of trust domain {}", ask.peer, workload.identity.domain()));
        return Err(Refusal::Denied);
    }
    authorise(snapshot, ask.peer, service, trace)?;
    if workload.service != service.name {
        // Listed under another name, the task is still what it is.
        authorise_owner(snapshot, ask.peer, &workload.service, trace)?;
    }
    // Registries elsewhere learn of it later than we do. Nothing has been sent yet, so the peer may try another. Where it
    // has none, or its application named this very task, the task is what there is.
    if health != Health::Healthy && ask.elsewhere {
        trace.say(|| format!("{target} is {health:?}, and the peer can go elsewhere"));
        return Err(Refusal::NotReady);
    }
    trace.say(|| format!("delivered to {to} in its namespace"));
    Ok(InboundPlan { service: service.clone(), port, workload: workload.clone(), to, reasons: Vec::new() })
}
