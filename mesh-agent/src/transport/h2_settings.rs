//! The HTTP/2 figures of both ends of a tunnel connection, and how a dead connection is noticed.
//!
//! Must not know who dials or accepts.

use std::time::Duration;

use h2::{Ping, PingPong};

/// Streams that we put on one connection before another is opened (ztunnel does the same).
pub(super) const STREAMS_PER_CONNECTION: usize = 100;

/// Streams that a peer may have open on one connection.
const STREAMS_ACCEPTED: u32 = 1000;

/// What one stream may have in flight: enough for 8 Gbit/s at 1 ms round trip.
const STREAM_WINDOW: u32 = 1 << 20;

/// What all streams of a connection may have in flight together. With a connection window as small as one stream's, a
/// reader of A that waits for B deadlocks when nobody reads B; with four times as much, four stalled readers stop
/// everybody. With one window for each stream nobody can stop anybody, and many small frames that wait do not either as long
/// as whoever cannot take them gathers them ([`inflow`](super::inflow)). It bounds the memory of a connection whose
/// readers have all stalled; a connection that is read holds next to nothing.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * 100;

/// Larger frames than the default 16 KiB halve the cost per byte; larger than this they delay other streams. With its
/// head of 9 octets (RFC 9113, section 4.1) a full frame is exactly four full TLS records (RFC 8446, section 5.1),
/// which is also as much as the TLS library takes at once.
pub(super) const FRAME: u32 = (64 << 10) - 9;

/// Written but not yet sent, per stream.
const SEND_BUFFER: usize = 512 << 10;

const HEADER_LIST: u32 = 16 << 10;

/// Streams that we have reset are remembered, because the peer's bytes for them are still under way: this many, this
/// long. A byte for a stream that was forgotten counts as a fault of the peer, and a connection with too many faults
/// is closed, with every stream on it. h2's defaults (50 streams, 1 s, 1024 faults in a connection's life) are for
/// connections that live for minutes; ours carry thousands of broken-off downloads over days.
const RESETS_REMEMBERED: usize = 1000;
const RESET_REMEMBERED_FOR: Duration = Duration::from_secs(10);
const FAULTS_FORGIVEN: usize = 100_000;

/// Streams that the peer may open and reset before we have looked at them: all that a pooled connection carries, for
/// a client process that dies resets them together. More is a flood (CVE-2023-44487).
const UNSEEN_RESETS: usize = STREAMS_PER_CONNECTION;

const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// HTTP/2 settings of the dialling end.
pub(super) fn client() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .reset_stream_duration(RESET_REMEMBERED_FOR)
        .max_local_error_reset_streams(Some(FAULTS_FORGIVEN))
        .enable_push(false);
    builder
}

/// HTTP/2 settings of the accepting end. Floods of empty and of tiny frames are limited by h2's own defaults.
pub(super) fn server() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .reset_stream_duration(RESET_REMEMBERED_FOR)
        .max_local_error_reset_streams(Some(FAULTS_FORGIVEN))
        .max_pending_accept_reset_streams(UNSEEN_RESETS)
        .max_concurrent_streams(STREAMS_ACCEPTED);
    builder
}

/// Pings the peer for as long as it answers; returns when the connection has to be taken for dead.
pub(super) async fn until_dead(mut pings: PingPong) {
    loop {
        tokio::time::sleep(PING_EVERY).await;
        match tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_pong)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
