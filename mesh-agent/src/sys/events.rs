//! The hooks' reports: from the kernel's ring buffer to a channel.
//!
//! Knows the record's layout; must not know what a report means. Records that the kernel could not store are counted
//! there (`mesh_common::maps::counter::EVENT_LOST`).
#![expect(unsafe_code, reason = "registering a descriptor with the runtime is unsafe")]

use std::io;

use aya::maps::{MapData, RingBuf};
use mesh_common::event::Event;
use tokio::{io::unix::AsyncFd, sync::mpsc};

/// Forwards every record until nobody listens any more. Waits for room in the channel, the ring buffer behind it.
///
/// # Errors
/// The ring buffer's descriptor cannot be watched.
pub async fn forward(ring: RingBuf<MapData>, to: mpsc::Sender<Event>) -> io::Result<()> {
    // SAFETY: a `RingBuf` owns its descriptor, always names the same one, and lives inside the `AsyncFd`.
    let mut ring = unsafe { AsyncFd::register(ring) }?;
    loop {
        let mut guard = ring.readable_mut().await?;
        let ring = guard.get_inner_mut();
        while let Some(record) = ring.next() {
            let event = Event::from_bytes(&record);
            drop(record);
            if let Some(event) = event
                && to.send(event).await.is_err()
            {
                return Ok(());
            }
        }
        guard.clear_ready();
    }
}
