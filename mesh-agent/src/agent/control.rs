//! The control loop: whatever is learnt about services and tasks becomes the next snapshot, then the kernel's image,
//! then armed namespaces, in this order.
//!
//! The only writer of the snapshot. Must not decide: `mesh_core::merge` and `mesh_core::reconcile` do.

use std::{
    collections::{BTreeSet, HashSet},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{
    config::Config,
    id::TaskId,
    merge::{self, Merged, Sources},
    readiness::Gate,
    services::ServiceSet,
    task::Task,
};
use tokio::{sync::watch, task::block_in_place};

use super::host::HostFacts;
use crate::{
    identity::Identities,
    reconciler::Reconciler,
    state::{Publisher, vip_file},
    sys::memory,
    telemetry::metrics::Metrics,
};

/// When nothing has changed for so long, the start is over.
const SETTLED: Duration = Duration::from_secs(2);

/// Everything that the loop needs, and nothing that it shares but what it publishes.
pub(super) struct Control {
    pub config: Arc<Config>,
    pub host: HostFacts,
    pub publisher: Publisher,
    pub reconciler: Reconciler,
    pub identities: Identities,
    /// The agent's own identity, which is kept whatever tasks there are.
    pub own: mesh_core::id::SpiffeId,
    pub tasks: watch::Receiver<Arc<Vec<Task>>>,
    /// Whether docker has been asked; before that, an empty list of tasks means nothing.
    pub connected: watch::Receiver<bool>,
    pub sets: watch::Receiver<Vec<ServiceSet>>,
    /// Which ports of the tasks have passed their probes; `None`: nobody probes.
    pub gate: Option<watch::Receiver<Gate>>,
    pub metrics: Arc<Metrics>,
    /// Which tasks are armed, after each turn; `None` before the first.
    pub armed: watch::Sender<Option<BTreeSet<TaskId>>>,
    /// The last snapshot, and what the next one is made from besides its sources.
    pub merged: Merged,
}

impl Control {
    /// Runs until the sources are gone or `stop` is told. Gives the reconciler back, with everything still armed.
    pub(super) async fn run(mut self, mut stop: watch::Receiver<bool>) -> Reconciler {
        let path = self.config.host.state_dir.join("vips.json");
        self.merged = Merged::beginning(vip_file::load(&path), self.reconciler.numbers());
        self.publisher.replace(self.merged.snapshot.clone());
        let mut starting = true;
        loop {
            // With tens of thousands of endpoints, the first turn takes long: connections must not wait for it.
            let again = block_in_place(|| self.turn(&path));
            let retry = async {
                match again {
                    Some(after) => tokio::time::sleep(after).await,
                    None => std::future::pending().await,
                }
            };
            let settles = starting && self.armed.borrow().is_some();
            let settled =
                async { if settles { tokio::time::sleep(SETTLED).await } else { std::future::pending().await } };
            tokio::select! {
                changed = self.tasks.changed() => match changed {
                    Ok(()) => self.reconciler.hurry(),
                    Err(_gone) => break,
                },
                changed = self.sets.changed() => if changed.is_err() { break },
                probing = changed(&mut self.gate) => if !probing {
                    tracing::error!("nobody probes tasks any more: they are used as docker shows them");
                    self.gate = None;
                },
                changed = self.connected.changed() => if changed.is_err() { break },
                // Also when the sender is gone: then the agent is stopping too.
                _ = stop.wait_for(|stop| *stop) => break,
                () = retry => {}
                () = settled => {
                    // The first image of all that there is, and arming every task that was there, took more than anything later will.
                    starting = false;
                    block_in_place(memory::give_back);
                    memory::let_go_of_program();
                }
            }
        }
        self.reconciler
    }

    /// One turn. When something failed that is worth another try: after how long.
    fn turn(&mut self, path: &Path) -> Option<Duration> {
        if !*self.connected.borrow_and_update() && self.armed.borrow().is_none() {
            return None;
        }
        let began = Instant::now();
        let sets = self.sets.borrow_and_update().clone();
        let gate = self.gate.as_mut().map_or(Gate::Open, |gate| gate.borrow_and_update().clone());
        let sources = Sources {
            sets: &sets,
            tasks: self.tasks.borrow_and_update().clone(),
            gate: &gate,
            enrol: &self.config.enrol,
            cluster: &self.host.cluster,
            trust_domain: &self.config.identity.trust_domain,
            host: self.host.address,
            tunnel: SocketAddr::new(self.host.address, self.config.proxy.tunnel_listen.port()),
            zone: self.config.host.zone.as_deref(),
            vips: &self.config.vip,
        };
        let next = merge::merge(&self.merged, &sources);
        let last = std::mem::replace(&mut self.merged, next);
        let Merged { snapshot, vips, homeless, .. } = &self.merged;
        if *homeless != last.homeless && !homeless.is_empty() {
            let services: Vec<_> = homeless.iter().map(|name| name.as_str()).collect();
            tracing::error!(?services, range = %self.config.vip.v4,
                "services have no virtual address and cannot be called by name: widen `vip.v4`");
        }
        if !Arc::ptr_eq(vips, &last.vips)
            && let Err(error) = vip_file::save(path, vips)
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "virtual addresses are not kept");
        }
        if !Arc::ptr_eq(snapshot, &last.snapshot) {
            if !snapshot.workloads.ptr_eq(&last.snapshot.workloads) {
                let mut wanted: HashSet<_> =
                    snapshot.workloads.values().map(|workload| workload.identity.clone()).collect();
                wanted.insert(self.own.clone());
                self.identities.retain(&wanted);
            }
            self.publisher.replace(snapshot.clone());
        }
        let again = self.reconciler.turn(&sources.tasks, snapshot);
        for (map, entries) in self.reconciler.entries() {
            self.metrics.kernel_map(map, entries);
        }
        self.armed.send_replace(Some(self.reconciler.armed_tasks()));
        let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::debug!(generation = snapshot.generation, took_us, "turn");
        again
    }
}

/// Waits for news of the probes; false when there will be none.
async fn changed(gate: &mut Option<watch::Receiver<Gate>>) -> bool {
    match gate {
        Some(gate) => gate.changed().await.is_ok(),
        None => std::future::pending().await,
    }
}
