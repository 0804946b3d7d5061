//! Tells Cloud Map about this host's tasks, and keeps it so: registers, takes back, and says which are well.
//!
//! What comes next is the ledger's to say, and when the pace's; this only does it. Must not decide.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_core::{
    aws::pace::Pace,
    cloud_map::{
        ledger::{Call, Failure, Ledger},
        registration::desired,
    },
    config::cloud_map::{CloudMap, Registration as Config},
    registration::owner,
    task::Task,
};
use tokio::{sync::watch, task::JoinSet};

use super::{
    super::{
        Registered,
        aws::{Trouble, gate::Gate},
    },
    client::{Client, Told},
};
use crate::state::Published;

/// How long taking everything back may last when the agent stops: requests are made no faster than they may.
const FAREWELL: Duration = Duration::from_secs(8);
/// Requests under way at a time.
const AT_ONCE: usize = 8;
/// Without a region, the next attempt is made after this.
const NO_CLIENT: Duration = Duration::from_secs(5);

/// Keeps the registrations of one host.
pub struct Registrar {
    cloud_map: Arc<CloudMap>,
    config: Config,
    /// This host's address, and the port of its tunnels.
    tunnel: SocketAddr,
    status: watch::Sender<Registered>,
}

impl Registrar {
    /// `tunnel` is where other hosts reach this one's agent.
    pub fn new(cloud_map: &Arc<CloudMap>, config: Config, tunnel: SocketAddr) -> Self {
        Self { cloud_map: cloud_map.clone(), config, tunnel, status: watch::Sender::default() }
    }

    /// How it goes, to be shown.
    pub fn status(&self) -> watch::Receiver<Registered> {
        self.status.subscribe()
    }

    /// Follows the snapshot until `stop` is told, and takes everything back then. To be called when the tasks of this
    /// host are known: what is registered for nobody goes.
    pub async fn run(
        self,
        mut published: Published,
        mut tasks: watch::Receiver<Arc<Vec<Task>>>,
        mut stop: watch::Receiver<bool>,
    ) {
        let client = tokio::select! {
            client = self.client() => client,
            // Also when the sender is gone: then the agent is stopping too. Nothing is registered yet.
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let owner = owner(self.tunnel.ip());
        let pace = Pace::new(self.config.rate, self.config.rate.max(u32::try_from(AT_ONCE).unwrap_or(1)));
        let mut running = Running {
            ledger: Ledger::new(owner.clone(), self.config.interval),
            owner: owner.into(),
            gate: Arc::new(Gate::new(pace)),
            client: Arc::new(client),
            cloud_map: self.cloud_map,
            under_way: JoinSet::new(),
            began: Instant::now(),
            trouble: None,
            status: self.status,
        };
        loop {
            let current = tasks.borrow_and_update().clone();
            running.ledger.want(desired(&published.load(), &current, self.tunnel, &self.config));
            running.call();
            running.tell();
            tokio::select! {
                changed = published.changed() => if changed.is_err() { break },
                changed = tasks.changed() => if changed.is_err() { break },
                () = running.turn() => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        running.leave().await;
    }

    /// A client, as soon as a region is known.
    async fn client(&self) -> Client {
        loop {
            match Client::new(&self.cloud_map).await {
                Ok(client) => return client,
                Err(trouble) => ill(&self.status, 0, super::super::chain(&trouble)),
            }
            tokio::time::sleep(NO_CLIENT).await;
        }
    }
}

struct Running {
    ledger: Ledger,
    gate: Arc<Gate>,
    client: Arc<Client>,
    cloud_map: Arc<CloudMap>,
    owner: Arc<str>,
    under_way: JoinSet<(Call, Result<Told, Trouble>)>,
    began: Instant,
    /// What went wrong last, until everything is well again.
    trouble: Option<String>,
    status: watch::Sender<Registered>,
}

impl Running {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Makes the requests that are due, as far as it may.
    fn call(&mut self) {
        let now = self.now();
        let is_due = |due: Option<Duration>| due.is_some_and(|due| due <= now);
        while self.under_way.len() < AT_ONCE && is_due(self.ledger.next()) && self.gate.pass() {
            let Some(call) = self.ledger.take(now) else { break };
            let service = self.ledger.service(&call).cloned();
            let (client, config, owner) = (self.client.clone(), self.cloud_map.clone(), self.owner.clone());
            let gate = self.gate.clone();
            self.under_way.spawn(async move {
                let told = client.call(&config, &call, &owner, service.as_ref(), &gate).await;
                (call, told)
            });
        }
    }

    /// Waits for an answer and takes it, or until the next request may be made.
    async fn turn(&mut self) {
        let room = self.under_way.len() < AT_ONCE;
        let due = self.ledger.next().filter(|_| room).map(|due| self.gate.next().max(self.began + due));
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let answered = tokio::select! {
            Some(answered) = self.under_way.join_next() => answered,
            () = timer => return,
        };
        match answered {
            Ok((call, Ok(told))) => self.take(&call, told),
            Ok((call, Err(trouble))) => self.failed(&call, &trouble),
            // Nobody aborts them.
            Err(error) => tracing::error!(%error, "a request to Cloud Map was lost"),
        }
    }

    fn take(&mut self, call: &Call, told: Told) {
        let now = self.now();
        self.gate.answered();
        match (call, told) {
            (Call::List, Told::Services(services)) => self.ledger.listed(services, now),
            (Call::Look(name), Told::Instances(instances)) => {
                for (instance, operation) in self.ledger.looked(name, instances, now) {
                    tracing::warn!(
                        service = %name, instance, operation,
                        "Cloud Map has taken a registration and does not show it: `aws servicediscovery get-operation \
                         --operation-id` says why; services with DNS records need Route 53 permissions too"
                    );
                }
            }
            (Call::Register(key, attributes), Told::Operation(operation)) => {
                tracing::info!(service = %key.0, instance = key.1, "registered with Cloud Map");
                self.ledger.registered(key, attributes.clone(), operation, now);
            }
            (Call::Deregister(key), Told::Operation(_) | Told::Done) => {
                tracing::info!(service = %key.0, instance = key.1, "withdrawn from Cloud Map");
                self.ledger.deregistered(key, now);
            }
            (Call::Tell(key, well), Told::Done) => {
                tracing::info!(service = %key.0, instance = key.1, well, "health told to Cloud Map");
                self.ledger.told(key, *well, now);
            }
            (call, told) => tracing::error!(?call, ?told, "an answer to another question"),
        }
    }

    fn failed(&mut self, call: &Call, trouble: &Trouble) {
        let (now, draw) = (self.now(), fastrand::u32(..));
        self.gate.failed(trouble);
        tracing::debug!(
            ?call,
            error = trouble as &dyn std::error::Error,
            rate = self.gate.rate(),
            "Cloud Map was asked in vain"
        );
        if trouble.is_gone() {
            self.ledger.gone(call, now, draw);
        } else {
            let failure = Failure { general: trouble.is_general(), heard: trouble.may_be_heard() };
            self.ledger.failed(call, failure, now, draw);
        }
        self.trouble = Some(super::super::chain(trouble));
    }

    /// Shows how it goes.
    fn tell(&mut self) {
        let settled = self.under_way.is_empty() && self.ledger.is_settled();
        if settled {
            self.trouble = None;
        }
        let count = self.ledger.count();
        let missing = self.ledger.missing();
        if let Some(trouble) = &self.trouble {
            ill(&self.status, count, trouble.clone());
        } else if let Some(name) = missing.first() {
            let namespace = self.cloud_map.namespaces.first().map(String::as_str).unwrap_or_default();
            let id = self.client.known_id().unwrap_or_else(|| "ID-OF-THE-NAMESPACE".into());
            let all: Vec<_> = missing.iter().map(|name| format!("`{name}`")).collect();
            let text = format!(
                "the namespace {namespace} has no service {}: create it, with `aws servicediscovery create-service --name \
                 {name} --namespace-id {id} --health-check-custom-config FailureThreshold=1`",
                all.join(", ")
            );
            ill(&self.status, count, text);
        } else if settled {
            self.status.send_if_modified(|status| {
                let news = status.error.is_some() || status.count != count || status.at.is_none();
                *status = Registered { at: Some(SystemTime::now()), count, error: None };
                news
            });
        }
    }

    /// Takes everything back, as fast as it may.
    async fn leave(mut self) {
        self.ledger.leave();
        let gone = async {
            loop {
                self.call();
                if self.ledger.is_gone() {
                    return;
                }
                self.turn().await;
            }
        };
        if tokio::time::timeout(FAREWELL, gone).await.is_ok() {
            tracing::info!("the tasks of this host are withdrawn from Cloud Map");
        } else {
            let trouble = self.trouble.as_deref().unwrap_or("Cloud Map does not answer in time");
            tracing::warn!(
                error = trouble,
                "some tasks of this host stay registered with Cloud Map until an agent runs at its address again"
            );
        }
    }
}

fn ill(status: &watch::Sender<Registered>, count: usize, text: String) {
    status.send_if_modified(|status| {
        let news = status.error.as_ref() != Some(&text);
        if news {
            tracing::warn!(error = text, "not everything is registered with Cloud Map");
        }
        status.count = count;
        status.error = Some(text);
        news
    });
}
