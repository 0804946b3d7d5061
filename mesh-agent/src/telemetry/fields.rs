//! The dictionary of log fields: one name per thing, in every log line and access record.
//!
//! `tracing` macros need the names as tokens (`src.addr = %x`); they are spelled as here. Must not know who logs.

/// When the connection or request began; RFC 3339, UTC.
pub const TIME: &str = "time";
/// `outbound`, `inbound` or `direct`.
pub const DIRECTION: &str = "direction";
/// `tcp`, or of a request `http` (HTTP/1), `http2` or `grpc`.
pub const PROTOCOL: &str = "protocol";
/// Who connected: address, ECS task id, service, SPIFFE id.
pub const SRC_ADDR: &str = "src.addr";
pub const SRC_TASK: &str = "src.task";
pub const SRC_SERVICE: &str = "src.service";
pub const SRC_ID: &str = "src.id";
/// The address that the application named.
pub const DST_ADDR: &str = "dst.addr";
pub const DST_SERVICE: &str = "dst.service";
pub const DST_PORT: &str = "dst.port";
/// The endpoint that was chosen, its task and identity, and the agent in front of it.
pub const DST_ENDPOINT: &str = "dst.endpoint";
pub const DST_TASK: &str = "dst.task";
pub const DST_ID: &str = "dst.id";
pub const DST_AGENT: &str = "dst.agent";
/// Payload, seen from the source.
pub const BYTES_SENT: &str = "bytes_sent";
pub const BYTES_RECEIVED: &str = "bytes_received";
pub const DURATION_MS: &str = "duration_ms";
/// How many endpoints were tried.
pub const TRIES: &str = "tries";
/// `ok`, `refused`, `reset` or `aborted`.
pub const OUTCOME: &str = "outcome";
/// HTTP only; the path has no query, because queries carry secrets.
pub const METHOD: &str = "http.method";
pub const PATH: &str = "http.path";
pub const STATUS: &str = "http.status";
/// gRPC only: the number of the status code.
pub const GRPC_STATUS: &str = "grpc.status";
/// Number and label of [`mesh_common::refusal::Refusal`].
pub const REFUSAL: &str = "refusal";
pub const REFUSAL_LABEL: &str = "refusal.label";
