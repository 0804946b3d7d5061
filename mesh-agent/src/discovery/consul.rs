//! Consul as a backend: which services are asked for and how, what the answers make of all that is known, and when it
//! is handed on.
//!
//! One blocking query follows the list of services. While there are not more services than `watches`, each has a
//! blocking query of its own, and news arrives in milliseconds. Beyond that, those that tasks of this host ask for have
//! one, and the others are *swept*: they are looked at again when something has happened that may concern them, at a
//! bounded rate. Two more blocking queries, for all checks that are critical or warn, tell at once of which services
//! the health has changed. So a host has `watches` + 3 + 4 connections at most, and asks for nothing while nothing
//! happens, whatever the number of services.
//!
//! [`client`] speaks HTTP, [`watch`] follows one question, [`registrar`] tells Consul about this host's tasks, [`check`]
//! is for `mesh-agent check`.

pub mod check;
pub mod client;
pub mod registrar;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use mesh_core::{
    config::discovery::Consul,
    consul::known::{Key, Known},
    id::ServiceName,
};
use tokio::{
    sync::{Semaphore, mpsc, watch as channel},
    task::{AbortHandle, JoinSet},
};

pub use self::client::{SetUpError, Trouble};
use self::{
    client::Client,
    watch::{Asked, Flipped, News, Shared},
};
use super::{Figures, Report, SourceError, SourceId};
use crate::sys::memory;

/// News closer together than this is handed on as one.
const SETTLE: Duration = Duration::from_millis(20);
/// The same for the first news after a while: long enough for a new service to come with its instances.
const SETTLE_FIRST: Duration = Duration::from_millis(5);
/// So long a while.
const QUIET: Duration = Duration::from_millis(200);
/// While everything is read for the first time, what there is so far is handed on so often.
const PROGRESS: Duration = Duration::from_secs(1);
/// Services swept again in a second; a sweep of 5,000 takes four minutes.
const SWEEP_RATE: u32 = 20;
/// Services swept at a time.
const SWEEPERS: usize = 4;
/// Where all that is to be swept gets no answer, one of it is asked for so often.
const RETRY: Duration = Duration::from_secs(1);
/// A service that no task has asked for in so long gives its watch to one that a task asks for.
const IDLE: Duration = Duration::from_secs(300);
/// After this long everybody has looked at what was handed on last.
const LOOKED_AT: Duration = Duration::from_secs(1);
/// Memory is given back at most so often: while it is, nobody else gets any from where that is.
const GIVE_BACK: Duration = Duration::from_secs(10);
/// News that may wait for the director.
const NEWS: usize = 256;

/// Follows Consul and reports, until nobody listens.
pub(super) async fn run(
    config: Arc<Consul>,
    source: SourceId,
    reports: mpsc::Sender<Report>,
    figures: Arc<Figures>,
    uses: mpsc::Receiver<ServiceName>,
) {
    let client = match Client::new(config.clone()) {
        Ok(client) => client,
        Err(error) => {
            // It is the same at the next attempt: the files are read once.
            drop(reports.send(Report { source, outcome: Err(SourceError::ConsulSetUp(error)), still: None }).await);
            return;
        }
    };
    let datacenters = config.datacenters.len().max(1);
    let (sender, news) = mpsc::channel(NEWS);
    let shared = Arc::new(Shared {
        config: config.clone(),
        client,
        news: sender,
        figures,
        at_once: Semaphore::new(watch::AT_ONCE),
        up: (0..datacenters).map(|_| channel::Sender::new(false)).collect(),
        began: Instant::now(),
    });
    let mut director = Director {
        shared,
        source,
        reports,
        known: Known::default(),
        followers: JoinSet::new(),
        followed: HashMap::new(),
        used: HashMap::new(),
        sweep: Sweep::default(),
        failing: BTreeMap::new(),
        publish: None,
        published: None,
        tidy: None,
        tidied: None,
        problems: Vec::new(),
    };
    for datacenter in 0..datacenters {
        director.follow(Asked::Names(datacenter));
    }
    director.run(news, uses).await;
}

struct Director {
    shared: Arc<Shared>,
    source: SourceId,
    reports: mpsc::Sender<Report>,
    known: Known,
    followers: JoinSet<()>,
    followed: HashMap<Asked, AbortHandle>,
    /// When tasks of this host last asked for a service.
    used: HashMap<Key, Instant>,
    sweep: Sweep,
    /// What gets no answer at the moment.
    failing: BTreeMap<Asked, String>,
    /// When what is known is to be handed on; `None`: it has been.
    publish: Option<Instant>,
    published: Option<Instant>,
    /// When what reading and merging took is to be given back; `None`: it has been.
    tidy: Option<Instant>,
    tidied: Option<Instant>,
    /// What is left out, as last logged.
    problems: Vec<String>,
}

/// Services that are not followed, and are to be looked at.
#[derive(Default)]
struct Sweep {
    /// Those that tasks of this host ask for; they take turns with all others, so that neither wait for long.
    used: VecDeque<Key>,
    others: VecDeque<Key>,
    others_turn: bool,
    queued: BTreeSet<Key>,
    /// Under way.
    looking: BTreeSet<Key>,
    /// When the next one may be looked at.
    next: Option<Instant>,
}

impl Director {
    async fn run(mut self, mut news: mpsc::Receiver<News>, mut uses: mpsc::Receiver<ServiceName>) {
        loop {
            let soonest = [self.publish, self.sweep.due(), self.grace(), self.tidy].into_iter().flatten().min();
            let timer = async {
                match soonest {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(told) = news.recv() => self.take(told).await,
                Some(service) = uses.recv() => self.prefer(&service),
                () = timer => {}
                () = self.reports.closed() => return,
            }
            while self.followers.try_join_next().is_some() {}
            self.after_grace();
            self.look_on();
            if self.publish.is_some_and(|at| at <= Instant::now()) && self.hand_on().await.is_err() {
                return;
            }
            if self.tidy.is_some_and(|at| at <= Instant::now()) {
                self.give_back();
            }
        }
    }

    async fn take(&mut self, news: News) {
        let now = self.shared.now();
        match news {
            News::Names { datacenter, names, anew } => {
                if anew && !self.known.is_empty() {
                    let grace = mesh_core::consul::known::GRACE;
                    tracing::info!(source = %self.shared.config.address, ?grace,
                        "Consul is back; what is missing there is kept for a while");
                    self.known.began_anew(datacenter, now);
                }
                let changes = self.known.names(datacenter, &names, &self.shared.config, now);
                for key in &changes.removed {
                    self.forget(key);
                }
                if !changes.removed.is_empty() {
                    self.fill();
                    self.changed();
                }
                for key in changes.added {
                    self.attend(key);
                }
                for key in changes.touched {
                    self.sweep.first(&key, &self.followed);
                }
                // Any of those that nobody follows may have another instance now.
                self.sweep_all(datacenter);
                self.follow_checks(datacenter);
                self.shared.figures.services.store(self.known.len(), Ordering::Relaxed);
                if self.published.is_none() {
                    self.changed();
                }
            }
            News::Instances { key, instances } => {
                self.sweep.looking.remove(&key);
                self.well(&Asked::Service(key.clone()));
                if self.known.instances(&key, &instances, &self.shared.config, now) {
                    self.changed();
                }
            }
            News::Flipped { datacenter, which: Flipped::Any } => self.sweep_all(datacenter),
            News::Flipped { datacenter, which: Flipped::Services(names) } => {
                for name in names {
                    self.sweep.first(&(datacenter, name.into()), &self.followed);
                }
            }
            News::Failed { of, trouble } => {
                if let Asked::Service(key) = &of
                    && self.sweep.looking.remove(key)
                {
                    // Not followed, so nobody else asks again.
                    if self.sweep.queued.len() < self.failing.len() {
                        // It is not kept from those that get answers.
                        self.sweep.next = Some(Instant::now() + RETRY);
                    }
                    self.sweep.last(key.clone(), false);
                }
                self.ill(of, trouble).await;
            }
            News::Well { of } => self.well(&of),
        }
    }

    fn follow(&mut self, of: Asked) {
        let shared = self.shared.clone();
        let follower = self.followers.spawn(shared.follow(of.clone()));
        if let Some(before) = self.followed.insert(of, follower) {
            before.abort();
        }
    }

    /// Follows a new service if there is room, else it is looked at now and then.
    fn attend(&mut self, key: Key) {
        if self.services_followed() < self.shared.config.watches {
            self.follow(Asked::Service(key));
        } else {
            // Nothing is known of it yet.
            self.sweep.first(&key, &self.followed);
        }
    }

    fn forget(&mut self, key: &Key) {
        let of = Asked::Service(key.clone());
        if let Some(follower) = self.followed.remove(&of) {
            follower.abort();
        }
        self.failing.remove(&of);
        self.used.remove(key);
        self.sweep.forget(key);
    }

    /// A task asks for a service: it is followed, in the place of one that nobody has asked for in a while. If there is
    /// none of that kind, it is looked at once.
    fn prefer(&mut self, service: &ServiceName) {
        let now = Instant::now();
        for key in self.known.keys_of(service) {
            self.used.insert(key.clone(), now);
            if self.followed.contains_key(&Asked::Service(key.clone())) {
                continue;
            }
            if self.services_followed() >= self.shared.config.watches {
                let Some(idle) = self.idle(now) else {
                    self.sweep.first(&key, &self.followed);
                    continue;
                };
                if let Some(follower) = self.followed.remove(&idle) {
                    follower.abort();
                }
                self.failing.remove(&idle);
            }
            self.sweep.forget(&key);
            self.follow(Asked::Service(key));
        }
    }

    /// A service that is followed, and that nobody has asked for in a while.
    fn idle(&self, now: Instant) -> Option<Asked> {
        let last = |of: &Asked| match of {
            Asked::Service(key) => Some(self.used.get(key).copied()),
            Asked::Names(_) | Asked::Checks(..) => None,
        };
        let candidates = self.followed.keys().filter_map(|of| Some((last(of)?, of)));
        let (at, of) = candidates.min_by_key(|(at, _)| *at)?;
        at.is_none_or(|at| now.duration_since(at) > IDLE).then(|| of.clone())
    }

    /// Gives room that has become free to services that are swept.
    fn fill(&mut self) {
        let room = self.shared.config.watches.saturating_sub(self.services_followed());
        let swept = self.known.keys().filter(|key| !self.followed.contains_key(&Asked::Service((*key).clone())));
        for key in swept.take(room).cloned().collect::<Vec<_>>() {
            self.sweep.forget(&key);
            self.follow(Asked::Service(key));
        }
    }

    fn services_followed(&self) -> usize {
        self.followed.keys().filter(|of| matches!(of, Asked::Service(_))).count()
    }

    /// Whether everything is being read for the first time. One service that gets no answer does not make it last.
    fn is_loading(&self) -> bool {
        self.known.missing() > 0 && self.failing.is_empty()
    }

    /// The checks tell which service to look at, where services are not followed.
    fn follow_checks(&mut self, datacenter: usize) {
        let followed = self.services_followed();
        for state in ["critical", "warning"] {
            let of = Asked::Checks(datacenter, state);
            match (self.known.len() > followed, self.followed.contains_key(&of)) {
                (true, false) => self.follow(of),
                (false, true) => {
                    if let Some(follower) = self.followed.remove(&of) {
                        follower.abort();
                    }
                }
                (true, true) | (false, false) => {}
            }
        }
    }

    fn sweep_all(&mut self, datacenter: usize) {
        let now = Instant::now();
        for key in self.known.keys().filter(|key| key.0 == datacenter) {
            if !self.followed.contains_key(&Asked::Service(key.clone())) {
                let used = self.used.get(key).is_some_and(|at| now.duration_since(*at) < IDLE);
                self.sweep.last(key.clone(), used);
            }
        }
    }

    /// Looks at swept services: those never seen as fast as Consul answers, the others slowly.
    fn look_on(&mut self) {
        let hurry = self.is_loading();
        let most = if hurry { watch::AT_ONCE } else { SWEEPERS };
        while self.sweep.looking.len() < most && (hurry || self.sweep.next.is_none_or(|at| at <= Instant::now())) {
            let Some(key) = self.sweep.pop() else { break };
            self.sweep.next = Some(Instant::now() + Duration::from_secs(1) / SWEEP_RATE);
            self.followers.spawn(self.shared.clone().look(key));
        }
    }

    fn grace(&self) -> Option<Instant> {
        self.known.next_grace().map(|at| self.shared.began + at)
    }

    /// What was kept only because Consul had begun anew is asked for again, and goes if it is really gone.
    fn after_grace(&mut self) {
        for datacenter in self.known.grace_over(self.shared.now()) {
            let again: Vec<Asked> = self.followed.keys().filter(|of| of.is_of(datacenter)).cloned().collect();
            for of in again {
                self.follow(of);
            }
            self.sweep_all(datacenter);
        }
    }

    /// What is known is to be handed on, soon.
    fn changed(&mut self) {
        let quiet = self.published.is_none_or(|last| last.elapsed() > QUIET);
        let soon = Instant::now() + if quiet { SETTLE_FIRST } else { SETTLE };
        let at = if self.is_loading() { self.published.map_or(soon, |last| last + PROGRESS) } else { soon };
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
                tracing::warn!(source = %self.shared.config.address, problem, "Consul knows something that is not used");
            }
            self.problems = problems;
        }
        let set = self.known.set();
        let still = self.failing.values().next().cloned();
        self.reports.send(Report { source: self.source, outcome: Ok(set), still }).await.map_err(drop)?;
        if !self.known.is_empty() && !self.is_loading() {
            let soon = Instant::now() + LOOKED_AT;
            self.tidy.get_or_insert(self.tidied.map_or(soon, |last| soon.max(last + GIVE_BACK)));
        }
        Ok(())
    }

    /// The answers took many times what is left of them, and so did making a snapshot of many of them.
    fn give_back(&mut self) {
        let now = Instant::now();
        let in_use = self.published.is_some_and(|last| now < last + LOOKED_AT);
        self.tidy = in_use.then(|| now + GIVE_BACK);
        let first = self.tidied.replace(now).is_none();
        tokio::task::spawn_blocking(move || {
            memory::give_back();
            if first {
                // How everything is read is not needed again soon.
                memory::let_go_of_program();
            }
        });
    }

    /// Reports the first failure, and one of another kind; a hundred watches that fail together are one.
    async fn ill(&mut self, of: Asked, trouble: Trouble) {
        let text = trouble.to_string();
        tracing::debug!(?of, error = &trouble as &dyn std::error::Error, "Consul was asked in vain");
        let told = self.failing.values().any(|known| *known == text);
        let what = match &of {
            Asked::Names(_) => "the list of services".to_owned(),
            Asked::Service((_, name)) => format!("the service {}", name.escape_debug()),
            Asked::Checks(..) => "the health of all services".to_owned(),
        };
        self.failing.insert(of, text);
        if !told {
            let outcome = Err(SourceError::Consul { what, source: trouble });
            drop(self.reports.send(Report { source: self.source, outcome, still: None }).await);
        }
    }

    fn well(&mut self, of: &Asked) {
        if self.failing.remove(of).is_some() && self.failing.is_empty() {
            // The set is the same or not; that there is one is the news.
            self.changed();
        }
    }
}

impl Asked {
    fn is_of(&self, datacenter: usize) -> bool {
        match self {
            Self::Names(of) | Self::Service((of, _)) | Self::Checks(of, _) => *of == datacenter,
        }
    }
}

impl Sweep {
    /// Before all others.
    fn first(&mut self, key: &Key, followed: &HashMap<Asked, AbortHandle>) {
        if !followed.contains_key(&Asked::Service(key.clone())) {
            self.queued.insert(key.clone());
            self.others.push_front(key.clone());
            self.others_turn = true;
            self.next = None;
        }
    }

    /// After all others, or after those that tasks ask for as well.
    fn last(&mut self, key: Key, used: bool) {
        if self.queued.insert(key.clone()) {
            let queue = if used { &mut self.used } else { &mut self.others };
            queue.push_back(key);
        }
    }

    fn forget(&mut self, key: &Key) {
        self.queued.remove(key);
        self.looking.remove(key);
    }

    fn pop(&mut self) -> Option<Key> {
        loop {
            let turn = (&mut self.others, &mut self.used);
            let (one, other) = if self.others_turn { turn } else { (turn.1, turn.0) };
            self.others_turn = !self.others_turn;
            let key = one.pop_front().or_else(|| other.pop_front())?;
            // Otherwise it was forgotten, or stood before others and has had its turn.
            if self.queued.remove(&key) {
                self.looking.insert(key.clone());
                return Some(key);
            }
        }
    }

    fn due(&self) -> Option<Instant> {
        let busy = self.looking.len() >= SWEEPERS;
        (!self.queued.is_empty() && !busy).then(|| self.next.unwrap_or_else(Instant::now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_that_tasks_ask_for_take_turns_with_the_others_and_news_comes_before_both() {
        let key = |name: &str| (0, Arc::from(name));
        let mut sweep = Sweep::default();
        for (name, used) in [("a", false), ("b", false), ("c", false), ("u", true), ("v", true), ("u", true)] {
            sweep.last(key(name), used);
        }
        sweep.first(&key("new"), &HashMap::new());
        // It was queued, and now comes before its turn.
        sweep.first(&key("c"), &HashMap::new());
        let order: Vec<_> = std::iter::from_fn(|| sweep.pop()).map(|(_, name)| name).collect();
        assert_eq!(order.iter().map(|name| &**name).collect::<Vec<_>>(), ["c", "u", "new", "v", "a", "b"]);
        assert!(sweep.due().is_none(), "nothing is left");
    }
}
