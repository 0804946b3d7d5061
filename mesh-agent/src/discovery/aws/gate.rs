//! Where questions that share a quota wait for their turn: a pace that several tasks keep together.
//!
//! How fast is the pace's to say. Must not know what is asked.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mesh_core::aws::pace::Pace;

use super::Trouble;

/// See the module's text.
#[derive(Debug)]
pub struct Gate {
    pace: Mutex<Pace>,
    began: Instant,
}

impl Gate {
    pub fn new(pace: Pace) -> Self {
        Self { pace: Mutex::new(pace), began: Instant::now() }
    }

    fn pace(&self) -> (MutexGuard<'_, Pace>, Duration) {
        let pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        (pace, self.began.elapsed())
    }

    /// When the next question may be asked.
    pub fn next(&self) -> Instant {
        let (pace, now) = self.pace();
        self.began + pace.next(now)
    }

    /// Whether a question may be asked now; then it counts as asked.
    pub fn pass(&self) -> bool {
        let (mut pace, now) = self.pace();
        let may = pace.next(now) <= now;
        if may {
            pace.take(now);
        }
        may
    }

    /// Waits until a question may be asked, which then counts as asked.
    pub async fn turn(&self) {
        while !self.pass() {
            tokio::time::sleep_until(self.next().into()).await;
        }
    }

    /// A question got its answer.
    pub fn answered(&self) {
        self.pace().0.answered();
    }

    /// A question got none.
    pub fn failed(&self, trouble: &Trouble) {
        let ((mut pace, now), draw) = (self.pace(), fastrand::u32(..));
        if trouble.is_throttled() {
            pace.throttled(now, draw);
        } else if trouble.is_general() {
            pace.failed(now, draw);
        }
    }

    /// Questions in a second, now.
    pub fn rate(&self) -> f64 {
        self.pace().0.rate()
    }
}
