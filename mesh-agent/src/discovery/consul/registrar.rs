//! Tells Consul's agent about this host's tasks, and keeps it so: registers, withdraws, and says at regular times that
//! each instance is ready, because Consul takes one of which nobody speaks for critical.
//!
//! What has to be registered is the core's to decide; this only does it. After every turn Consul knows what the
//! snapshot says, whatever it knew before.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_core::{
    back_off::back_off,
    config::discovery::{Consul, Registration as Config},
    consul::{
        answer,
        registration::{self, Action},
    },
    registration::{Registration, owner},
    task::Task,
};
use serde_json::json;
use tokio::sync::watch;

use super::{
    super::Registered,
    client::{Client, Question, READ_AGENT, SetUpError, Trouble, WRITE},
};
use crate::state::Published;

/// Beats in the time after which Consul takes an instance for critical.
const BEATS: u32 = 3;
/// How long withdrawing everything may take when the agent stops.
const FAREWELL: Duration = Duration::from_secs(2);

/// Keeps the registrations of one host.
pub struct Registrar {
    client: Client,
    config: Config,
    /// This host's address, and the port of its tunnels.
    tunnel: SocketAddr,
    /// When each was last said to be what.
    said: BTreeMap<String, (bool, Instant)>,
    status: watch::Sender<Registered>,
}

impl Registrar {
    /// `tunnel` is where other hosts reach this one's agent.
    ///
    /// # Errors
    /// Consul could never be asked.
    pub fn new(consul: &Arc<Consul>, config: Config, tunnel: SocketAddr) -> Result<Self, SetUpError> {
        let client = Client::new(consul.clone())?;
        Ok(Self { client, config, tunnel, said: BTreeMap::new(), status: watch::Sender::default() })
    }

    /// How it goes, to be shown.
    pub fn status(&self) -> watch::Receiver<Registered> {
        self.status.subscribe()
    }

    /// Follows the snapshot until `stop` is told, and withdraws everything then. To be called when the tasks of this
    /// host are known: what is registered for nobody goes.
    pub async fn run(
        mut self,
        mut published: Published,
        mut tasks: watch::Receiver<Arc<Vec<Task>>>,
        mut stop: watch::Receiver<bool>,
    ) {
        let beat = self.config.ttl / BEATS;
        let mut failures = 0;
        let mut last: Option<BTreeMap<String, Registration>> = None;
        let mut due = Instant::now();
        loop {
            let current = tasks.borrow_and_update().clone();
            let desired = registration::desired(&published.load(), &current, self.tunnel, &self.config);
            if last.as_ref() != Some(&desired) || due <= Instant::now() {
                let done = self.turn(&desired).await;
                due = Instant::now();
                match done {
                    Ok(()) => {
                        failures = 0;
                        due += beat;
                        self.well(self.said.len());
                        last = Some(desired);
                    }
                    Err(trouble) => {
                        due += back_off(failures, fastrand::u32(..)).min(beat);
                        failures += 1;
                        self.ill(self.said.len(), &trouble);
                        // Not to be tried again before it is due, unless something else is wanted then.
                        last = Some(desired);
                    }
                }
            }
            tokio::select! {
                changed = published.changed() => if changed.is_err() { break },
                changed = tasks.changed() => if changed.is_err() { break },
                () = tokio::time::sleep_until(due.into()) => {}
                // Also when the sender is gone: then the agent is stopping too.
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        let nothing = BTreeMap::new();
        match tokio::time::timeout(FAREWELL, self.turn(&nothing)).await {
            Ok(Ok(())) => tracing::info!("the tasks of this host are withdrawn from Consul"),
            Ok(Err(trouble)) => self.ill(0, &trouble),
            Err(_elapsed) => {
                tracing::warn!("Consul does not answer; what is registered for this host ends with its time to live");
            }
        }
    }

    /// Makes Consul know exactly `desired`. What can be done is done, also where something else fails.
    async fn turn(&mut self, desired: &BTreeMap<String, Registration>) -> Result<(), Trouble> {
        let owner = owner(self.tunnel.ip());
        let observed = self.client.get(&list(&owner), None).await?;
        let observed = answer::registered(&observed.body)?;
        let desired = &registration::due(desired, &observed, &owner);
        let mut first = Ok(());
        let mut note = |done: Result<(), Trouble>| {
            if first.is_ok() {
                first = done;
            }
        };
        for action in registration::actions(desired, &observed, &owner) {
            match action {
                Action::Deregister { id } => {
                    tracing::info!(id, "withdrawn from Consul");
                    self.said.remove(&id);
                    note(self.client.put(&at("service/deregister", &id), String::new()).await);
                }
                Action::Register(registration) => note(self.register(&registration).await),
            }
        }
        self.said.retain(|id, _| desired.contains_key(id));
        // A little before it is due, so that a turn that is late for a moment does not leave one out.
        let fresh = self.config.ttl / BEATS * 3 / 4;
        for registration in desired.values() {
            let known = self.said.get(&registration.id);
            if known.is_some_and(|(ready, when)| *ready == registration.ready && when.elapsed() < fresh) {
                continue;
            }
            match self.beat(registration).await {
                // Its check is gone: a Consul that has lost a part of what it knew.
                Err(Trouble::Failed { .. }) => note(self.register(registration).await),
                done => note(done),
            }
        }
        first
    }

    async fn register(&mut self, it: &Registration) -> Result<(), Trouble> {
        let body = json!({
            "ID": it.id,
            "Name": it.name,
            "Address": it.addr.ip().to_string(),
            "Port": it.addr.port(),
            "Tags": it.tags,
            "Meta": it.meta,
            "Check": {
                "CheckID": registration::check_id(&it.id),
                "Name": "readiness, as the agent of its host says",
                "TTL": seconds(self.config.ttl),
                "Status": status(it.ready),
                "DeregisterCriticalServiceAfter": seconds(self.config.deregister_after),
            },
        });
        let question = question("/v1/agent/service/register".into());
        self.client.put(&question, body.to_string()).await?;
        tracing::info!(id = it.id, service = it.name, ready = it.ready, "registered with Consul");
        self.said.insert(it.id.clone(), (it.ready, Instant::now()));
        Ok(())
    }

    async fn beat(&mut self, it: &Registration) -> Result<(), Trouble> {
        // The same words each time: Consul then has nothing to write.
        let output = if it.ready { "the task is ready" } else { "the task is not ready" };
        let body = json!({ "Status": status(it.ready), "Output": output });
        self.client.put(&at("check/update", &registration::check_id(&it.id)), body.to_string()).await?;
        self.said.insert(it.id.clone(), (it.ready, Instant::now()));
        Ok(())
    }

    fn well(&self, count: usize) {
        self.status.send_replace(Registered { at: Some(SystemTime::now()), count, error: None });
    }

    fn ill(&self, count: usize, trouble: &Trouble) {
        let text = super::super::chain(trouble);
        self.status.send_if_modified(|status| {
            let news = status.error.as_ref() != Some(&text);
            if news {
                tracing::warn!(error = text, "not everything is registered with Consul");
            }
            status.count = count;
            status.error = Some(text);
            news
        });
    }
}

fn status(ready: bool) -> &'static str {
    if ready { "passing" } else { "critical" }
}

fn seconds(span: Duration) -> String {
    format!("{}ms", span.as_millis())
}

fn question(path: String) -> Question {
    Question { path, parameters: Vec::new(), rule: WRITE }
}

fn at(what: &str, id: &str) -> Question {
    let id: String = form_urlencoded::byte_serialize(id.as_bytes()).collect();
    question(format!("/v1/agent/{what}/{}", id.replace('+', "%20")))
}

/// What this host has registered, and no more.
fn list(owner: &str) -> Question {
    let filter = format!("Meta[\"{}\"] == \"{owner}\"", mesh_core::instance::meta::OWNER);
    Question { path: "/v1/agent/services".into(), parameters: vec![("filter", filter)], rule: READ_AGENT }
}
