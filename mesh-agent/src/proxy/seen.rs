//! What was last spoken on a service port, so that the next connection need not wait to find out.
//!
//! Only a hint about how long to wait for the client before the upstream is opened; the bytes of each connection still
//! decide. Bounded by the snapshot's ports. Must not know what is done with it.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
    time::Duration,
};

use mesh_core::model::Snapshot;

/// What was spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spoke {
    /// The server spoke first.
    ServerFirst,
    /// The client spoke first, and not HTTP.
    ClientFirst,
    /// HTTP requests.
    Http,
}

/// By the number of the service port.
#[derive(Default)]
pub(super) struct Seen(RwLock<HashMap<u32, Spoke>>);

impl Seen {
    /// How long to wait for the first byte of a client on this port before the upstream is opened.
    ///
    /// A byte stream needs its upstream anyway, so it is opened at once. HTTP clients often connect ahead of their
    /// first request, and each would cost an upstream connection that no request may use. Of a port never seen we
    /// cannot know: most clients that speak first do so within 10 ms.
    pub(super) fn patience(&self, port: u32) -> Duration {
        match self.0.read().unwrap_or_else(PoisonError::into_inner).get(&port) {
            Some(Spoke::ServerFirst | Spoke::ClientFirst) => Duration::ZERO,
            Some(Spoke::Http) => Duration::from_millis(250),
            None => Duration::from_millis(10),
        }
    }

    pub(super) fn note(&self, port: u32, spoke: Spoke) {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&port) == Some(&spoke);
        if !known {
            self.0.write().unwrap_or_else(PoisonError::into_inner).insert(port, spoke);
        }
    }

    pub(super) fn retain_known(&self, snapshot: &Snapshot) {
        let known = |port: &u32| snapshot.by_service_number.contains_key(port);
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|port, _| known(port));
    }
}
