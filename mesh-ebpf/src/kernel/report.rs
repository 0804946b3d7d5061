//! Counters and events. Must not influence a verdict.

use mesh_common::{event::Event, maps::counter};

use super::maps::{COUNTERS, EVENTS};

/// Adds one to a counter of `mesh_common::maps::counter`.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a per-CPU slot; a hook is not interrupted by itself on one CPU.
        unsafe { *value += 1 };
    }
}

/// Sends an event to the agent, or counts that there was no room.
#[inline(always)]
pub fn emit(event: &Event) {
    match EVENTS.reserve::<Event>(0) {
        Some(mut entry) => {
            entry.write(*event);
            entry.submit(0);
        }
        None => count(counter::EVENT_LOST),
    }
}
