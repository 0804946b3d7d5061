//! AWS Cloud Map as a backend: what is asked for and when, what the answers make of all that is known, and when it is
//! handed on.
//!
//! Cloud Map knows no blocking questions, and the revision of a service's instances does not move when their health
//! does. So the instances themselves are asked for, over and over: those of services that tasks of this host use every
//! few seconds, the others seldom, and all together no more often than the host's share of the account's quota. Lists of
//! services come from Cloud Map's control plane, which has quotas, and troubles, of its own: they have a pace of their own.
//!
//! [`client`] speaks to the API, [`registrar`] tells Cloud Map about this host's tasks, [`check`] is for `mesh-agent
//! check`.

pub mod check;
pub mod client;
pub mod registrar;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use mesh_core::{
    aws::{
        pace::Pace,
        rota::{Intervals, Rota},
    },
    cloud_map::known::{Key, Known},
    config::cloud_map::CloudMap,
    id::ServiceName,
};
use tokio::{
    sync::mpsc,
    task::{JoinError, JoinSet},
};

use self::client::{Answer, Asked, Client};
use super::{
    Figures, Report, SourceError, SourceId,
    aws::{Trouble, gate::Gate},
};

/// News closer together than this is handed on as one.
const SETTLE: Duration = Duration::from_millis(20);
/// While everything is read for the first time, what there is so far is handed on so often.
const PROGRESS: Duration = Duration::from_secs(1);
/// Questions under way at a time, of each plane.
const AT_ONCE: usize = 8;

/// Follows Cloud Map and reports, until nobody listens.
pub(super) async fn run(
    config: Arc<CloudMap>,
    source: SourceId,
    reports: mpsc::Sender<Report>,
    figures: Arc<Figures>,
    uses: mpsc::Receiver<ServiceName>,
) {
    let mut failures = 0;
    let client = loop {
        match Client::new(&config).await {
            Ok(client) => break Arc::new(client),
            Err(trouble) => {
                figures.failed();
                let outcome = Err(SourceError::Aws { what: "anything of Cloud Map".into(), source: trouble });
                if reports.send(Report { source, outcome, still: None }).await.is_err() {
                    return;
                }
            }
        }
        tokio::time::sleep(mesh_core::back_off::back_off(failures, fastrand::u32(..))).await;
        failures += 1;
    };
    let lists = Intervals { used: config.list_interval, idle: config.list_interval };
    let gate = || Gate::new(Pace::new(config.rate, config.rate.max(u32::try_from(AT_ONCE).unwrap_or(1))));
    let mut director = Director {
        client,
        source,
        reports,
        figures,
        known: Known::default(),
        list_gate: Arc::new(gate()),
        lists: Rota::new(lists),
        listing: JoinSet::new(),
        instance_gate: Arc::new(gate()),
        services: Rota::new(config.intervals),
        under_way: JoinSet::new(),
        failing: BTreeMap::new(),
        publish: None,
        published: None,
        problems: Vec::new(),
        began: Instant::now(),
        config,
    };
    for namespace in 0..director.config.namespaces.len() {
        director.lists.add(namespace, Duration::ZERO);
    }
    director.run(uses).await;
}

/// What was asked, and what came of it.
type Answered = (Asked, Result<Answer, Trouble>);

struct Director {
    config: Arc<CloudMap>,
    client: Arc<Client>,
    source: SourceId,
    reports: mpsc::Sender<Report>,
    figures: Arc<Figures>,
    known: Known,
    list_gate: Arc<Gate>,
    lists: Rota<usize>,
    listing: JoinSet<Answered>,
    instance_gate: Arc<Gate>,
    services: Rota<Key>,
    under_way: JoinSet<Answered>,
    /// What gets no answer at the moment.
    failing: BTreeMap<Asked, String>,
    /// When what is known is to be handed on; `None`: it has been.
    publish: Option<Instant>,
    published: Option<Instant>,
    /// What is left out, as last logged.
    problems: Vec<String>,
    began: Instant,
}

impl Director {
    async fn run(mut self, mut uses: mpsc::Receiver<ServiceName>) {
        loop {
            self.ask();
            let soonest = [self.publish, self.next()].into_iter().flatten().min();
            let timer = async {
                match soonest {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(answered) = self.listing.join_next() => self.answered(answered).await,
                Some(answered) = self.under_way.join_next() => self.answered(answered).await,
                Some(service) = uses.recv() => self.used(&service),
                () = timer => {}
                () = self.reports.closed() => return,
            }
            if self.publish.is_some_and(|at| at <= Instant::now()) && self.hand_on().await.is_err() {
                return;
            }
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// When the next question may be asked; `None`: not before one that is under way has been answered.
    fn next(&self) -> Option<Instant> {
        let list = self.lists.next().filter(|_| self.listing.len() < AT_ONCE);
        let service = self.services.next().filter(|_| self.under_way.len() < AT_ONCE);
        let list = list.map(|due| self.list_gate.next().max(self.began + due));
        let service = service.map(|due| self.instance_gate.next().max(self.began + due));
        [list, service].into_iter().flatten().min()
    }

    /// Asks what is due, as far as it may.
    fn ask(&mut self) {
        let now = self.now();
        let is_due = |due: Option<Duration>| due.is_some_and(|due| due <= now);
        while self.listing.len() < AT_ONCE && is_due(self.lists.next()) && self.list_gate.pass() {
            let Some(namespace) = self.lists.take(now) else { break };
            self.listing.spawn(self.question(Asked::Names(namespace), &self.list_gate));
        }
        while self.under_way.len() < AT_ONCE && is_due(self.services.next()) && self.instance_gate.pass() {
            let Some(key) = self.services.take(now) else { break };
            self.under_way.spawn(self.question(Asked::Service(key), &self.instance_gate));
        }
        self.figures.watches.store(self.listing.len() + self.under_way.len(), Ordering::Relaxed);
    }

    fn question(&self, asked: Asked, gate: &Arc<Gate>) -> impl Future<Output = Answered> + use<> {
        let (client, config, gate) = (self.client.clone(), self.config.clone(), gate.clone());
        async move {
            let answer = client.ask(&config, &asked, &gate).await;
            (asked, answer)
        }
    }

    fn gate(&self, asked: &Asked) -> &Gate {
        match asked {
            Asked::Names(_) => &self.list_gate,
            Asked::Service(_) => &self.instance_gate,
        }
    }

    async fn answered(&mut self, answered: Result<Answered, JoinError>) {
        match answered {
            Ok((asked, Ok(answer))) => self.take(&asked, answer),
            Ok((asked, Err(trouble))) => self.ill(asked, trouble).await,
            // Nobody aborts them.
            Err(error) => tracing::error!(%error, "a question to Cloud Map was lost"),
        }
    }

    fn used(&mut self, service: &ServiceName) {
        let now = self.now();
        for key in self.known.keys_of(service) {
            self.services.used(&key, now);
        }
    }

    fn take(&mut self, asked: &Asked, answer: Answer) {
        let (now, draw) = (self.now(), fastrand::u32(..));
        self.gate(asked).answered();
        self.figures.answered();
        match (asked, answer) {
            (Asked::Names(namespace), Answer::Names(names)) => {
                let changes = self.known.names(*namespace, &names, &self.config);
                for key in &changes.removed {
                    self.services.remove(key);
                    self.failing.remove(&Asked::Service(key.clone()));
                }
                changes.added.into_iter().for_each(|key| self.services.add(key, now));
                self.lists.answered(namespace, now, draw);
                self.figures.services.store(self.known.len(), Ordering::Relaxed);
                if !changes.removed.is_empty() || self.published.is_none() {
                    self.changed();
                }
            }
            (Asked::Service(key), Answer::Instances(instances)) => {
                self.services.answered(key, now, draw);
                if self.known.instances(key, &instances, &self.config) {
                    self.changed();
                }
            }
            (Asked::Names(_) | Asked::Service(_), _) => {}
        }
        if self.failing.remove(asked).is_some() {
            // The set is the same or not; what fails still, if anything, is the news.
            self.changed();
        }
    }

    /// Reports the first failure, and one of another kind; many that fail together are one.
    async fn ill(&mut self, asked: Asked, trouble: Trouble) {
        let (now, draw) = (self.now(), fastrand::u32(..));
        self.figures.failed();
        self.gate(&asked).failed(&trouble);
        if let Asked::Service(key) = &asked
            && !self.known.has(key)
        {
            // It left the list while it was asked for: nobody will ask again, so nothing would ever take the failure back.
            return;
        }
        let what = match &asked {
            Asked::Names(namespace) => {
                self.lists.failed(namespace, now, draw);
                format!("the list of services of {}", self.config.namespaces[*namespace])
            }
            Asked::Service(key) => {
                if trouble.is_general() {
                    self.services.put_back(key);
                } else {
                    self.services.failed(key, now, draw);
                }
                if trouble.is_gone() {
                    // The list decides whether it is: a service that has just been made is not known everywhere yet.
                    self.lists.hurry(&key.0, now);
                }
                format!("the service {}", key.1.escape_debug())
            }
        };
        tracing::debug!(
            what,
            error = &trouble as &dyn std::error::Error,
            rate = self.gate(&asked).rate(),
            "Cloud Map was asked in vain"
        );
        let text = super::chain(&trouble);
        // What a list cannot be had for, its services cannot be had for either.
        let caused = match &asked {
            Asked::Names(_) => false,
            Asked::Service((namespace, _)) => self.failing.contains_key(&Asked::Names(*namespace)),
        };
        let told = caused || self.failing.values().any(|known| *known == text);
        self.failing.insert(asked, text);
        if !told {
            let outcome = Err(SourceError::Aws { what, source: trouble });
            drop(self.reports.send(Report { source: self.source, outcome, still: None }).await);
        }
    }

    /// What is known is to be handed on, soon; while it is read for the first time, now and then.
    fn changed(&mut self) {
        let soon = Instant::now() + SETTLE;
        let loading = self.services.unseen() > 0 && self.failing.is_empty();
        let at = if loading { self.published.map_or(soon, |last| last + PROGRESS) } else { soon };
        self.publish = Some(self.publish.map_or(at, |before| before.min(at)));
    }

    /// # Errors
    /// Nobody listens.
    async fn hand_on(&mut self) -> Result<(), ()> {
        self.publish = None;
        self.published = Some(Instant::now());
        let problems = self.known.problems();
        if problems != self.problems {
            for problem in problems.iter().filter(|problem| !self.problems.contains(problem)).take(20) {
                tracing::warn!(problem, "Cloud Map knows something that is not used");
            }
            self.problems = problems;
        }
        let still = self.failing.values().next().cloned();
        let report = Report { source: self.source, outcome: Ok(self.known.set()), still };
        self.reports.send(report).await.map_err(drop)
    }
}
