//! The hooks' reports as access records: connections that never reached the proxy are seen all the same.
//!
//! Must not know how reports leave the kernel.

use std::{net::SocketAddr, sync::Arc, sync::atomic::Ordering};

use mesh_common::{
    event::{Event, kind},
    refusal::Refusal,
};
use mesh_core::model::{Endpoint, Snapshot};
use tokio::sync::mpsc;

use crate::{
    state::Published,
    telemetry::{
        Telemetry,
        access::{Access, Destination, Source},
        metrics::{Direction, Outcome, Protocol},
    },
};

/// Records every report until the channel is closed.
pub(super) async fn record(mut events: mpsc::Receiver<Event>, published: Published, telemetry: Telemetry) {
    while let Some(event) = events.recv().await {
        record_one(&event, &published.load(), &telemetry);
    }
}

fn record_one(event: &Event, snapshot: &Snapshot, telemetry: &Telemetry) {
    let direction = match event.kind {
        kind::REFUSED | kind::FAILED_OPEN => Direction::Outbound,
        kind::DIRECT_CLOSED => Direction::Direct,
        unknown => {
            tracing::warn!(kind = unknown, "the kernel reports something this agent does not know");
            return;
        }
    };
    let (src, dst) = (source(event, snapshot), destination(event, snapshot));
    let mut access = Access::begin(telemetry, direction, Protocol::Tcp, src, dst);
    access.refusal = Refusal::from_number(event.refusal);
    access.outcome = match (event.kind, access.refusal) {
        (_, Some(_)) => Outcome::Refused,
        // What happens to a connection that failed open, nobody sees.
        (kind::FAILED_OPEN, None) => {
            tracing::warn!(
                dst.service = access.dst.service.as_ref().map(|name| name.as_str()),
                "the kernel connected a task in plaintext while the agent was away"
            );
            Outcome::Ok
        }
        _ => Outcome::Ok,
    };
    access.counts.sent.store(event.bytes_sent, Ordering::Relaxed);
    access.counts.received.store(event.bytes_received, Ordering::Relaxed);
}

fn source(event: &Event, snapshot: &Snapshot) -> Source {
    let Some(workload) = snapshot.by_number.get(&event.workload) else { return Source::default() };
    Source {
        addr: None,
        task: Some(workload.task.clone()),
        service: Some(workload.service.clone()),
        id: Some(workload.identity.clone()),
    }
}

fn destination(event: &Event, snapshot: &Snapshot) -> Destination {
    let mut dst = Destination { addr: Some(event.original.into()), ..Destination::default() };
    let Some(destination) = snapshot.by_service_number.get(&event.service) else { return dst };
    let service = destination.target.service();
    dst.service = Some(service.clone());
    dst.port = Some(destination.target.port());
    let went_to = SocketAddr::from(event.endpoint);
    let ports = snapshot.services.get(service).map(|service| service.ports.as_slice()).unwrap_or_default();
    let mut endpoints = ports.iter().flat_map(|port| &port.endpoints);
    if let Some(endpoint) = endpoints.find(|endpoint| is_at(endpoint, went_to)) {
        dst.endpoint = Some(endpoint.id);
        dst.task = endpoint.task().cloned();
        dst.id = endpoint.identity.clone();
    }
    dst
}

fn is_at(endpoint: &Arc<Endpoint>, addr: SocketAddr) -> bool {
    use mesh_core::model::Reach;
    endpoint.addr() == addr
        || match &endpoint.reach {
            Reach::Local { deliver, .. } => *deliver == addr,
            Reach::Tunnel { .. } | Reach::Plaintext => false,
        }
}
