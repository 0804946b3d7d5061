//! A host that registers its tasks, with tasks that the test says: for every registry.
//!
//! Must not know which registry it is.

use std::{cell::RefCell, collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use mesh_agent::{
    discovery::{Registered, Registrar},
    state::{self, Publisher},
};
use mesh_core::{
    config::{self, Config},
    merge::{self, Merged, Sources},
    readiness::Gate,
    task::{Container, NetworkMode, Phase, Published, Task},
};
use mesh_tests::until::until;
use tokio::{runtime::Runtime, sync::watch};

pub(crate) const LIMIT: Duration = Duration::from_secs(20);
pub(crate) const HOST: [u8; 4] = [10, 90, 1, 10];

const REQUIRED: &str = "[identity]\ntrust_domain = \"t\"\nca_bundle = \"/x\"\njoin_token_file = \"/x\"\n";

/// See the module's text. Dropped, it is gone as after a crash.
pub(crate) struct Host {
    config: Config,
    publisher: Publisher,
    merged: RefCell<Merged>,
    tasks: watch::Sender<Arc<Vec<Task>>>,
    stop: watch::Sender<bool>,
    pub(crate) status: watch::Receiver<Registered>,
    running: Option<tokio::task::JoinHandle<()>>,
    runtime: Runtime,
}

impl Host {
    /// With a configuration of these lines, and whoever registers by it; told where tunnels to this host end.
    pub(crate) fn start(
        lines: &str,
        tasks: &[Task],
        registrar: impl FnOnce(&Config, SocketAddr) -> Result<Registrar>,
    ) -> Result<Self> {
        let config = config::parse(&format!("{REQUIRED}{lines}")).map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
        let registrar = registrar(&config, (HOST, 15008).into())?;
        let (publisher, published) = state::publish();
        let (sender, receiver) = watch::channel(Arc::new(Vec::new()));
        let (stop, stopped) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let status = registrar.status();
        let merged = RefCell::default();
        let mut host = Self { config, publisher, merged, tasks: sender, stop, status, running: None, runtime };
        host.show(tasks);
        host.running = Some(host.runtime.spawn(registrar.run(published, receiver, stopped)));
        Ok(host)
    }

    /// The tasks of the host are these from now on.
    pub(crate) fn show(&self, tasks: &[Task]) {
        let sources = Sources {
            sets: &[],
            tasks: Arc::new(tasks.to_vec()),
            gate: &Gate::Open,
            enrol: &self.config.enrol,
            cluster: &"demo".parse().expect("valid"),
            trust_domain: &self.config.identity.trust_domain,
            host: HOST.into(),
            tunnel: (HOST, 15008).into(),
            zone: None,
            vips: &self.config.vip,
        };
        self.tasks.send_replace(sources.tasks.clone());
        let next = merge::merge(&self.merged.borrow(), &sources);
        self.publisher.replace(next.snapshot.clone());
        self.merged.replace(next);
    }

    /// Stops as the agent does.
    pub(crate) fn leave(mut self) -> Result<()> {
        self.stop.send_replace(true);
        let running = self.running.take().context("it runs")?;
        Ok(self.runtime.block_on(running)?)
    }

    pub(crate) fn await_error(&self, part: &str) -> Result<()> {
        until(LIMIT, &format!("an error with `{part}`"), || {
            let error = self.status.borrow().error.clone();
            Ok(if error.as_ref().is_some_and(|error| error.contains(part)) {
                Ok(())
            } else {
                Err(format!("{error:?}"))
            })
        })
    }

    pub(crate) fn await_well(&self) -> Result<()> {
        until(LIMIT, "no error is left", || Ok(self.status.borrow().error.clone().map_or(Ok(()), Err)))
    }
}

/// A task in bridge mode with the container port 8080, published at a host port.
pub(crate) fn task(id: &str, family: &str, port: u16) -> Task {
    let host = SocketAddr::new([0, 0, 0, 0].into(), port);
    Task {
        id: id.parse().expect("valid"),
        cluster: None,
        family: family.into(),
        mode: NetworkMode::Bridge,
        phase: Phase::Running,
        containers: vec![Container {
            id: "0".repeat(64),
            name: family.into(),
            exposed: vec![8080],
            published: vec![Published { container_port: 8080, host }],
            cgroup: None,
            pid: Some(1),
            health: None,
        }],
        address: Some([172, 17, 0, 2].into()),
        netns: None,
        labels: BTreeMap::new(),
    }
}
