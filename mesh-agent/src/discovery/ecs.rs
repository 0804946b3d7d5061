//! The ECS API as a backend: what is asked for and when, and when what is known is handed on.
//!
//! Tasks are asked for every few seconds; services and container instances, which change less, seldom, or at once when
//! a task names one that is not known. A task definition is asked for once: a revision never changes. An answer counts
//! when all of its pages have come. All questions together keep the host's share of the account's quota.
//!
//! [`client`] speaks to the API, [`check`] is for `mesh-agent check`.

pub mod check;
pub mod client;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use mesh_core::{
    aws::pace::Pace,
    back_off::{back_off, spread},
    config::ecs::Ecs,
    ecs::{
        entries::{Mesh, entries},
        model::Cluster,
    },
    id::ClusterName,
    services::ServiceSet,
};
use tokio::sync::mpsc;

use self::client::{Client, INSTANCES_AT_ONCE, Page, SERVICES_AT_ONCE, TASKS_AT_ONCE};
use super::{Figures, Report, SourceError, SourceId, aws::Trouble};

/// Questions that may follow each other at once: a small cluster is read in one go.
const BURST: u32 = 12;

/// The API as a source, and what the mesh needs to understand it.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    pub config: Ecs,
    /// At least one.
    pub clusters: Vec<ClusterName>,
    pub mesh: Mesh,
}

/// Follows the clusters and reports, until nobody listens.
pub(super) async fn run(source: Arc<Source>, id: SourceId, reports: mpsc::Sender<Report>, figures: Arc<Figures>) {
    let mut failures = 0;
    let client = loop {
        match Client::new(&source.config).await {
            Ok(client) => break client,
            Err(trouble) => {
                figures.failed();
                let outcome = Err(SourceError::Aws { what: "anything of ECS".into(), source: trouble });
                if reports.send(Report { source: id, outcome, still: None }).await.is_err() {
                    return;
                }
            }
        }
        tokio::time::sleep(back_off(failures, fastrand::u32(..))).await;
        failures += 1;
    };
    let clusters = source.clusters.iter().map(|name| Followed::new(name.clone())).collect();
    let asker = Asker { client, figures, pace: Pace::new(source.config.rate, BURST), began: Instant::now() };
    let follower = Follower { source, id, reports, asker, clusters, problems: Vec::new(), last: None, told: None };
    follower.run().await;
}

/// One cluster.
struct Followed {
    name: ClusterName,
    known: Cluster,
    /// When tasks are to be asked for, and when the rest is.
    due: Instant,
    slow_due: Instant,
    failures: u32,
    /// Why it gets no answer at the moment.
    failing: Option<String>,
    is_known: bool,
}

impl Followed {
    fn new(name: ClusterName) -> Self {
        let now = Instant::now();
        Self { name, known: Cluster::default(), due: now, slow_due: now, failures: 0, failing: None, is_known: false }
    }
}

struct Follower {
    source: Arc<Source>,
    id: SourceId,
    reports: mpsc::Sender<Report>,
    asker: Asker,
    clusters: Vec<Followed>,
    /// What is left out, as last logged.
    problems: Vec<String>,
    /// As last handed on.
    last: Option<ServiceSet>,
    /// The failure that was reported last, as long as it lasts.
    told: Option<String>,
}

impl Follower {
    async fn run(mut self) {
        loop {
            let next = self.clusters.iter().enumerate().min_by_key(|(_, it)| it.due).map(|(at, it)| (at, it.due));
            let Some((at, due)) = next else { return };
            let reports = self.reports.clone();
            tokio::select! {
                () = tokio::time::sleep_until(due.into()) => {}
                () = reports.closed() => return,
            }
            let turned = tokio::select! {
                turned = self.asker.turn(&self.source.config, &mut self.clusters[at]) => turned,
                () = reports.closed() => return,
            };
            let sent = match turned {
                Ok(()) => self.well(at).await,
                Err(trouble) => self.ill(at, trouble).await,
            };
            if sent.is_err() {
                return;
            }
        }
    }

    /// # Errors
    /// Nobody listens.
    async fn well(&mut self, at: usize) -> Result<(), ()> {
        let interval = self.source.config.interval;
        let cluster = &mut self.clusters[at];
        // A tenth early or late, so that hosts do not ask in step.
        cluster.due = Instant::now() + interval * 9 / 10 + spread(interval / 5, fastrand::u32(..));
        (cluster.failures, cluster.is_known) = (0, true);
        let was_ill = cluster.failing.take().is_some();
        if self.clusters.iter().any(|cluster| !cluster.is_known && cluster.failing.is_none()) {
            // The others' turn comes at once.
            return Ok(());
        }
        let clusters: Vec<_> = self.clusters.iter().map(|it| (it.name.clone(), it.known.clone())).collect();
        let (set, problems) = entries(&clusters, &self.source.config, &self.source.mesh);
        for problem in problems.iter().filter(|problem| !self.problems.contains(problem)).take(20) {
            tracing::warn!(problem, "ECS knows something that is not used");
        }
        self.problems = problems;
        self.asker.figures.services.store(set.services.len(), Ordering::Relaxed);
        if self.last.as_ref() == Some(&set) && !was_ill {
            return Ok(());
        }
        self.last = Some(set.clone());
        let still = self.clusters.iter().find_map(|cluster| cluster.failing.clone());
        if still.is_none() {
            self.told = None;
        }
        self.reports.send(Report { source: self.id, outcome: Ok(set), still }).await.map_err(drop)
    }

    /// # Errors
    /// Nobody listens.
    async fn ill(&mut self, at: usize, trouble: Trouble) -> Result<(), ()> {
        let cluster = &mut self.clusters[at];
        cluster.due = Instant::now() + back_off(cluster.failures, fastrand::u32(..));
        cluster.failures += 1;
        let text = super::chain(&trouble);
        cluster.failing = Some(text.clone());
        let what = format!("the cluster {}", cluster.name);
        tracing::debug!(
            what,
            error = &trouble as &dyn std::error::Error,
            rate = self.asker.pace.rate(),
            "ECS was asked in vain"
        );
        if self.told.replace(text.clone()) == Some(text) {
            return Ok(());
        }
        let outcome = Err(SourceError::Aws { what, source: trouble });
        self.reports.send(Report { source: self.id, outcome, still: None }).await.map_err(drop)
    }
}

/// Asks one question after the other, as fast as it may.
struct Asker {
    client: Client,
    figures: Arc<Figures>,
    pace: Pace,
    began: Instant,
}

impl Asker {
    /// One look at a cluster. What has come completely is kept also where something else fails.
    async fn turn(&mut self, config: &Ecs, cluster: &mut Followed) -> Result<(), Trouble> {
        let name = cluster.name.as_str().to_owned();
        let client = self.client.clone();
        if cluster.slow_due <= Instant::now() {
            self.slow_turn(&name, config, cluster).await?;
        }
        let arns = self.all(|token| client.list_tasks(&name, token)).await?;
        let mut tasks = Vec::with_capacity(arns.len());
        for some in arns.chunks(TASKS_AT_ONCE) {
            tasks.extend(self.ask(|| client.tasks(&name, some.to_vec())).await?);
        }
        tasks.sort_by(|a, b| a.arn.cmp(&b.arn));
        let wanted = || tasks.iter().filter(|it| it.service.as_ref().is_some_and(|service| config.wants(service)));
        // Somebody has come that the last slow look has not seen.
        let is_new = wanted().any(|task| {
            let service = task.service.as_ref().and_then(|service| cluster.known.services.get(service));
            let deployed =
                task.deployment.as_ref().is_none_or(|id| service.is_some_and(|it| it.deployments.contains_key(id)));
            let hosted = task.instance.as_ref().is_none_or(|arn| cluster.known.instances.contains_key(arn));
            service.is_none() || !deployed || !hosted
        });
        if is_new {
            self.slow_turn(&name, config, cluster).await?;
        }
        let definitions: std::collections::BTreeSet<&String> = wanted().map(|task| &task.definition).collect();
        for arn in &definitions {
            if !cluster.known.definitions.contains_key(*arn) {
                let definition = self.ask(|| client.definition(arn)).await?;
                cluster.known.definitions.insert((*arn).clone(), Arc::new(definition));
            }
        }
        cluster.known.definitions.retain(|arn, _| definitions.contains(arn));
        cluster.known.tasks = tasks;
        Ok(())
    }

    /// Services and container instances.
    async fn slow_turn(&mut self, name: &str, config: &Ecs, cluster: &mut Followed) -> Result<(), Trouble> {
        let client = self.client.clone();
        let arns = self.all(|token| client.list_services(name, token)).await?;
        let wanted = |arn: &String| config.wants(arn.rsplit('/').next().unwrap_or_default());
        let arns: Vec<String> = arns.into_iter().filter(wanted).collect();
        let mut services = BTreeMap::new();
        for some in arns.chunks(SERVICES_AT_ONCE) {
            services.extend(self.ask(|| client.services(name, some.to_vec())).await?);
        }
        let arns = self.all(|token| client.list_instances(name, token)).await?;
        let mut instances = BTreeMap::new();
        for some in arns.chunks(INSTANCES_AT_ONCE) {
            instances.extend(self.ask(|| client.instances(name, some.to_vec())).await?);
        }
        cluster.known.services = services;
        cluster.known.instances = instances;
        cluster.slow_due = Instant::now() + config.slow_interval;
        Ok(())
    }

    /// Every page.
    async fn all<F: Future<Output = Result<Page, Trouble>>>(
        &mut self,
        mut question: impl FnMut(Option<String>) -> F,
    ) -> Result<Vec<String>, Trouble> {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let (arns, next) = self.ask(|| question(token.take())).await?;
            all.extend(arns);
            token = next;
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    async fn ask<T, F: Future<Output = Result<T, Trouble>>>(
        &mut self,
        question: impl FnOnce() -> F,
    ) -> Result<T, Trouble> {
        let at = self.pace.next(self.began.elapsed());
        tokio::time::sleep_until((self.began + at).into()).await;
        self.pace.take(self.began.elapsed());
        self.figures.watches.store(1, Ordering::Relaxed);
        let answer = question().await;
        self.figures.watches.store(0, Ordering::Relaxed);
        let (now, draw): (Duration, u32) = (self.began.elapsed(), fastrand::u32(..));
        match &answer {
            Ok(_) => {
                self.pace.answered();
                self.figures.answered();
            }
            Err(trouble) => {
                self.figures.failed();
                if trouble.is_throttled() {
                    self.pace.throttled(now, draw);
                } else if trouble.is_general() {
                    self.pace.failed(now, draw);
                }
            }
        }
        answer
    }
}
