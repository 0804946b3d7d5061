//! Linkerd's control plane, as far as its proxy needs one to start and to carry what is measured.
//!
//! linkerd2-proxy asks three services over gRPC: identity, which signs its certificate; policy, which says how each of
//! its ports is spoken to and how it speaks to others; destination, which says where a service is. In a cluster they read
//! Kubernetes. Here they read one [`World`] that never changes, and answer in the same messages, which come from Linkerd's
//! own crate (`linkerd2-proxy-api` 0.20). Written for proxies of Linkerd 2.13 and later, which ask for outbound policies.
//!
//! It must not know where the proxy runs or what is measured.

#[cfg(feature = "serve")]
mod destination;
#[cfg(feature = "serve")]
pub mod header;
#[cfg(feature = "serve")]
mod identity;
#[cfg(feature = "serve")]
mod inbound;
#[cfg(feature = "serve")]
mod knock;
#[cfg(feature = "serve")]
mod outbound;
#[cfg(feature = "serve")]
mod plane;
#[cfg(test)]
#[cfg(feature = "serve")]
mod tests;
pub mod world;

#[cfg(feature = "serve")]
pub use identity::{CSR, KEY, TOKEN};
#[cfg(feature = "serve")]
pub use knock::Knock;
#[cfg(feature = "serve")]
pub use plane::Plane;
pub use world::World;
