//! A discovery that runs against a server, and what it has seen.

use std::{
    ops::Deref,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use mesh_agent::discovery::{Backend, ecs::Source};
use mesh_core::{
    config,
    ecs::entries::Mesh,
    merge::{self, Merged, Sources},
    model::{Reach, ServicePort},
    readiness::Gate,
    resolve::{self, Answer, Naming, Question},
    services::EndpointEntry,
};
use mesh_tests::{aws::REGION, until::until};

use crate::following::Following;

/// What waits after failures may wait for [`back_off::LONGEST`](mesh_core::back_off::LONGEST), and once more for the rate: a server that is slow to
/// come back has made them many.
pub(super) const LIMIT: Duration = mesh_core::back_off::LONGEST.saturating_mul(3);

/// What an agent learns from one server; endpoints are `port address [by agent as identity]`, `*` for a port that nobody chose.
pub(super) struct Running(Following);

impl Deref for Running {
    type Target = Following;

    fn deref(&self) -> &Following {
        &self.0
    }
}

pub(super) const REQUIRED: &str = "[identity]\ntrust_domain = \"t\"\nca_bundle = \"/x\"\njoin_token_file = \"/x\"\n";

impl Running {
    /// With a section `[discovery.cloud_map]` of these lines.
    pub(super) fn cloud_map(address: &str, more: &str) -> Result<Self> {
        let idle = if more.contains("idle_interval") { "" } else { "idle_interval = \"1s\"\n" };
        let text = format!(
            "{REQUIRED}[discovery.cloud_map]\nregion = \"{REGION}\"\nendpoint = \"{address}\"\n\
             interval = \"1s\"\nlist_interval = \"1s\"\n{idle}{more}\n"
        );
        let config = config::parse(&text).map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
        Self::start(Backend::CloudMap(Arc::new(config.discovery.cloud_map.context("configured")?)))
    }

    /// With a section `[discovery.ecs]` of these lines, on a host of the cluster `demo`.
    pub(super) fn ecs(address: &str, more: &str) -> Result<Self> {
        let text = format!(
            "{REQUIRED}[discovery.ecs]\nregion = \"{REGION}\"\nendpoint = \"{address}\"\n\
             interval = \"1s\"\nslow_interval = \"2s\"\nrate = 20\n{more}\n"
        );
        let config = config::parse(&text).map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
        let mesh = Mesh {
            trust_domain: config.identity.trust_domain,
            enrol: config.enrol,
            suffixes: vec!["mesh".into(), "my.demo".into()],
        };
        let ecs = config.discovery.ecs.context("configured")?;
        let clusters = if ecs.clusters.is_empty() { vec!["demo".parse()?] } else { ecs.clusters.clone() };
        Self::start(Backend::Ecs(Arc::new(Source { config: ecs, clusters, mesh })))
    }

    fn start(backend: Backend) -> Result<Self> {
        let show = |e: &EndpointEntry| {
            let agent = e.endpoint.agent().map(|agent| format!(" by {agent}")).unwrap_or_default();
            let identity = e.endpoint.identity.as_ref().map(|id| format!(" as {}", id.as_str())).unwrap_or_default();
            format!("{} {}{agent}{identity}", e.port.map_or("*".into(), |port| port.to_string()), e.endpoint.addr())
        };
        Following::start(backend, LIMIT, show).map(Self)
    }

    /// What a task of another host is told by DNS, and who serves each port then: `port protocol endpoint…`, with the
    /// tunnel that leads there.
    pub(super) fn resolved(&self, name: &str) -> Result<Vec<String>> {
        Self::resolved_by(&[self], name)
    }

    /// The same from several sources, in order of precedence.
    pub(super) fn resolved_by(sources: &[&Self], name: &str) -> Result<Vec<String>> {
        let sets: Vec<_> = sources.iter().map(|running| running.set()).collect();
        let config = config::parse(REQUIRED).map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
        let sources = Sources {
            sets: &sets,
            tasks: Arc::default(),
            gate: &Gate::Open,
            enrol: &config.enrol,
            cluster: &"demo".parse()?,
            trust_domain: &config.identity.trust_domain,
            host: [10, 1, 1, 99].into(),
            tunnel: ([10, 1, 1, 99], 15008).into(),
            zone: None,
            vips: &config.vip,
        };
        let snapshot = merge::merge(&Merged::default(), &sources).snapshot;
        let suffixes = ["mesh".to_owned(), "my.demo".to_owned()];
        let naming = Naming {
            suffixes: &suffixes,
            datacenters: &[],
            vip: &config.vip,
            ttl: Duration::from_secs(5),
            ipv6: false,
        };
        let Answer::Addresses { addresses, .. } = resolve::answer(&snapshot, &naming, name, Question::A) else {
            bail!("{name} has no address")
        };
        let service = addresses.first().and_then(|ip| snapshot.service_at(*ip)).context("a virtual address")?;
        let endpoint = |it: &Arc<mesh_core::model::Endpoint>| match &it.reach {
            Reach::Tunnel { agent } => format!("{} by {agent}", it.addr()),
            Reach::Local { .. } | Reach::Plaintext => it.addr().to_string(),
        };
        let port = |port: &ServicePort| {
            let endpoints: Vec<_> = port.endpoints.iter().map(endpoint).collect();
            format!("{} {:?} {}", port.port, port.protocol, endpoints.join(" "))
        };
        Ok(service.ports.iter().map(port).collect())
    }

    pub(super) fn await_well(&self) -> Result<()> {
        until(LIMIT, "no error is left", || Ok(self.error().map_or(Ok(()), Err)))
    }

    /// Waits until so many more questions have failed.
    pub(super) fn await_failures(&self, more: u64) -> Result<()> {
        let figures = self.figures()?;
        let goal = figures.errors.load(Ordering::Relaxed) + more;
        until(LIMIT, &format!("{more} more failures"), || {
            let now = figures.errors.load(Ordering::Relaxed);
            Ok(if now >= goal { Ok(()) } else { Err(format!("{now} of {goal}")) })
        })
    }

    /// Waits until so many more questions have been answered.
    pub(super) fn await_answers(&self, more: u64) -> Result<()> {
        let figures = self.figures()?;
        let goal = figures.answers.load(Ordering::Relaxed) + more;
        until(LIMIT, &format!("{more} more answers"), || {
            let now = figures.answers.load(Ordering::Relaxed);
            Ok(if now >= goal { Ok(()) } else { Err(format!("{now} of {goal}; {:?}", self.error())) })
        })
    }
}
