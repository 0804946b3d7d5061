//! One question to Consul, asked over and over: a blocking query that follows a list of services or one service.
//!
//! Asks and reports; what an answer changes is the director's business. While Consul is away only the list of services
//! is asked for, so that a thousand watches do not find out each by themselves, nor come back all at once.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use mesh_core::{
    back_off::spread,
    config::discovery::Consul,
    consul::{
        answer::{self, Instances, Names},
        cursor::{Cursor, Moved},
        known::Key,
    },
};
use tokio::sync::{Semaphore, mpsc, watch};

use super::{
    super::Figures,
    client::{Answer, Client, Question, READ, Trouble},
};

/// Questions that do not block, at a time.
pub(super) const AT_ONCE: usize = 8;
/// Over so long the watches of one agent come back when Consul does.
const RETURN: Duration = Duration::from_secs(2);

/// What a watch has to say.
#[derive(Debug)]
pub(super) enum News {
    Names {
        datacenter: usize,
        names: Names,
        /// Consul was away, or has begun anew: it may know less than before.
        anew: bool,
    },
    Instances {
        key: Key,
        instances: Instances,
    },
    /// Names of services of which an instance has changed between good and bad.
    Flipped {
        datacenter: usize,
        which: Flipped,
    },
    /// A question got no answer; those before stay good.
    Failed {
        of: Asked,
        trouble: Trouble,
    },
    /// A question is answered again.
    Well {
        of: Asked,
    },
}

#[derive(Debug)]
pub(super) enum Flipped {
    /// A node: any service may be on it.
    Any,
    Services(Vec<String>),
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Asked {
    Names(usize),
    Service(Key),
    /// All checks in a state.
    Checks(usize, &'static str),
}

/// What all watches share.
pub(super) struct Shared {
    pub(super) config: Arc<Consul>,
    pub(super) client: Client,
    pub(super) news: mpsc::Sender<News>,
    pub(super) figures: Arc<Figures>,
    pub(super) at_once: Semaphore,
    /// Whether Consul answers, by datacenter.
    pub(super) up: Vec<watch::Sender<bool>>,
    pub(super) began: Instant,
}

impl Shared {
    /// The time, as the core wants it.
    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn question(&self, of: &Asked) -> Question {
        let (datacenter, path, mut parameters) = match of {
            Asked::Names(datacenter) => (*datacenter, "/v1/catalog/services".to_owned(), Vec::new()),
            Asked::Service((datacenter, name)) => {
                let name: String = form_urlencoded::byte_serialize(name.as_bytes()).collect();
                // In a path a blank is no `+`.
                let path = format!("/v1/health/service/{}", name.replace('+', "%20"));
                let tags = self.config.tags.iter().map(|tag| ("tag", tag.clone())).collect();
                (*datacenter, path, tags)
            }
            Asked::Checks(datacenter, state) => (*datacenter, format!("/v1/health/state/{state}"), Vec::new()),
        };
        if let Some(datacenter) = self.config.datacenters.get(datacenter) {
            parameters.push(("dc", datacenter.clone()));
        }
        if self.config.stale {
            parameters.push(("stale", String::new()));
        }
        Question { path, parameters, rule: READ }
    }

    /// Asks once.
    pub(super) async fn ask(&self, of: &Asked, index: Option<u64>) -> Result<Answer, Trouble> {
        let question = self.question(of);
        let _turn = match index {
            // Never closed.
            None => Some(self.at_once.acquire().await),
            Some(_) => None,
        };
        let answer = self.client.get(&question, index.map(|index| (index, self.config.wait))).await;
        match &answer {
            Ok(_) => self.figures.answered(),
            Err(_) => self.figures.failed(),
        }
        answer
    }

    /// Follows until the director is gone.
    pub(super) async fn follow(self: Arc<Self>, of: Asked) {
        let _counted = Counted::new(&self.figures);
        let mut cursor = Cursor::default();
        let mut bad = Checks::default();
        let mut failing = false;
        // The list of services as last understood: its index moves with every registration, the list itself hardly ever.
        let mut list = Vec::new();
        loop {
            self.wait_for_consul(&of).await;
            let now = self.now();
            tokio::time::sleep(cursor.pause(now)).await;
            let asked = self.ask(&of, cursor.index()).await;
            let understood = asked.and_then(|answer| {
                // The cursor moves only over what was understood.
                if cursor.goes_on_with(answer.index) && !failing && answer.body == list {
                    return Ok((cursor.answered(answer.index), Read::SameNames));
                }
                let read = read(&of, &answer, &self.config)?;
                if let Read::Names(_) = read {
                    list = answer.body;
                }
                Ok((cursor.answered(answer.index), read))
            });
            match understood {
                Ok((moved, read)) => {
                    let was_away = std::mem::take(&mut failing);
                    if was_away && self.tell(News::Well { of: of.clone() }).await.is_err() {
                        return;
                    }
                    let told = match moved {
                        Moved::Not => Ok(()),
                        Moved::On | Moved::Back => {
                            self.pass_on(&of, read, was_away || moved == Moved::Back, &mut bad).await
                        }
                    };
                    if told.is_err() {
                        return;
                    }
                    self.now_up(&of, true);
                }
                Err(trouble) => {
                    let wait = cursor.failed(fastrand::u32(..));
                    failing = true;
                    self.now_up(&of, false);
                    if self.tell(News::Failed { of: of.clone(), trouble }).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    /// All but the list of services wait until Consul is there, and a moment longer where it was not.
    async fn wait_for_consul(&self, of: &Asked) {
        let datacenter = match of {
            Asked::Names(_) => return,
            Asked::Service((datacenter, _)) | Asked::Checks(datacenter, _) => *datacenter,
        };
        let Some(up) = self.up.get(datacenter) else { return };
        let mut up = up.subscribe();
        if !*up.borrow_and_update() && up.wait_for(|up| *up).await.is_ok() {
            tokio::time::sleep(spread(RETURN, fastrand::u32(..))).await;
        }
    }

    fn now_up(&self, of: &Asked, is: bool) {
        if let Asked::Names(datacenter) = of
            && let Some(up) = self.up.get(*datacenter)
        {
            up.send_if_modified(|was| std::mem::replace(was, is) != is);
        }
    }

    async fn pass_on(&self, of: &Asked, read: Read, anew: bool, bad: &mut Checks) -> Result<(), ()> {
        match (of, read) {
            (Asked::Names(datacenter), Read::Names(names)) => {
                self.tell(News::Names { datacenter: *datacenter, names, anew }).await
            }
            // Instances have come or gone, of whichever service.
            (Asked::Names(datacenter), Read::SameNames) => {
                self.tell(News::Flipped { datacenter: *datacenter, which: Flipped::Any }).await
            }
            (Asked::Service(key), Read::Instances(instances)) => {
                self.tell(News::Instances { key: key.clone(), instances }).await
            }
            (Asked::Checks(datacenter, _), Read::Checks(now)) => match bad.changed_to(now) {
                Some(which) => self.tell(News::Flipped { datacenter: *datacenter, which }).await,
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// # Errors
    /// Nobody listens any more.
    async fn tell(&self, news: News) -> Result<(), ()> {
        self.news.send(news).await.map_err(drop)
    }

    /// Asks for one service once, without following it.
    pub(super) async fn look(self: Arc<Self>, key: Key) {
        let of = Asked::Service(key.clone());
        let read = self.ask(&of, None).await.and_then(|answer| instances(&answer));
        let news = match read {
            Ok(instances) => News::Instances { key, instances },
            Err(trouble) => News::Failed { of, trouble },
        };
        // Without a listener there is nobody to tell.
        drop(self.news.send(news).await);
    }
}

enum Read {
    Names(Names),
    /// No service has come or gone, nor a tag.
    SameNames,
    Instances(Instances),
    Checks(Vec<answer::BadCheck>),
}

fn read(of: &Asked, answer: &Answer, config: &Consul) -> Result<Read, Trouble> {
    Ok(match of {
        Asked::Names(_) => Read::Names(names(answer, config)?),
        Asked::Service(_) => Read::Instances(instances(answer)?),
        Asked::Checks(..) => Read::Checks(answer::bad_checks(&answer.body)?),
    })
}

/// The list of services: an empty one that an ACL has emptied is not taken for the end of all of them. Consul before
/// 1.11 does not say so, but its servers are a service themselves; of the namespace `default` only.
pub(super) fn names(answer: &Answer, config: &Consul) -> Result<Names, Trouble> {
    let names = answer::names(&answer.body)?;
    let with_servers = config.namespace.as_deref().is_none_or(|namespace| namespace == "default");
    if names.is_empty() && (answer.filtered || with_servers) {
        return Err(Trouble::Hidden);
    }
    Ok(names)
}

/// The instances of a service: none at all, where an ACL has kept some back, is not taken for its end.
fn instances(answer: &Answer) -> Result<Instances, Trouble> {
    let instances = answer::instances(&answer.body)?;
    if answer.filtered && instances.usable.is_empty() {
        return Err(Trouble::Hidden);
    }
    Ok(instances)
}

/// The checks of one state as last seen.
#[derive(Default)]
struct Checks(Option<Vec<answer::BadCheck>>);

impl Checks {
    /// Whose checks have come or gone; the first answer says nothing, because everything is read then anyway.
    fn changed_to(&mut self, now: Vec<answer::BadCheck>) -> Option<Flipped> {
        let before = self.0.replace(now)?;
        let now = self.0.as_ref()?;
        let moved = |a: &[answer::BadCheck], b: &[answer::BadCheck]| {
            a.iter().filter(|check| b.binary_search(check).is_err()).cloned().collect::<Vec<_>>()
        };
        let mut services: Vec<String> = Vec::new();
        for check in moved(&before, now).into_iter().chain(moved(now, &before)) {
            if check.service.is_empty() {
                return Some(Flipped::Any);
            }
            services.push(check.service);
        }
        services.sort();
        services.dedup();
        (!services.is_empty()).then_some(Flipped::Services(services))
    }
}

/// One more watch, while this lives.
struct Counted(Arc<Figures>);

impl Counted {
    fn new(figures: &Arc<Figures>) -> Self {
        figures.watches.fetch_add(1, Ordering::Relaxed);
        Self(figures.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.watches.fetch_sub(1, Ordering::Relaxed);
    }
}
