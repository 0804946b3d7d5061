//! Renews certificates when `mesh_core::rotate` says so.
//!
//! Must not decide when that is.

use std::time::{Duration, SystemTime};

use mesh_core::{
    id::SpiffeId,
    rotate::{self, Next},
};

use crate::identity::{Held, Identities};

/// Looks at the wall clock at least this often: it may have been set while we slept.
const LOOK: Duration = Duration::from_secs(60);
/// Sleeps at least this long, so that no answer of `rotate` can make a busy loop.
const REST: Duration = Duration::from_millis(10);

impl Identities {
    /// Keeps every certificate fresh. Runs until it is dropped; run it once per process.
    pub async fn keep_fresh(self) {
        loop {
            let (due, next) = self.look(SystemTime::now());
            for id in &due {
                match self.renew(id) {
                    Ok(leaf) => tracing::info!(identity = %id, serial = leaf.serial, "certificate renewed"),
                    Err(error) => tracing::warn!(
                        identity = %id, error = %error,
                        "cannot renew certificate; the present one is used until it expires"
                    ),
                }
            }
            let rest = if due.is_empty() { next.clamp(REST, LOOK) } else { REST };
            // An identity added meanwhile may be due earlier; either way the next turn looks at all again.
            drop(tokio::time::timeout(rest, self.inner.added.notified()).await);
        }
    }

    /// Who is due, and how long until the next one is.
    fn look(&self, now: SystemTime) -> (Vec<SpiffeId>, Duration) {
        let mut due = Vec::new();
        let mut next = LOOK;
        for (id, held) in self.write().iter_mut() {
            match held.until_due(now) {
                Some(Duration::ZERO) => due.push(id.clone()),
                Some(wait) => next = next.min(wait),
                None => {}
            }
        }
        (due, next)
    }
}

impl Held {
    /// `None` where no certificate was issued yet: whoever needs it asks again.
    fn until_due(&mut self, now: SystemTime) -> Option<Duration> {
        let leaf = self.leaf.as_ref()?;
        let due = *self.due.get_or_insert_with(|| {
            // From the issuance, not from the back-dated start: half-life is of the time that is left to use.
            match rotate::next(leaf.issued, leaf.not_after, now, self.failures, leaf.draw) {
                Next::Renew => now,
                Next::Wait(wait) => now + wait,
            }
        });
        Some(due.duration_since(now).unwrap_or(Duration::ZERO))
    }
}
