//! The hooks' reports: from the kernel's ring buffer to a channel.
//!
//! Knows the record's layout; must not know what a report means. Records that the kernel could not store are counted
//! there (`mesh_common::maps::counter::EVENT_LOST`).
#![expect(unsafe_code, reason = "registering a descriptor with the runtime is unsafe")]

use std::{io, time::Duration};

use aya::maps::{MapData, RingBuf};
use mesh_common::event::Event;
use tokio::{io::unix::AsyncFd, sync::mpsc, time::timeout};

/// The kernel wakes us only when much waits (`mesh-ebpf/src/kernel/report.rs`); what is little waits at most so long.
const EVERY: Duration = Duration::from_millis(100);

/// Forwards every record until nobody listens any more. Waits for room in the channel, the ring buffer behind it.
///
/// # Errors
/// The ring buffer's descriptor cannot be watched.
pub async fn forward(ring: RingBuf<MapData>, to: mpsc::Sender<Event>) -> io::Result<()> {
    // SAFETY: a `RingBuf` owns its descriptor, always names the same one, and lives inside the `AsyncFd`.
    let mut ring = unsafe { AsyncFd::register(ring) }?;
    loop {
        if let Ok(woken) = timeout(EVERY, ring.readable_mut()).await {
            woken?.clear_ready();
        }
        while let Some(record) = ring.get_mut().next() {
            let event = Event::from_bytes(&record);
            drop(record);
            if let Some(event) = event
                && to.send(event).await.is_err()
            {
                return Ok(());
            }
        }
    }
}
