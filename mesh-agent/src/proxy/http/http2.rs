//! HTTP/2 that a client begins unasked (prior knowledge, as gRPC does): each stream is a request of its own.
//!
//! One task carries a client's connection and all its requests; upstream connections have tasks of their own, on the
//! same thread, and are shared ([`pool`]). h2 checks what RFC 9113 §8.1 and §8.2 ask of a message, among
//! it that no connection-level field is in it, so nothing has to be removed from heads. Must not know how a client was found to
//! speak HTTP/2.

mod exchange;
pub(in crate::proxy) mod pool;
mod relay;

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, Stream as _};
use h2::server::Connection;
use mesh_common::refusal::Refusal;

use self::pool::AtHand;
use super::client::Client;
use crate::{
    proxy::{
        route::{Route, Upstream},
        wire::Wire,
    },
    telemetry::metrics::Protocol,
};

/// What one stream may have in flight towards us: enough for 2 Gbit/s at 1 ms round trip. With what h2 holds of a body
/// that is written on, it bounds what a stalled stream costs.
const STREAM_WINDOW: u32 = 256 << 10;
/// Streams on one connection, with a client and with a server.
const STREAMS: u32 = 100;
/// A window for each stream: one that nobody reads cannot stop another, small as its frames may be ([`relay`]).
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * STREAMS;
/// Written but not yet sent, per stream.
const SEND_BUFFER: usize = 256 << 10;
/// As much as servers commonly take.
const HEADER_LIST: u32 = 64 << 10;
/// Streams that we have reset are remembered, because bytes for them are still under way; a forgotten one counts as a
/// fault of the peer. Callers that cancel often are not faulty.
const RESETS_REMEMBERED: usize = 1000;
const FAULTS_FORGIVEN: usize = 100_000;

/// Serves a client until its connection ends. `spare` is an upstream that was opened while the protocol was not yet
/// known; it becomes the first pooled one.
pub(in crate::proxy) async fn serve(route: Arc<Route>, client: Wire, spare: Option<Upstream>) {
    let at_hand = Arc::new(AtHand::default());
    if let Some(spare) = spare {
        pool::donate(&route, &at_hand, spare).await;
    }
    let mut drain = route.proxy.drain.subscribe();
    let handshake = settings().handshake(client);
    let ended = match handshake.await {
        Ok(mut connection) => {
            let client = Arc::new(Client::new(route.clone()));
            let mut requests = FuturesUnordered::new();
            let mut begin = |request, respond| exchange::answer(client.clone(), at_hand.clone(), request, respond);
            let ended = tokio::select! {
                ended = poll_fn(|cx| match poll(&mut connection, &mut requests, &mut begin, cx) {
                    Poll::Pending if client.is_leaving() => Poll::Ready(None),
                    polled @ (Poll::Pending | Poll::Ready(_)) => polled.map(Some),
                }) => ended,
                // The sender lives in the proxy that we hold.
                () = async { drop(drain.wait_for(|drain| *drain).await) } => None,
            };
            match ended {
                Some(ended) => ended,
                None => {
                    // The client learns which of its requests are answered, and sends others elsewhere.
                    connection.graceful_shutdown();
                    poll_fn(|cx| poll(&mut connection, &mut requests, &mut begin, cx)).await
                }
            }
        }
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        tracing::debug!(src.addr = %route.src_addr, %error, "a client's HTTP/2 connection ended early");
        if error.is_library() {
            // h2 has told the client; no request came out of it that could tell.
            let mut access = route.record(Protocol::Http2);
            access.refusal = Some(Refusal::BadRequest);
        }
    }
}

/// Goes on with the connection and all its requests.
fn poll<F: Future<Output = ()>>(
    connection: &mut Connection<Wire, Bytes>,
    requests: &mut FuturesUnordered<F>,
    begin: &mut impl FnMut(http::Request<h2::RecvStream>, h2::server::SendResponse<Bytes>) -> F,
    cx: &mut Context<'_>,
) -> Poll<Result<(), h2::Error>> {
    // Reads what has come, and writes what the requests have left to be written.
    loop {
        match connection.poll_accept(cx) {
            Poll::Ready(Some(Ok((request, respond)))) => requests.push(begin(request, respond)),
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
            Poll::Ready(None) => return Poll::Ready(Ok(())),
            Poll::Pending => break,
        }
    }
    // What a request writes now wakes us once more.
    while let Poll::Ready(Some(())) = std::pin::Pin::new(&mut *requests).poll_next(cx) {}
    Poll::Pending
}

fn settings() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .max_local_error_reset_streams(Some(FAULTS_FORGIVEN))
        // A client process that dies resets all its streams together. More is a flood (CVE-2023-44487).
        .max_pending_accept_reset_streams(STREAMS as usize);
    builder
}
