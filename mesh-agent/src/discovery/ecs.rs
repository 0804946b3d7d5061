//! The ECS API as a backend: what is asked for and when, and when what is known is handed on.
//!
//! Tasks are asked for every few seconds; services and container instances, which change less, seldom, or at once when
//! a task names one that is not known. A task definition is asked for once: a revision never changes. An answer counts
//! when all of its pages have come. What one question gets no answer to does not keep the others from being asked: tasks
//! go and come by what is known of the rest. All questions together keep the host's share of the account's quota.
//!
//! [`client`] speaks to the API, [`check`] is for `mesh-agent check`.

pub mod check;
pub mod client;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use mesh_core::{
    aws::{
        pace::Pace,
        rota::{Intervals, Rota},
    },
    back_off::back_off,
    config::ecs::Ecs,
    ecs::{
        entries::{Mesh, entries},
        model::{Cluster, Definition, Instance as Host, Service, Task},
    },
    id::ClusterName,
    services::ServiceSet,
};
use tokio::{sync::mpsc, task::JoinSet};

use self::client::{Client, INSTANCES_AT_ONCE, Page, SERVICES_AT_ONCE, TASKS_AT_ONCE};
use super::{
    Figures, Report, SourceError, SourceId,
    aws::{Trouble, gate::Gate},
};

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
    let gate = || Gate::new(Pace::new(source.config.rate, BURST));
    let every = |interval| Rota::new(Intervals { used: interval, idle: interval });
    let mut follower = Follower {
        asker: Arc::new(Asker { client, figures, tasks: gate(), rest: gate() }),
        clusters: source.clusters.iter().cloned().map(Followed::new).collect(),
        tasks: every(source.config.interval),
        rest: every(source.config.slow_interval),
        // One that has been had is not asked for again.
        lacking: Rota::new(Intervals { used: Duration::ZERO, idle: Duration::ZERO }),
        under_way: JoinSet::new(),
        source,
        id,
        reports,
        problems: Vec::new(),
        last: None,
        is_news: false,
        is_better: false,
        began: Instant::now(),
    };
    for at in 0..follower.clusters.len() {
        follower.tasks.add(at, Duration::ZERO);
        follower.rest.add(at, Duration::ZERO);
    }
    follower.run().await;
}

/// What is asked about a cluster, by its place in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Tasks(usize),
    /// Services and container instances.
    Rest(usize),
    /// A task definition, by ARN.
    Definition(usize, String),
}

/// What came of it.
enum Answer {
    Tasks(Result<Vec<Task>, Trouble>),
    /// The second is not asked for where the reason that there is no first is one for both.
    Rest(Result<BTreeMap<String, Service>, Trouble>, Option<Result<BTreeMap<String, Host>, Trouble>>),
    Definition(Result<Definition, Trouble>),
}

/// What there may be no answer about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Tasks,
    Services,
    Instances,
    Definition(String),
}

/// Why there is none.
struct Failing {
    text: String,
    is_general: bool,
}

/// One cluster.
struct Followed {
    name: ClusterName,
    known: Cluster,
    /// Parts that have never been had.
    unseen: BTreeSet<Part>,
    /// ARNs of definitions that tasks have and nobody has described.
    lacking: BTreeSet<String>,
    failing: BTreeMap<Part, Failing>,
    /// Everything has been had once, but definitions that cannot be had for reasons of their own.
    is_known: bool,
}

impl Followed {
    fn new(name: ClusterName) -> Self {
        Self {
            name,
            known: Cluster::default(),
            unseen: [Part::Tasks, Part::Services, Part::Instances].into(),
            lacking: BTreeSet::new(),
            failing: BTreeMap::new(),
            is_known: false,
        }
    }

    /// Tasks of services that are to be known.
    fn wanted(&self, config: &Ecs) -> impl Iterator<Item = &Task> {
        self.known.tasks.iter().filter(|it| it.service.as_ref().is_some_and(|service| config.wants(service)))
    }

    /// Whether a task names a service, a deployment or a container instance that the last look at them has not seen.
    fn has_new(&self, config: &Ecs) -> bool {
        self.wanted(config).any(|task| {
            let service = task.service.as_ref().and_then(|service| self.known.services.get(service));
            let deployed =
                task.deployment.as_ref().is_none_or(|id| service.is_some_and(|it| it.deployments.contains_key(id)));
            let hosted = task.instance.as_ref().is_none_or(|arn| self.known.instances.contains_key(arn));
            service.is_none() || !deployed || !hosted
        })
    }

    fn see(&mut self) {
        let described =
            |arn: &String| self.failing.get(&Part::Definition(arn.clone())).is_some_and(|it| !it.is_general);
        self.is_known |= self.unseen.is_empty() && self.lacking.iter().all(described);
    }
}

struct Follower {
    source: Arc<Source>,
    id: SourceId,
    reports: mpsc::Sender<Report>,
    asker: Arc<Asker>,
    clusters: Vec<Followed>,
    tasks: Rota<usize>,
    rest: Rota<usize>,
    lacking: Rota<(usize, String)>,
    under_way: JoinSet<(Asked, Answer)>,
    /// What is left out, as last logged.
    problems: Vec<String>,
    /// As last handed on.
    last: Option<ServiceSet>,
    /// Something has come; something that had failed is well again.
    is_news: bool,
    is_better: bool,
    began: Instant,
}

impl Follower {
    async fn run(mut self) {
        loop {
            self.ask();
            if std::mem::take(&mut self.is_news) && self.hand_on().await.is_err() {
                return;
            }
            let soonest = self.next();
            let timer = async {
                match soonest {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let told = tokio::select! {
                Some(answered) = self.under_way.join_next() => match answered {
                    Ok((asked, answer)) => self.take(&asked, answer),
                    Err(error) => {
                        // Nobody aborts them.
                        tracing::error!(%error, "a question to ECS was lost");
                        Vec::new()
                    }
                },
                () = timer => Vec::new(),
                () = self.reports.closed() => return,
            };
            for error in told {
                let report = Report { source: self.id, outcome: Err(error), still: None };
                if self.reports.send(report).await.is_err() {
                    return;
                }
            }
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// When something is due; `None`: not before something that is under way has come.
    fn next(&self) -> Option<Instant> {
        let lacking = self.lacking.next().filter(|_| !self.is_describing());
        let soonest = [self.tasks.next(), self.rest.next(), lacking].into_iter().flatten().min();
        soonest.map(|due| self.began + due)
    }

    /// Definitions are asked for one after the other, so that they leave room for the rest.
    fn is_describing(&self) -> bool {
        self.lacking.is_under_way()
    }

    /// Asks what is due. Each question waits for its turn.
    fn ask(&mut self) {
        let now = self.now();
        let mut due = Vec::new();
        while let Some(at) = self.tasks.take(now) {
            due.push(Asked::Tasks(at));
        }
        while let Some(at) = self.rest.take(now) {
            due.push(Asked::Rest(at));
        }
        if !self.is_describing()
            && let Some((at, arn)) = self.lacking.take(now)
        {
            due.push(Asked::Definition(at, arn));
        }
        for asked in due {
            let (asker, source) = (self.asker.clone(), self.source.clone());
            self.under_way.spawn(async move {
                let answer = asker.answer(&source, &asked).await;
                (asked, answer)
            });
        }
        self.asker.figures.watches.store(self.under_way.len(), Ordering::Relaxed);
    }

    /// Returns what is to be reported.
    fn take(&mut self, asked: &Asked, answer: Answer) -> Vec<SourceError> {
        let (now, draw) = (self.now(), fastrand::u32(..));
        let mut told = Vec::new();
        match (asked, answer) {
            (Asked::Tasks(at), Answer::Tasks(Ok(tasks))) => {
                self.clusters[*at].known.tasks = tasks;
                self.tasks.answered(at, now, draw);
                self.had(*at, &Part::Tasks);
                self.look_through(*at, now);
            }
            (Asked::Tasks(at), Answer::Tasks(Err(trouble))) => {
                self.tasks.failed(at, now, draw);
                told.extend(self.failed(*at, Part::Tasks, trouble));
            }
            (Asked::Rest(at), Answer::Rest(services, instances)) => {
                if services.is_ok() && instances.as_ref().is_some_and(Result::is_ok) {
                    self.rest.answered(at, now, draw);
                } else {
                    self.rest.failed(at, now, draw);
                }
                match services {
                    Ok(services) => {
                        self.clusters[*at].known.services = services;
                        self.had(*at, &Part::Services);
                    }
                    Err(trouble) => told.extend(self.failed(*at, Part::Services, trouble)),
                }
                match instances {
                    Some(Ok(instances)) => {
                        self.clusters[*at].known.instances = instances;
                        self.had(*at, &Part::Instances);
                    }
                    Some(Err(trouble)) => told.extend(self.failed(*at, Part::Instances, trouble)),
                    None => {}
                }
            }
            (Asked::Definition(at, arn), Answer::Definition(answer)) => {
                let key = (*at, arn.clone());
                // It may have left with its last task while it was asked for.
                if self.clusters[*at].lacking.contains(arn) {
                    match answer {
                        Ok(definition) => {
                            let cluster = &mut self.clusters[*at];
                            cluster.lacking.remove(arn);
                            cluster.known.definitions.insert(arn.clone(), Arc::new(definition));
                            self.lacking.remove(&key);
                            self.had(*at, &Part::Definition(arn.clone()));
                        }
                        Err(trouble) => {
                            self.lacking.failed(&key, now, draw);
                            told.extend(self.failed(*at, Part::Definition(arn.clone()), trouble));
                        }
                    }
                }
            }
            (Asked::Tasks(_) | Asked::Rest(_) | Asked::Definition(..), _) => {}
        }
        self.is_news = true;
        told
    }

    /// What other tasks need than those before.
    fn look_through(&mut self, at: usize, now: Duration) {
        let cluster = &mut self.clusters[at];
        let used: BTreeSet<String> = cluster.wanted(&self.source.config).map(|task| task.definition.clone()).collect();
        cluster.known.definitions.retain(|arn, _| used.contains(arn));
        let lacking: BTreeSet<String> =
            used.into_iter().filter(|arn| !cluster.known.definitions.contains_key(arn)).collect();
        for arn in cluster.lacking.difference(&lacking) {
            self.lacking.remove(&(at, arn.clone()));
            self.is_better |= cluster.failing.remove(&Part::Definition(arn.clone())).is_some();
        }
        for arn in lacking.difference(&cluster.lacking) {
            self.lacking.add((at, arn.clone()), now);
        }
        cluster.lacking = lacking;
        // Somebody has come that the last slow look has not seen; one that fails is repeated anyway.
        let is_failing = [Part::Services, Part::Instances].iter().any(|part| cluster.failing.contains_key(part));
        if !is_failing && cluster.has_new(&self.source.config) {
            self.rest.hurry(&at, now);
        }
    }

    fn had(&mut self, at: usize, part: &Part) {
        let cluster = &mut self.clusters[at];
        cluster.unseen.remove(part);
        self.is_better |= cluster.failing.remove(part).is_some();
    }

    /// Returns the first failure, and one of another kind; many that fail together are one.
    fn failed(&mut self, at: usize, part: Part, trouble: Trouble) -> Option<SourceError> {
        let name = &self.clusters[at].name;
        let what = match &part {
            Part::Tasks => format!("the list of tasks of the cluster {name}"),
            Part::Services => format!("the list of services of the cluster {name}"),
            Part::Instances => format!("the list of container instances of the cluster {name}"),
            Part::Definition(arn) => format!("the task definition {}", arn.escape_debug()),
        };
        tracing::debug!(what, error = &trouble as &dyn std::error::Error, "ECS was asked in vain");
        let text = super::chain(&trouble);
        let known = self.clusters.iter().flat_map(|cluster| cluster.failing.values()).any(|it| it.text == text);
        let failing = Failing { text, is_general: trouble.is_general() };
        self.clusters[at].failing.insert(part, failing);
        (!known).then_some(SourceError::Aws { what, source: trouble })
    }

    /// Hands on what is known, where it is another than before.
    ///
    /// # Errors
    /// Nobody listens.
    async fn hand_on(&mut self) -> Result<(), ()> {
        self.clusters.iter_mut().for_each(Followed::see);
        let has_come = |cluster: &Followed| cluster.is_known || !cluster.failing.is_empty();
        if !self.clusters.iter().all(has_come) || !self.clusters.iter().any(|cluster| cluster.is_known) {
            // The others' turn comes at once.
            return Ok(());
        }
        let known = |it: &Followed| if it.is_known { it.known.clone() } else { Cluster::default() };
        let clusters: Vec<_> = self.clusters.iter().map(|it| (it.name.clone(), known(it))).collect();
        let (set, problems) = entries(&clusters, &self.source.config, &self.source.mesh);
        // What is asked for at the moment may be all that is wrong.
        if !self.rest.is_under_way() {
            for problem in problems.iter().filter(|problem| !self.problems.contains(problem)).take(20) {
                tracing::warn!(problem, "ECS knows something that is not used");
            }
            self.problems = problems;
        }
        self.asker.figures.services.store(set.services.len(), Ordering::Relaxed);
        if self.last.as_ref() == Some(&set) && !self.is_better {
            return Ok(());
        }
        self.last = Some(set.clone());
        self.is_better = false;
        let still = self.clusters.iter().find_map(|cluster| cluster.failing.values().next());
        let still = still.map(|failing| failing.text.clone());
        self.reports.send(Report { source: self.id, outcome: Ok(set), still }).await.map_err(drop)
    }
}

/// Asks, as fast as it may: tasks, and all else, at a pace of its own each, as ECS has a quota for each.
struct Asker {
    client: Client,
    figures: Arc<Figures>,
    tasks: Gate,
    rest: Gate,
}

impl Asker {
    async fn answer(&self, source: &Source, asked: &Asked) -> Answer {
        let name = |at: usize| source.clusters.get(at).map(ClusterName::as_str).unwrap_or_default();
        match asked {
            Asked::Tasks(at) => Answer::Tasks(self.tasks(name(*at)).await),
            Asked::Rest(at) => {
                let services = self.services(name(*at), &source.config).await;
                let instances = match &services {
                    // Of a cluster that is not there, not every server says so for instances too.
                    Err(trouble) if trouble.is_general() || trouble.is_gone() => None,
                    Ok(_) | Err(_) => Some(self.instances(name(*at)).await),
                };
                Answer::Rest(services, instances)
            }
            Asked::Definition(_, arn) => Answer::Definition(self.ask(&self.rest, || self.client.definition(arn)).await),
        }
    }

    async fn tasks(&self, name: &str) -> Result<Vec<Task>, Trouble> {
        let arns = self.all(&self.tasks, |token| self.client.list_tasks(name, token)).await?;
        let mut tasks = Vec::with_capacity(arns.len());
        for some in arns.chunks(TASKS_AT_ONCE) {
            tasks.extend(self.ask(&self.tasks, || self.client.tasks(name, some.to_vec())).await?);
        }
        tasks.sort_by(|a, b| a.arn.cmp(&b.arn));
        Ok(tasks)
    }

    async fn services(&self, name: &str, config: &Ecs) -> Result<BTreeMap<String, Service>, Trouble> {
        let arns = self.all(&self.rest, |token| self.client.list_services(name, token)).await?;
        let wanted = |arn: &String| config.wants(arn.rsplit('/').next().unwrap_or_default());
        let arns: Vec<String> = arns.into_iter().filter(wanted).collect();
        let mut services = BTreeMap::new();
        for some in arns.chunks(SERVICES_AT_ONCE) {
            services.extend(self.ask(&self.rest, || self.client.services(name, some.to_vec())).await?);
        }
        Ok(services)
    }

    async fn instances(&self, name: &str) -> Result<BTreeMap<String, Host>, Trouble> {
        let arns = self.all(&self.rest, |token| self.client.list_instances(name, token)).await?;
        let mut instances = BTreeMap::new();
        for some in arns.chunks(INSTANCES_AT_ONCE) {
            instances.extend(self.ask(&self.rest, || self.client.instances(name, some.to_vec())).await?);
        }
        Ok(instances)
    }

    /// Every page.
    async fn all<F: Future<Output = Result<Page, Trouble>>>(
        &self,
        gate: &Gate,
        mut question: impl FnMut(Option<String>) -> F,
    ) -> Result<Vec<String>, Trouble> {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let (arns, next) = self.ask(gate, || question(token.take())).await?;
            all.extend(arns);
            token = next;
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    async fn ask<T, F: Future<Output = Result<T, Trouble>>>(
        &self,
        gate: &Gate,
        question: impl FnOnce() -> F,
    ) -> Result<T, Trouble> {
        gate.turn().await;
        let answer = question().await;
        match &answer {
            Ok(_) => {
                gate.answered();
                self.figures.answered();
            }
            Err(trouble) => {
                gate.failed(trouble);
                self.figures.failed();
            }
        }
        answer
    }
}
