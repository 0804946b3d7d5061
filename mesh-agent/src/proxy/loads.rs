//! The load of every endpoint as this agent sees it, kept for the balancer.
//!
//! One small lock per endpoint, held for a few instructions. Bounded: endpoints that have left the snapshot are
//! forgotten. Must not know how a load is judged; that is `mesh_core::balance`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use mesh_core::{
    balance::Load,
    model::{EndpointId, Snapshot},
};

/// An endpoint that nobody has measured is taken for fast, so that it is tried soon also by a client that sends one
/// request at a time; those in flight keep too many from going there at once.
pub(super) const UNMEASURED: Load =
    Load { rtt: Duration::ZERO, at: Duration::ZERO, in_flight: 0, failures: 0, ejected_until: Duration::ZERO };

/// Loads by endpoint.
#[derive(Default)]
pub(super) struct Loads {
    cells: RwLock<HashMap<EndpointId, Arc<Cell>>>,
}

struct Cell(Mutex<Load>);

impl Default for Cell {
    fn default() -> Self {
        Self(Mutex::new(UNMEASURED))
    }
}

/// One connection or request on its way to an endpoint, until it is dropped.
pub(super) struct InFlight(Arc<Cell>);

impl Loads {
    pub(super) fn load(&self, endpoint: &EndpointId) -> Load {
        match self.cells.read().unwrap_or_else(PoisonError::into_inner).get(endpoint) {
            Some(cell) => *cell.0.lock().unwrap_or_else(PoisonError::into_inner),
            None => UNMEASURED,
        }
    }

    /// A connection or request sets out.
    pub(super) fn start(&self, endpoint: &EndpointId) -> InFlight {
        let known = self.cells.read().unwrap_or_else(PoisonError::into_inner).get(endpoint).cloned();
        let cell = known.unwrap_or_else(|| {
            self.cells.write().unwrap_or_else(PoisonError::into_inner).entry(*endpoint).or_default().clone()
        });
        cell.change(Load::started);
        InFlight(cell)
    }

    /// Forgets endpoints that are not in the snapshot.
    pub(super) fn retain_known(&self, snapshot: &Snapshot) {
        let known = |id: &EndpointId| snapshot.by_address.contains_key(&id.0);
        self.cells.write().unwrap_or_else(PoisonError::into_inner).retain(|id, _| known(id));
    }
}

impl InFlight {
    /// It was answered, or connected, after `rtt`.
    pub(super) fn succeeded(&self, rtt: Duration, now: Duration) {
        self.0.change(|load| load.observe(rtt, now));
    }

    /// The endpoint's own agent sends everybody elsewhere.
    pub(super) fn leaving(&self, now: Duration) {
        self.0.change(|load| load.leave(now));
    }

    /// The endpoint failed.
    pub(super) fn failed(&self, now: Duration, draw: u64) {
        self.0.change(|load| load.fail(now, draw));
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.change(Load::finished);
    }
}

impl Cell {
    fn change(&self, how: impl FnOnce(Load) -> Load) {
        let mut load = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *load = how(*load);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_its_way_counts_until_it_is_dropped() {
        let loads = Loads::default();
        let id = EndpointId::of(([10, 0, 0, 1], 80).into());
        let (one, two) = (loads.start(&id), loads.start(&id));
        assert_eq!(loads.load(&id).in_flight, 2);
        two.failed(Duration::from_secs(1), 0);
        assert_eq!(loads.load(&id).failures, 1);
        one.succeeded(Duration::from_millis(5), Duration::from_secs(2));
        assert_eq!(loads.load(&id).failures, 0);
        drop((one, two));
        assert_eq!(loads.load(&id).in_flight, 0);
        loads.retain_known(&Snapshot::default());
        assert!(loads.cells.read().expect("not poisoned").is_empty());
    }
}
