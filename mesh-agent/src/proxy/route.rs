//! From a source and a destination to a connected upstream: plan, connect, and the next endpoint if that fails.
//!
//! The same for a byte stream and for each request. Must not know what is going to be sent.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_common::refusal::Refusal;
use mesh_core::{
    addr::OrigDst,
    model::{EndpointId, Service, Workload},
    plan::{self, Delivery, Plan},
};
use tokio::net::{TcpSocket, TcpStream};

use super::{
    Proxy, draw,
    loads::InFlight,
    wire::{self, Socket, Wire},
};
use crate::{
    telemetry::{
        access::{Access, Destination, Source},
        metrics::{Direction, Protocol},
    },
    transport::To,
};

/// Endpoints that one connection or request may try.
const MAX_TRIES: usize = 3;
/// The same with those whose agent sent it elsewhere, which took one round trip and nothing of theirs.
const MAX_ASKED: usize = 16;

/// A client and the service port it wants; as long as its connection.
pub(super) struct Route {
    pub(super) proxy: Arc<Proxy>,
    pub(super) source: Arc<Workload>,
    pub(super) src_addr: SocketAddr,
    pub(super) dst: OrigDst,
    pub(super) service: Arc<Service>,
    /// The service's port that was asked for, and the number that the kernel knows it by.
    pub(super) port: u16,
    pub(super) port_id: u32,
}

/// The endpoints that one connection or request has tried.
#[derive(Default)]
pub(super) struct Attempts {
    tried: Vec<EndpointId>,
    /// Of these, how many have failed.
    failed: usize,
    /// Why the last one failed.
    last: Option<Refusal>,
}

/// A connected upstream.
pub(super) struct Upstream {
    pub(super) wire: Wire,
    pub(super) plan: Plan,
    pub(super) in_flight: InFlight,
}

impl Route {
    /// A record of what happens to the connection or to one request on it.
    pub(super) fn record(&self, protocol: Protocol) -> Access {
        let src = source(self.src_addr, &self.source);
        let dst = Destination {
            addr: Some(self.dst.0),
            service: Some(self.service.name.clone()),
            port: Some(self.port),
            ..Destination::default()
        };
        Access::begin(&self.proxy.telemetry, Direction::Outbound, protocol, src, dst)
    }

    /// Decides where it goes now.
    fn plan(&self, tried: &[EndpointId]) -> Result<Plan, Refusal> {
        let proxy = &self.proxy;
        let ask = plan::Outbound {
            source: &self.source,
            dst: self.dst,
            tried,
            load: &|endpoint| proxy.loads.load(endpoint),
            now: proxy.now(),
            draw: draw(),
        };
        plan::outbound(&proxy.published.load(), &ask).map_err(|refused| {
            tracing::debug!(
                src.addr = %self.src_addr, src.service = %self.source.service, dst.addr = %self.dst.0,
                refusal = refused.refusal as u32, reasons = ?refused.reasons, "refused"
            );
            refused.refusal
        })
    }

    /// Plans and connects for a byte stream, going on to other endpoints while that fails. All that can be known of its
    /// response time is how long the connection took.
    pub(super) async fn open(&self, access: &mut Access) -> Result<Upstream, Refusal> {
        let mut attempts = Attempts::default();
        loop {
            let plan = attempts.plan(self, access)?;
            let endpoint = plan.endpoint.clone();
            let began = self.proxy.now();
            match self.connect(plan).await {
                Ok(upstream) => {
                    let now = self.proxy.now();
                    upstream.in_flight.succeeded(now.saturating_sub(began), now);
                    return Ok(upstream);
                }
                Err(refusal) => attempts.failed(self, &endpoint.id, refusal)?,
            }
        }
    }

    /// Carries out one plan. A failure is charged to the endpoint; a success is not credited yet, because an
    /// application that accepts and then fails must not look well.
    pub(super) async fn connect(&self, plan: Plan) -> Result<Upstream, Refusal> {
        let proxy = &self.proxy;
        let in_flight = proxy.loads.start(&plan.endpoint.id);
        match self.wire(&plan).await {
            Ok(wire) => Ok(Upstream { wire, plan, in_flight }),
            Err(Refusal::NotReady) => {
                in_flight.leaving(proxy.now());
                Err(Refusal::NotReady)
            }
            Err(refusal) => {
                if worth_another(refusal) {
                    in_flight.failed(proxy.now(), draw());
                }
                Err(refusal)
            }
        }
    }

    async fn wire(&self, plan: &Plan) -> Result<Wire, Refusal> {
        let proxy = &self.proxy;
        match &plan.delivery {
            Delivery::Local { task, to } => {
                let (socket, gone) = proxy.namespaces.socket_of(task, *to).ok_or(Refusal::TaskGone)?;
                Ok(Wire::tcp(connected(socket, *to, proxy.connect_timeout).await?).until(gone))
            }
            Delivery::Plaintext { to } => {
                let socket = proxy.namespaces.socket_of_host(*to);
                Ok(Wire::tcp(connected(socket, *to, proxy.connect_timeout).await?))
            }
            Delivery::Tunnel { agent, authority, from, expect } => {
                let to = To {
                    agent: *agent,
                    authority: *authority,
                    from: from.clone(),
                    expect: expect.clone(),
                    elsewhere: plan.elsewhere,
                };
                let tunnel = proxy.dialer.open(&to).await.map_err(|error| {
                    tracing::debug!(
                        dst.agent = %agent, refusal = error.refusal as u32, error = %error,
                        source = error.source.as_ref().map(|source| source.to_string()), "no tunnel"
                    );
                    error.refusal
                })?;
                Ok(Wire::new(Socket::Tunnel(Box::new(tunnel))))
            }
        }
    }
}

impl Attempts {
    /// Decides where it goes next, and writes that into the record.
    pub(super) fn plan(&self, route: &Route, access: &mut Access) -> Result<Plan, Refusal> {
        let plan = route.plan(&self.tried).map_err(|refusal| self.last.unwrap_or(refusal))?;
        note(access, &plan);
        Ok(plan)
    }

    /// The planned endpoint has failed.
    ///
    /// # Errors
    /// No other is to be tried; this is what the client is told.
    pub(super) fn failed(&mut self, route: &Route, endpoint: &EndpointId, refusal: Refusal) -> Result<(), Refusal> {
        self.tried.push(*endpoint);
        self.last = Some(refusal);
        self.failed += usize::from(refusal != Refusal::NotReady);
        if self.failed >= MAX_TRIES || self.tried.len() >= MAX_ASKED || !worth_another(refusal) {
            return Err(refusal);
        }
        route.proxy.telemetry.metrics.retries.inc();
        Ok(())
    }
}

/// Who a local task is, for records.
pub(super) fn source(addr: SocketAddr, workload: &Workload) -> Source {
    Source {
        addr: Some(addr),
        task: Some(workload.task.clone()),
        service: Some(workload.service.clone()),
        id: Some(workload.identity.clone()),
    }
}

/// Writes into the record which endpoint is tried.
fn note(access: &mut Access, plan: &Plan) {
    let endpoint = &plan.endpoint;
    access.tries += 1;
    access.dst.endpoint = Some(endpoint.id);
    access.dst.task = endpoint.task().cloned();
    (access.dst.id, access.dst.agent) = match &plan.delivery {
        Delivery::Tunnel { agent, expect, .. } => (Some(expect.clone()), Some(*agent)),
        Delivery::Local { task, .. } => {
            access.dst.task = Some(task.clone());
            (endpoint.identity.clone(), None)
        }
        Delivery::Plaintext { .. } => (None, None),
    };
}

/// Whether another endpoint may do better: not if the mesh itself says no.
fn worth_another(refusal: Refusal) -> bool {
    !matches!(refusal, Refusal::Denied | Refusal::NoIdentity)
}

/// Connects a socket.
pub(super) async fn connected(
    socket: std::io::Result<std::net::TcpStream>,
    to: SocketAddr,
    within: Duration,
) -> Result<TcpStream, Refusal> {
    let attempt = async {
        let socket = socket?;
        wire::tune(&socket)?;
        TcpSocket::from_std_stream(socket).connect(to).await
    };
    match tokio::time::timeout(within, attempt).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => {
            tracing::debug!(dst.addr = %to, %error, "cannot connect to an endpoint");
            let silent = error.kind() == std::io::ErrorKind::TimedOut;
            Err(if silent { Refusal::ConnectTimeout } else { Refusal::ConnectFailed })
        }
        Err(_elapsed) => Err(Refusal::ConnectTimeout),
    }
}
