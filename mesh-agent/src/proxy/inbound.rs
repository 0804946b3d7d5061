//! What arrives by tunnel for a task of this host: authorise, connect from the task's own namespace, copy.
//!
//! The peer is answered only when the application has taken the connection, so that a refusal reaches the caller as
//! one. Must not know how the tunnel came about.

use std::{net::SocketAddr, sync::Arc};

use mesh_common::refusal::Refusal;
use mesh_core::{
    id::SpiffeId,
    plan::{self, InboundPlan},
};

use super::{
    Proxy, copy, route,
    wire::{Socket, Wire},
};
use crate::{
    telemetry::{
        access::{Access, Destination, Source},
        metrics::{Direction, Outcome, Protocol},
    },
    transport::accept::Request,
};

/// Carries one tunnel request from its beginning to its end.
pub async fn handle(proxy: Arc<Proxy>, request: Request) {
    let _live = proxy.live();
    let src = Source {
        addr: Some(request.remote),
        service: service_of(&request.peer),
        id: Some(request.peer.clone()),
        ..Source::default()
    };
    let dst = Destination { addr: Some(request.target), id: Some(request.presented.clone()), ..Destination::default() };
    let mut access = Access::begin(&proxy.telemetry, Direction::Inbound, Protocol::Tcp, src, dst);
    let delivered = tokio::select! {
        // Nothing is begun for who has gone already.
        biased;
        () = request.given_up() => None,
        delivered = deliver(&proxy, &request, &mut access) => Some(delivered),
    };
    let Some(delivered) = delivered else {
        access.outcome = Outcome::Aborted;
        return;
    };
    match delivered {
        Ok(destination) => {
            let src = access.src.service.as_ref().map_or("", |name| name.as_str());
            let dst = access.dst.service.as_ref().map_or("", |name| name.as_str());
            let _open = proxy.telemetry.metrics.open(Direction::Inbound, src, dst);
            let denied = denied(&proxy, request.peer.clone(), request.presented.clone(), request.target);
            match request.accept() {
                Ok(tunnel) => {
                    let source = Wire::new(Socket::Tunnel(Box::new(tunnel)));
                    let counts = access.counts.clone();
                    tokio::select! {
                        outcome = copy::both_ways(source, destination, counts) => access.outcome = outcome,
                        refusal = denied => access.refusal = Some(refusal),
                    }
                }
                // The caller has gone meanwhile.
                Err(_gone) => access.outcome = Outcome::Aborted,
            }
        }
        Err(refusal) => {
            access.refusal = Some(refusal);
            request.refuse(refusal);
        }
    }
}

async fn deliver(proxy: &Proxy, request: &Request, access: &mut Access) -> Result<Wire, Refusal> {
    if *proxy.drain.borrow() {
        return Err(Refusal::Draining);
    }
    let ask = plan::Inbound {
        peer: &request.peer,
        presented: &request.presented,
        target: request.target,
        elsewhere: request.elsewhere,
    };
    let InboundPlan { service, port, workload, to, .. } =
        plan::inbound(&proxy.published.load(), &ask).map_err(|refused| {
            tracing::debug!(
                src.id = %request.peer, dst.addr = %request.target, refusal = refused.refusal as u32,
                reasons = ?refused.reasons, "refused"
            );
            refused.refusal
        })?;
    access.dst.service = Some(service.name.clone());
    access.dst.port = Some(service.ports[port].port);
    access.dst.task = Some(workload.task.clone());
    access.dst.id = Some(workload.identity.clone());
    access.tries = 1;
    let (socket, gone) = proxy.namespaces.socket_of(&workload.task, to).ok_or(Refusal::TaskGone)?;
    Ok(Wire::tcp(route::connected(socket, to, proxy.connect_timeout).await?).until(gone))
}

/// Waits until a new policy denies what was allowed. A stream may be one that the peer keeps for request after request,
/// so it cannot outlive its permission. Other changes do not touch it.
async fn denied(proxy: &Proxy, peer: SpiffeId, presented: SpiffeId, target: SocketAddr) -> Refusal {
    let mut published = proxy.published.clone();
    while published.changed().await.is_ok() {
        let ask = plan::Inbound { peer: &peer, presented: &presented, target, elsewhere: false };
        if plan::inbound(&published.load(), &ask).is_err_and(|refused| refused.refusal == Refusal::Denied) {
            return Refusal::Denied;
        }
    }
    std::future::pending().await
}

/// The service that an identity of our form names.
fn service_of(id: &SpiffeId) -> Option<mesh_core::id::ServiceName> {
    let (_cluster, service) = id.cluster_and_service()?;
    service.parse().ok()
}
