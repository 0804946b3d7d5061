//! A connection that stops being HTTP: WebSocket, any other `Upgrade`, `CONNECT`. Bytes both ways from then on.
//!
//! Must not know what is spoken afterwards.

use std::pin::Pin;

use hyper::{
    Response,
    body::Incoming,
    upgrade::{OnUpgrade, Parts, Upgraded},
};
use hyper_util::rt::TokioIo;
use mesh_common::refusal::Refusal;

use super::answer::Answer;
use crate::{
    proxy::{
        copy,
        http::{hop, parting::Parting},
        loads::InFlight,
        wire::Wire,
    },
    telemetry::access::Access,
};

/// The stream that a connection has become.
pub(super) type Switched = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Passes the server's consent on, and returns what is to be done when the client has it: connect both sides. The
/// record lives as long as the stream.
pub(super) fn switch(
    client: OnUpgrade,
    mut response: Response<Incoming>,
    mut access: Access,
    in_flight: InFlight,
) -> (Response<Answer>, Switched) {
    let server = hyper::upgrade::on(&mut response);
    let switched = async move {
        match tokio::try_join!(client, server) {
            Ok((client, server)) => match (client_side(client), server_side(server)) {
                (Some(client), Some(server)) => {
                    let counts = access.counts.clone();
                    access.outcome = copy::both_ways(client, server, counts).await;
                }
                _ => access.refusal = Some(Refusal::UpstreamReset),
            },
            Err(error) => {
                tracing::debug!(%error, "a change of protocol was not completed");
                access.refusal = Some(Refusal::UpstreamReset);
            }
        }
        drop((access, in_flight));
    };
    let (mut head, _no_body) = response.into_parts();
    hop::strip(&mut head.headers, head.status == http::StatusCode::SWITCHING_PROTOCOLS);
    (Response::from_parts(head, Answer::empty()), Box::pin(switched))
}

/// The client's connection, with what hyper had read of the new protocol already.
fn client_side(upgraded: Upgraded) -> Option<Wire> {
    let Parts { io, read_buf, .. } = upgraded.downcast::<TokioIo<Wire>>().ok()?;
    Some(io.into_inner().rewound(read_buf))
}

/// The server's, likewise.
fn server_side(upgraded: Upgraded) -> Option<Wire> {
    let Parts { io, read_buf, .. } = upgraded.downcast::<TokioIo<Parting>>().ok()?;
    Some(io.into_inner().into_wire()?.rewound(read_buf))
}
