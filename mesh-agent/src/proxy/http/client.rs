//! A client's connection as its requests see it: where it goes, the records of its requests, their metric handles.
//!
//! Must not know which version of HTTP it speaks.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use http::{Method, Uri};
use mesh_core::id::TaskId;

use crate::{
    proxy::route::Route,
    telemetry::{
        access::{Access, Request},
        metrics::{Link, Protocol},
    },
};

/// Metric handles that one connection keeps; more endpoints than this are looked up each time.
const MAX_LINKS: usize = 64;

/// Who asks.
pub(super) struct Client {
    pub(super) route: Arc<Route>,
    /// By the task that answers.
    links: Mutex<Vec<(Option<TaskId>, Arc<Link>)>>,
    /// The connection is to end after the requests that are on it.
    leaving: AtomicBool,
}

impl Client {
    pub(super) fn new(route: Arc<Route>) -> Self {
        Self { route, links: Mutex::default(), leaving: AtomicBool::new(false) }
    }

    /// The task that all requests of this connection go to is stopping.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// A record of one request.
    pub(super) fn record(&self, protocol: Protocol, method: &Method, uri: &Uri) -> Access {
        let mut access = self.route.record(protocol);
        access.request = Some(Box::new(Request { method: method.clone(), uri: uri.clone() }));
        access
    }

    /// Gives the record its metric handles.
    pub(super) fn link(&self, access: &mut Access) {
        let task = &access.dst.task;
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let link = match links.iter().find(|(known, _)| known == task) {
            Some((_, link)) => link.clone(),
            None => {
                let link = self.route.proxy.telemetry.metrics.link(&access.link_key());
                if links.len() < MAX_LINKS {
                    links.push((task.clone(), link.clone()));
                }
                link
            }
        };
        access.link = Some(link);
    }
}

/// Whether a request may be sent again although the server may have acted on it (RFC 9110 §9.2.2).
pub(super) fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE | Method::TRACE)
}
