//! HTTP: each request of a client's connection is planned, sent and recorded by itself, whichever version carries it.
//!
//! What both versions share is here: who asks ([`client`]), what a refusal looks like ([`refusal`]), which header fields
//! end at a proxy ([`hop`]), how an upstream connection is left ([`parting`]). The client's version decides: HTTP/1 goes
//! on as HTTP/1.1 and HTTP/2 as HTTP/2, as if nobody stood between. Must not know how a client was found to speak HTTP.

pub(super) mod http1;
pub(super) mod http2;

mod client;
mod hop;
mod parting;
mod refusal;
