//! Counters and events. Must not influence a verdict.

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use mesh_common::{
    event::Event,
    maps::{EVENTS_BYTES, counter},
};

use super::maps::{COUNTERS, EVENTS};

/// Adds one to a counter of `mesh_common::maps::counter`.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a per-CPU slot; a hook is not interrupted by itself on one CPU.
        unsafe { *value += 1 };
    }
}

/// With this much waiting, the agent is woken; until then it comes by itself, every tenth of a second. Waking it for each
/// event would cost a short connection more than everything else that the hooks do.
const WAKE_AT: u64 = EVENTS_BYTES as u64 / 4;

/// Sends an event to the agent, or counts that there was no room.
#[inline(always)]
pub fn emit(event: &Event) {
    match EVENTS.reserve::<Event>(0) {
        Some(mut entry) => {
            entry.write(*event);
            let many = EVENTS.query(u64::from(BPF_RB_AVAIL_DATA)) >= WAKE_AT;
            entry.submit(u64::from(if many { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP }));
        }
        None => count(counter::EVENT_LOST),
    }
}
