//! The published snapshot: one writer, many readers. Readers never wait, and see one whole snapshot.
//!
//! Must not know how a snapshot is made or used.

pub mod uses;
pub mod vip_file;

use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_core::model::Snapshot;
use tokio::sync::watch;

use uses::Uses;

/// A handle to read the current snapshot, and to learn of the next.
#[derive(Clone)]
pub struct Published {
    current: Arc<ArcSwap<Snapshot>>,
    generation: watch::Receiver<u64>,
    /// What its readers look up, for whoever decides what has to be freshest in the next one.
    pub uses: Uses,
}

/// The one writer.
pub struct Publisher {
    current: Arc<ArcSwap<Snapshot>>,
    generation: watch::Sender<u64>,
}

/// An empty snapshot, its writer and its first reader.
pub fn publish() -> (Publisher, Published) {
    let current = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let (sender, receiver) = watch::channel(0);
    (
        Publisher { current: current.clone(), generation: sender },
        Published { current, generation: receiver, uses: Uses::default() },
    )
}

impl Published {
    /// The snapshot of this moment. Hold it for one decision, not longer.
    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Waits until a generation is published that this handle has not yet waited for.
    ///
    /// # Errors
    /// The writer is gone: the agent is stopping.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.generation.changed().await
    }
}

impl Publisher {
    /// Replaces the snapshot and wakes who waits.
    pub fn replace(&self, snapshot: impl Into<Arc<Snapshot>>) {
        let snapshot = snapshot.into();
        let generation = snapshot.generation;
        self.current.store(snapshot);
        self.generation.send_replace(generation);
    }

    /// The snapshot last published.
    pub fn last(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }
}
