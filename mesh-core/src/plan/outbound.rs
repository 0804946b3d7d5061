//! The steps of an outbound decision: resolve, authorise, pick.
//!
//! Must not know how a plan is carried out. Allocates nothing unless reasons are wanted, or for the plan itself.

use std::sync::Arc;

use mesh_common::refusal::Refusal;

use super::{Delivery, Outbound, Plan, Trace, authorise, authorise_owner, resolve};
use crate::{
    balance::{self, Picked},
    model::{Endpoint, Health, Protocol, Reach, Service, ServicePort, Snapshot, TlsMode},
};

pub(super) fn decide(snapshot: &Snapshot, ask: &Outbound<'_>, trace: &mut Trace) -> Result<Plan, Refusal> {
    let found = resolve(snapshot, ask.dst, trace)?;
    authorise(snapshot, &ask.source.identity, found.service, trace)?;
    let (endpoint, elsewhere) = match found.exact {
        Some(endpoint) => (exact(found.service, endpoint, ask, trace)?, false),
        None => choose(found.service, &found.service.ports[found.port], ask, trace)?,
    };
    if let Some(owner) = snapshot.other_owner(endpoint, &found.service.name) {
        authorise_owner(snapshot, &ask.source.identity, owner, trace)?;
    }
    let delivery = delivery(endpoint, ask, trace)?;
    Ok(Plan {
        service: found.service.clone(),
        port: found.port,
        endpoint: endpoint.clone(),
        delivery,
        elsewhere,
        reasons: Vec::new(),
    })
}

/// The one endpoint that the application named. Its health is the application's own business.
fn exact<'a>(
    service: &Service,
    endpoint: &'a Arc<Endpoint>,
    ask: &Outbound<'_>,
    trace: &mut Trace,
) -> Result<&'a Arc<Endpoint>, Refusal> {
    if ask.tried.contains(&endpoint.id) {
        trace.say(|| format!("{} was named by the application itself and has been tried", endpoint.addr()));
        return Err(Refusal::NoHealthyEndpoint);
    }
    if !permitted(service, endpoint) {
        trace.say(|| plaintext_sentence(service, endpoint));
        return Err(Refusal::PlaintextForbidden);
    }
    trace.say(|| format!("{} was named by the application itself", endpoint.addr()));
    Ok(endpoint)
}

/// The best of those that may be chosen, and whether there is another.
fn choose<'a>(
    service: &Service,
    port: &'a ServicePort,
    ask: &Outbound<'_>,
    trace: &mut Trace,
) -> Result<(&'a Arc<Endpoint>, bool), Refusal> {
    let endpoints = &port.endpoints;
    let load = |n: usize| (ask.load)(&endpoints[n].id);
    let usable = |n: &usize| is_candidate(&endpoints[*n], ask) && permitted(service, &endpoints[*n]);
    let local = |n: &usize| matches!(endpoints[*n].reach, Reach::Local { .. });
    // A byte stream gains nothing from another host; requests are spread over all.
    let stay = port.protocol == Protocol::Tcp
        && (0..endpoints.len()).any(|n| local(&n) && usable(&n) && !load(n).is_ejected(ask.now));
    let weight = |n: usize| Some(n).filter(usable).filter(|n| !stay || local(n)).map(|n| endpoints[n].weight);
    match balance::pick(endpoints.len(), weight, load, ask.now, ask.draw) {
        Some(picked) => {
            if stay {
                trace.say(|| "a byte stream stays on this host while an endpoint here is healthy".to_owned());
            }
            trace.say(|| picked_sentence(endpoints, picked, ask));
            Ok((&endpoints[picked.chosen], picked.over.is_some()))
        }
        None => Err(none(service, port, ask, trace)),
    }
}

/// Whether a new connection may go there as far as health and earlier attempts are concerned.
fn is_candidate(endpoint: &Endpoint, ask: &Outbound<'_>) -> bool {
    endpoint.health == Health::Healthy && (ask.tried.is_empty() || !ask.tried.contains(&endpoint.id))
}

/// Whether the service's TLS mode permits the way to the endpoint.
fn permitted(service: &Service, endpoint: &Endpoint) -> bool {
    match endpoint.reach {
        Reach::Local { .. } => true,
        // Without an identity to expect, a tunnel would prove nothing.
        Reach::Tunnel { .. } => endpoint.identity.is_some(),
        Reach::Plaintext => service.tls == TlsMode::Permissive,
    }
}

/// Why nobody was chosen.
fn none(service: &Service, port: &ServicePort, ask: &Outbound<'_>, trace: &mut Trace) -> Refusal {
    let endpoints = &port.endpoints;
    if endpoints.is_empty() {
        trace.say(|| format!("port {} of service {} has no endpoint", port.port, service.name));
        return Refusal::NoEndpoint;
    }
    let forbidden = endpoints.iter().find(|endpoint| is_candidate(endpoint, ask) && !permitted(service, endpoint));
    if let Some(endpoint) = forbidden {
        trace.say(|| plaintext_sentence(service, endpoint));
        return Refusal::PlaintextForbidden;
    }
    trace.say(|| {
        let count = |health| endpoints.iter().filter(|endpoint| endpoint.health == health).count();
        format!(
            "port {} of service {} has {} endpoints: {} healthy but tried already, {} unhealthy, {} draining",
            port.port,
            service.name,
            endpoints.len(),
            count(Health::Healthy),
            count(Health::Unhealthy),
            count(Health::Draining)
        )
    });
    Refusal::NoHealthyEndpoint
}

fn plaintext_sentence(service: &Service, endpoint: &Endpoint) -> String {
    format!(
        "service {} requires mTLS, and no agent in front of {} can prove an identity",
        service.name,
        endpoint.addr()
    )
}

fn picked_sentence(endpoints: &[Arc<Endpoint>], picked: Picked, ask: &Outbound<'_>) -> String {
    let shown = |n: usize| {
        let endpoint = &endpoints[n];
        let load = (ask.load)(&endpoint.id);
        let ejected = if load.is_ejected(ask.now) { ", ejected" } else { "" };
        format!("{} (cost {:.1} ms{ejected})", endpoint.addr(), load.cost(ask.now).as_secs_f64() * 1000.0)
    };
    match picked.over {
        Some(over) => format!("picked {} over {}", shown(picked.chosen), shown(over)),
        None => format!("picked {}, the only one that may be chosen", shown(picked.chosen)),
    }
}

fn delivery(endpoint: &Endpoint, ask: &Outbound<'_>, trace: &mut Trace) -> Result<Delivery, Refusal> {
    match &endpoint.reach {
        Reach::Local { task, deliver, .. } => {
            trace.say(|| format!("it is task {task} of this host: delivered to {deliver} in its namespace"));
            Ok(Delivery::Local { task: task.clone(), to: *deliver })
        }
        Reach::Tunnel { agent } => {
            // `permitted` let nobody through without one.
            let Some(expect) = endpoint.identity.clone() else { return Err(Refusal::PlaintextForbidden) };
            trace.say(|| format!("mTLS to the agent at {agent}, which must prove to be {expect}"));
            let from = ask.source.identity.clone();
            Ok(Delivery::Tunnel { agent: *agent, authority: endpoint.addr(), from, expect })
        }
        Reach::Plaintext => {
            trace.say(|| format!("plaintext to {}: it is not in the mesh and the service permits it", endpoint.addr()));
            Ok(Delivery::Plaintext { to: endpoint.addr() })
        }
    }
}
