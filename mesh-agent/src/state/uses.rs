//! Which services the tasks of this host ask for: told by whoever answers them, heard by discovery, which keeps those
//! freshest.
//!
//! A hint and no more: it may come late, or not at all. Must not know who tells or listens.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use mesh_core::id::ServiceName;
use tokio::sync::mpsc;

/// A service is not told again before this is over.
const AGAIN: Duration = Duration::from_secs(10);
/// Hints that may wait for the listener.
const WAITING: usize = 1024;
/// Services remembered; beyond, all are forgotten and told anew.
const REMEMBERED: usize = 20_000;

/// See the module's text. Cheap to clone.
#[derive(Clone, Default)]
pub struct Uses {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    told: HashMap<ServiceName, Instant>,
    listeners: Vec<mpsc::Sender<ServiceName>>,
}

impl Uses {
    /// A task has asked for this service.
    pub fn note(&self, service: &ServiceName) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let Shared { told, listeners } = &mut *shared;
        listeners.retain(|listener| !listener.is_closed());
        if listeners.is_empty() {
            return;
        }
        let now = Instant::now();
        if told.get(service).is_some_and(|at| now.duration_since(*at) < AGAIN) {
            return;
        }
        if told.len() >= REMEMBERED {
            told.clear();
        }
        told.insert(service.clone(), now);
        for listener in listeners {
            // One that is behind hears of it the next time.
            listener.try_send(service.clone()).ok();
        }
    }

    /// From now on uses are heard here too.
    pub fn listen(&self) -> mpsc::Receiver<ServiceName> {
        let (sender, receiver) = mpsc::channel(WAITING);
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).listeners.push(sender);
        receiver
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_use_is_told_once_in_a_while() {
        let uses = Uses::default();
        let world: ServiceName = "world".parse().expect("valid");
        uses.note(&world);
        let (mut heard, mut other) = (uses.listen(), uses.listen());
        for _ in 0..3 {
            uses.note(&world);
        }
        assert_eq!(heard.try_recv().expect("told"), world);
        assert!(heard.try_recv().is_err());
        assert_eq!(other.try_recv().expect("everybody is told"), world);
    }
}
