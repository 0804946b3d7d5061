//! The heart: one connection or request in, one plan or one numbered refusal out, with the reasons.
//!
//! Outbound goes resolve → route → authorise → pick, inbound goes resolve → authorise, in that order, here and nowhere
//! else. Must not know how a plan is carried out.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_common::refusal::Refusal;

use crate::{
    addr::{OrigDst, canonical},
    balance::Load,
    id::{ServiceName, SpiffeId, TaskId},
    model::{Endpoint, EndpointId, Protocol, Service, ServicePort, Snapshot, Target, Workload},
    policy::{Effect, Verdict},
};

mod inbound;
mod outbound;

/// What is asked: where should this connection, or this request on it, go?
pub struct Outbound<'a> {
    pub source: &'a Workload,
    pub dst: OrigDst,
    /// Endpoints that this connection or request has tried already.
    pub tried: &'a [EndpointId],
    /// Current load of an endpoint.
    pub load: &'a dyn Fn(&EndpointId) -> Load,
    /// Monotonic time since the agent started.
    pub now: Duration,
    /// A uniformly drawn number.
    pub draw: u64,
}

/// Where a connection goes, and why.
#[derive(Clone, Debug)]
pub struct Plan {
    pub service: Arc<Service>,
    /// Index into `service.ports`.
    pub port: usize,
    pub endpoint: Arc<Endpoint>,
    pub delivery: Delivery,
    /// Another endpoint could have been chosen: who meets a task that is just stopping may be sent away.
    pub elsewhere: bool,
    pub reasons: Vec<Reason>,
}

/// How the bytes get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Through a socket made in the task's namespace.
    Local { task: TaskId, to: SocketAddr },
    /// mTLS to `agent`, and there CONNECT to `authority`; the peer must prove `expect`.
    Tunnel { agent: SocketAddr, authority: SocketAddr, from: SpiffeId, expect: SpiffeId },
    /// Plain TCP, because the service permits it.
    Plaintext { to: SocketAddr },
}

/// One step of the reasoning, for `explain` and debug logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason(pub String);

/// A refusal and the reasoning that led to it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused ({}): {}", .refusal.label(), .refusal.cause())]
pub struct Refused {
    pub refusal: Refusal,
    pub reasons: Vec<Reason>,
}

/// A tunnel stream that a peer agent asks for.
pub struct Inbound<'a> {
    /// Proved by the peer's certificate.
    pub peer: &'a SpiffeId,
    /// Whose certificate we showed: the peer takes whoever answers for this one.
    pub presented: &'a SpiffeId,
    /// `:authority` of the CONNECT.
    pub target: SocketAddr,
    /// The peer has another endpoint to go to.
    pub elsewhere: bool,
}

/// Where an inbound stream is delivered.
#[derive(Clone, Debug)]
pub struct InboundPlan {
    pub service: Arc<Service>,
    pub port: usize,
    pub workload: Arc<Workload>,
    /// In the workload's namespace.
    pub to: SocketAddr,
    pub reasons: Vec<Reason>,
}

/// Which service port a destination belongs to; the first step of [`outbound`], needed before any byte is read.
///
/// # Errors
/// The destination is neither a virtual address nor a known endpoint.
pub fn destination(snapshot: &Snapshot, dst: OrigDst) -> Result<(Arc<Service>, usize), Refused> {
    match resolve(snapshot, dst, &mut Trace::off()) {
        Ok(found) => Ok((found.service.clone(), found.port)),
        Err(_) => traced(|trace| resolve(snapshot, dst, trace)).map(|found| (found.service.clone(), found.port)),
    }
}

/// Decides where an outbound connection or request goes. A plan comes without reasons, which cost time; a refusal
/// has them. [`explain`] gives them for both.
///
/// # Errors
/// The numbered refusal, and why.
pub fn outbound(snapshot: &Snapshot, ask: &Outbound<'_>) -> Result<Plan, Refused> {
    // Deciding is pure, so a refusal may be reasoned a second time with words.
    outbound::decide(snapshot, ask, &mut Trace::off()).or_else(|_| explain(snapshot, ask))
}

/// As [`outbound`], with every step of the reasoning.
///
/// # Errors
/// The numbered refusal, and why.
pub fn explain(snapshot: &Snapshot, ask: &Outbound<'_>) -> Result<Plan, Refused> {
    let mut trace = Trace::on();
    match outbound::decide(snapshot, ask, &mut trace) {
        Ok(plan) => Ok(Plan { reasons: trace.reasons(), ..plan }),
        Err(refusal) => Err(Refused { refusal, reasons: trace.reasons() }),
    }
}

/// Decides whether and where an inbound stream is delivered. Reasons as in [`outbound`].
///
/// # Errors
/// The numbered refusal, and why.
pub fn inbound(snapshot: &Snapshot, ask: &Inbound<'_>) -> Result<InboundPlan, Refused> {
    inbound::decide(snapshot, ask, &mut Trace::off()).or_else(|_| explain_inbound(snapshot, ask))
}

/// As [`inbound`], with every step of the reasoning.
///
/// # Errors
/// The numbered refusal, and why.
pub fn explain_inbound(snapshot: &Snapshot, ask: &Inbound<'_>) -> Result<InboundPlan, Refused> {
    let mut trace = Trace::on();
    match inbound::decide(snapshot, ask, &mut trace) {
        Ok(plan) => Ok(InboundPlan { reasons: trace.reasons(), ..plan }),
        Err(refusal) => Err(Refused { refusal, reasons: trace.reasons() }),
    }
}

/// Where reasons are collected, when somebody wants them.
struct Trace(Option<Vec<Reason>>);

impl Trace {
    fn off() -> Self {
        Self(None)
    }

    fn on() -> Self {
        Self(Some(Vec::new()))
    }

    fn say(&mut self, reason: impl FnOnce() -> String) {
        if let Some(reasons) = &mut self.0 {
            reasons.push(Reason(reason()));
        }
    }

    fn reasons(self) -> Vec<Reason> {
        self.0.unwrap_or_default()
    }
}

fn traced<T>(decide: impl FnOnce(&mut Trace) -> Result<T, Refusal>) -> Result<T, Refused> {
    let mut trace = Trace::on();
    decide(&mut trace).map_err(|refusal| Refused { refusal, reasons: trace.reasons() })
}

/// What a destination was found to be.
struct Found<'a> {
    service: &'a Arc<Service>,
    port: usize,
    /// The application named this very endpoint.
    exact: Option<&'a Arc<Endpoint>>,
}

fn resolve<'a>(snapshot: &'a Snapshot, dst: OrigDst, trace: &mut Trace) -> Result<Found<'a>, Refusal> {
    let dst = canonical(dst.0);
    let found = match snapshot.target(dst) {
        Some(Target::Service { service, port }) => snapshot.services.get(service).and_then(|service| {
            let found = Found { service, port: service.port_index(*port)?, exact: None };
            trace.say(|| format!("{dst} is port {port} of service {}", service.name));
            Some(found)
        }),
        Some(Target::Endpoint { service, port, endpoint }) => snapshot.services.get(service).and_then(|service| {
            let index = service.port_index(*port)?;
            let endpoint = service.ports[index].endpoint(endpoint)?;
            trace.say(|| format!("{dst} is an endpoint of port {port} of service {}", service.name));
            Some(Found { service, port: index, exact: Some(endpoint) })
        }),
        None => None,
    };
    found.ok_or_else(|| {
        trace.say(|| match snapshot.service_at(dst.ip()) {
            Some(service) => {
                let ports: Vec<_> = service.ports.iter().map(|port| port.port.to_string()).collect();
                let ports = if ports.is_empty() { "none".to_owned() } else { ports.join(", ") };
                format!(
                    "{} is service {}, which has no port {}; its ports: {ports}",
                    dst.ip(),
                    service.name,
                    dst.port()
                )
            }
            None => format!("{dst} is neither a virtual address nor a known endpoint"),
        });
        Refusal::UnknownPort
    })
}

/// Asks the policy whether `source` may call `service`.
fn authorise(snapshot: &Snapshot, source: &SpiffeId, service: &Service, trace: &mut Trace) -> Result<(), Refusal> {
    judged(service.verdict(&snapshot.policy, source), source, &service.name, trace)
}

/// The same of the service that a task belongs to.
fn authorise_owner(
    snapshot: &Snapshot,
    source: &SpiffeId,
    owner: &ServiceName,
    trace: &mut Trace,
) -> Result<(), Refusal> {
    judged(snapshot.policy.decide(source, owner), source, owner, trace)
}

fn judged(verdict: Verdict<'_>, source: &SpiffeId, name: &ServiceName, trace: &mut Trace) -> Result<(), Refusal> {
    let (does, refusal) = match verdict.effect {
        Effect::Allow => ("allows", None),
        Effect::Deny => ("denies", Some(Refusal::Denied)),
    };
    trace.say(|| {
        let by = match verdict.rule {
            Some(rule) => format!("policy rule `{}`", rule.name.escape_debug()),
            None => "no policy rule matches; the default".to_owned(),
        };
        let behind: Vec<_> = verdict.behind.iter().map(|name| name.as_str()).collect();
        let behind = if behind.is_empty() { String::new() } else { format!(", a name of {}", behind.join(", ")) };
        format!("{by} {does} {source} to call {name}{behind}")
    });
    refusal.map_or(Ok(()), Err)
}

impl Plan {
    pub fn port(&self) -> &ServicePort {
        &self.service.ports[self.port]
    }

    pub fn protocol(&self) -> Protocol {
        self.port().protocol
    }
}

#[cfg(test)]
mod tests;
