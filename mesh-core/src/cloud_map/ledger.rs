//! What Cloud Map has of this host, as far as is known, and which request comes next so that it has exactly what is
//! wanted.
//!
//! Cloud Map carries requests out some time after it has taken them, and tells of them later still. So what a request
//! was about counts as done once it is taken, and what is seen counts again only when it was asked for a while after.
//! Must not know the SDK; the clock and chance are arguments.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{
    entries::{Instance, Said, attribute},
    registration::{Key, Wanted},
};
use crate::{back_off::back_off, instance::meta};

/// Cloud Map changes the health of an instance about 30 seconds after it was told to. What is seen before counts for
/// nothing.
const HEALTH_SETTLES: Duration = Duration::from_secs(60);

/// A service that the namespace has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub id: String,
    /// Whether the health of its instances can be told.
    pub health: bool,
}

/// One request. Services are named, and what bears a name now may bear it no longer when the request is made.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// Which services are there?
    List,
    /// Which instances does a service have of this host?
    Look(Arc<str>),
    Register(Key, BTreeMap<String, String>),
    Deregister(Key),
    /// Says whether it may be used.
    Tell(Key, bool),
}

/// See the module's text. Moments are times since any fixed one.
#[derive(Clone, Debug)]
pub struct Ledger {
    /// Who keeps what is of this host.
    owner: String,
    /// How often what is there is looked at; what was done last so long ago is seen by then.
    interval: Duration,
    wanted: BTreeMap<Key, Wanted>,
    /// Everything is to go, and nothing else matters.
    leaving: bool,
    list: Asking,
    services: BTreeMap<Arc<str>, Known>,
    instances: BTreeMap<Key, Slot>,
    /// Whether the services are known.
    listed: bool,
}

/// A question that is asked again and again.
#[derive(Clone, Debug, Default)]
struct Asking {
    under_way: Option<Duration>,
    /// When to ask again.
    due: Duration,
    failures: u32,
}

#[derive(Clone, Debug)]
struct Known {
    service: Service,
    look: Asking,
    looked: bool,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    has: Option<Has>,
    under_way: bool,
    /// When it was last registered or deregistered.
    changed: Option<Duration>,
    /// Cloud Map's name of the registration that it has taken.
    operation: Option<String>,
    not_before: Duration,
    failures: u32,
}

/// An instance that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Has {
    attributes: BTreeMap<String, String>,
    usable: bool,
    /// When its health was last told.
    told: Option<Duration>,
}

/// What a failure means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// It concerns every request, and when the next one may be made is not this module's to say.
    pub general: bool,
    /// The request may have been carried out nevertheless.
    pub heard: bool,
}

/// What has to come of an instance.
enum Aim<'a> {
    Gone,
    There {
        attributes: &'a BTreeMap<String, String>,
        usable: bool,
    },
    /// Its service is not there, or has not been looked at.
    Unknown,
}

/// In which order requests that are due are made: first what keeps others from being sent to who does not serve.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Withdraw,
    /// Nothing can be done before.
    Learn,
    Announce,
    Refresh,
    /// Services in which only what a crash has left may be.
    Sweep,
}

impl Ledger {
    /// Nothing is known yet. `owner` is the value of [`meta::OWNER`] in what is of this host.
    pub fn new(owner: String, interval: Duration) -> Self {
        Self {
            owner,
            interval,
            wanted: BTreeMap::new(),
            leaving: false,
            list: Asking::default(),
            services: BTreeMap::new(),
            instances: BTreeMap::new(),
            listed: false,
        }
    }

    /// From now on this is what has to be there.
    pub fn want(&mut self, wanted: BTreeMap<Key, Wanted>) {
        for (key, now) in &wanted {
            if self.wanted.get(key) != Some(now)
                && let Some(slot) = self.instances.get_mut(key)
            {
                // Something else than what failed.
                slot.not_before = Duration::ZERO;
            }
        }
        self.wanted = wanted;
    }

    /// From now on everything is to go.
    pub fn leave(&mut self) {
        self.want(BTreeMap::new());
        self.leaving = true;
        self.instances.values_mut().for_each(|slot| slot.not_before = Duration::ZERO);
    }

    /// Whether everything is gone, as far as is known.
    pub fn is_gone(&self) -> bool {
        self.instances.values().all(|slot| slot.has.is_none() && !slot.under_way)
    }

    /// Instances of this host that are there as they have to be.
    pub fn count(&self) -> usize {
        let has = |key: &Key| self.instances.get(key).and_then(|slot| slot.has.as_ref());
        let there = |(key, wanted): &(&Key, &Wanted)| has(key).is_some_and(|has| has.attributes == wanted.attributes);
        self.wanted.iter().filter(there).count()
    }

    /// Services in which something has to be, and which are not there.
    pub fn missing(&self) -> BTreeSet<Arc<str>> {
        let names = self.wanted.iter().filter(|(_, wanted)| wanted.ready).map(|((name, _), _)| name);
        names.filter(|name| self.listed && !self.services.contains_key(*name)).cloned().collect()
    }

    /// Whether nothing failed, and nothing is left to be done but looking again.
    pub fn is_settled(&self) -> bool {
        let waits = |(_, rank, _): &(Duration, Rank, Call)| matches!(rank, Rank::Refresh | Rank::Sweep);
        let ours = |name: &Arc<str>| self.wanted.keys().chain(self.instances.keys()).any(|(of, _)| of == name);
        let well = |(name, known): (&Arc<str>, &Known)| known.look.failures == 0 || known.looked && !ours(name);
        let asked = self.list.failures == 0 && self.services.iter().all(well);
        asked && self.instances.values().all(|slot| !slot.under_way) && self.pending().all(|it| waits(&it))
    }

    /// The service that a call is about.
    pub fn service(&self, call: &Call) -> Option<&Service> {
        let name = match call {
            Call::List => return None,
            Call::Look(name) => name,
            Call::Register((name, _), _) | Call::Deregister((name, _)) | Call::Tell((name, _), _) => name,
        };
        self.services.get(name).map(|known| &known.service)
    }

    /// When the next request is due; `None`: not before an answer or something new that is wanted.
    pub fn next(&self) -> Option<Duration> {
        self.pending().map(|(due, ..)| due).min()
    }

    /// The request that is to be made now, and is under way from now on.
    pub fn take(&mut self, now: Duration) -> Option<Call> {
        let due = self.pending().filter(|(due, ..)| *due <= now);
        let (_, _, call) = due.min_by_key(|(due, rank, _)| (*rank, *due))?;
        match &call {
            Call::List => self.list.under_way = Some(now),
            Call::Look(name) => {
                if let Some(known) = self.services.get_mut(name) {
                    known.look.under_way = Some(now);
                }
            }
            Call::Register(key, _) | Call::Deregister(key) | Call::Tell(key, _) => {
                self.instances.entry(key.clone()).or_default().under_way = true;
            }
        }
        Some(call)
    }

    /// Everything that has to be done some time, and when at the earliest.
    fn pending(&self) -> impl Iterator<Item = (Duration, Rank, Call)> {
        let keys: BTreeSet<&Key> = self.wanted.keys().chain(self.instances.keys()).collect();
        let changes = keys.into_iter().filter_map(|key| self.change(key));
        let learn = (!self.leaving).then(|| self.questions()).into_iter().flatten();
        changes.chain(learn)
    }

    fn questions(&self) -> impl Iterator<Item = (Duration, Rank, Call)> {
        let list_rank = if self.listed { Rank::Refresh } else { Rank::Learn };
        let list = self.list.when().map(|due| (due, list_rank, Call::List));
        let ours: BTreeSet<&Arc<str>> = self.wanted.keys().chain(self.instances.keys()).map(|(name, _)| name).collect();
        let look = move |(name, known): (&Arc<str>, &Known)| {
            let due = known.look.when()?;
            let rank = match (known.looked, ours.contains(name)) {
                (false, true) => Rank::Learn,
                (false, false) => Rank::Sweep,
                (true, true) => Rank::Refresh,
                // Nobody but this agent puts anything of this host there.
                (true, false) => return None,
            };
            Some((due, rank, Call::Look(name.clone())))
        };
        list.into_iter().chain(self.services.iter().filter_map(look))
    }

    fn aim(&self, key: &Key) -> Aim<'_> {
        let Some(known) = self.services.get(&key.0).filter(|known| known.looked) else { return Aim::Unknown };
        let there = self.instances.get(key).is_some_and(|slot| slot.has.is_some());
        match self.wanted.get(key) {
            Some(Wanted { attributes, ready: true }) => Aim::There { attributes, usable: true },
            // What was never ready is nobody's to see; what was is told to be ill, where that can be told.
            Some(Wanted { attributes, ready: false }) if there && known.service.health => {
                Aim::There { attributes, usable: false }
            }
            Some(_) | None => Aim::Gone,
        }
    }

    /// What has to be done about an instance.
    fn change(&self, key: &Key) -> Option<(Duration, Rank, Call)> {
        let slot = self.instances.get(key);
        if slot.is_some_and(|slot| slot.under_way) {
            return None;
        }
        let due = slot.map_or(Duration::ZERO, |slot| slot.not_before);
        let has = slot.and_then(|slot| slot.has.as_ref());
        let health = self.services.get(&key.0).is_some_and(|known| known.service.health);
        match (self.aim(key), has) {
            (Aim::Gone, Some(_)) => Some((due, Rank::Withdraw, Call::Deregister(key.clone()))),
            (Aim::There { usable, .. }, Some(has)) if health && has.usable != usable => {
                let rank = if usable { Rank::Announce } else { Rank::Withdraw };
                Some((due, rank, Call::Tell(key.clone(), usable)))
            }
            (Aim::There { attributes, usable }, has) if has.is_none_or(|has| has.attributes != *attributes) => {
                let mut attributes = attributes.clone();
                if !usable {
                    attributes.insert(attribute::FIRST_HEALTH.to_owned(), attribute::UNHEALTHY.to_owned());
                }
                Some((due, Rank::Announce, Call::Register(key.clone(), attributes)))
            }
            (Aim::There { .. } | Aim::Gone | Aim::Unknown, _) => None,
        }
    }

    /// The services that are there.
    pub fn listed(&mut self, services: BTreeMap<String, Service>, now: Duration) {
        self.list.answered(now + self.interval);
        self.listed = true;
        let mut before = std::mem::take(&mut self.services);
        for (name, service) in services {
            let name: Arc<str> = name.into();
            let fresh = || Known { service: service.clone(), look: Asking::default(), looked: false };
            // One that was made anew is another one.
            let known = before.remove(&name).filter(|known| known.service.id == service.id);
            let known = known.map_or_else(fresh, |known| Known { service: service.clone(), ..known });
            self.services.insert(name, known);
        }
        // A service cannot go before its instances.
        let there = |key: &Key, slot: &Slot| slot.under_way || self.services.contains_key(&key.0);
        self.instances.retain(|key, slot| there(key, slot));
    }

    /// What a service has. Returns what Cloud Map has taken and lost, with its name of the registration.
    pub fn looked(&mut self, name: &Arc<str>, instances: Vec<Instance>, now: Duration) -> Vec<(String, String)> {
        let Some(known) = self.services.get_mut(name) else { return Vec::new() };
        // The answer may be as old as the question.
        let asked = known.look.under_way.unwrap_or(now);
        known.look.answered(now + self.interval);
        known.looked = true;
        let ours = |it: &Instance| it.attributes.get(meta::OWNER) == Some(&self.owner);
        let mut seen: BTreeMap<Key, Instance> =
            instances.into_iter().filter(ours).map(|it| ((name.clone(), it.id.clone()), it)).collect();
        for key in seen.keys() {
            self.instances.entry(key.clone()).or_default();
        }
        let mut lost = Vec::new();
        for (key, slot) in self.instances.iter_mut().filter(|((of, _), _)| of == name) {
            let since = |moment: Option<Duration>, settles: Duration| moment.is_none_or(|at| at + settles <= asked);
            if slot.under_way || !since(slot.changed, self.interval) {
                continue;
            }
            let told = slot.has.as_ref().and_then(|has| has.told);
            let usable = slot.has.as_ref().filter(|_| !since(told, HEALTH_SETTLES)).map(|has| has.usable);
            let has = seen.remove(key).map(|it| {
                let attributes = it.attributes.into_iter().filter(|(key, _)| key != attribute::FIRST_HEALTH);
                let usable = usable.unwrap_or(it.health != Said::Unhealthy);
                Has { attributes: attributes.collect(), usable, told }
            });
            if has.is_none()
                && slot.has.is_some()
                && let Some(operation) = slot.operation.take()
            {
                lost.push((key.1.clone(), operation));
            }
            slot.has = has;
        }
        // What is neither there nor wanted, and has been so for long enough to be believed, is of no interest.
        let (wanted, interval) = (&self.wanted, self.interval);
        self.instances.retain(|key, slot| {
            let fresh = slot.changed.is_some_and(|at| at + interval > asked);
            key.0 != *name || slot.under_way || slot.has.is_some() || wanted.contains_key(key) || fresh
        });
        lost
    }

    /// A registration was taken; `operation` is Cloud Map's name of it.
    pub fn registered(
        &mut self,
        key: &Key,
        attributes: BTreeMap<String, String>,
        operation: Option<String>,
        now: Duration,
    ) {
        let slot = self.instances.entry(key.clone()).or_default();
        slot.done();
        let mut attributes = attributes;
        let first = attributes.remove(attribute::FIRST_HEALTH).is_none();
        let (usable, told) = slot.has.take().map_or((first, None), |has| (has.usable, has.told));
        slot.has = Some(Has { attributes, usable, told });
        slot.changed = Some(now);
        slot.operation = operation;
    }

    /// It was taken back, or was not there.
    pub fn deregistered(&mut self, key: &Key, now: Duration) {
        let slot = self.instances.entry(key.clone()).or_default();
        slot.done();
        slot.has = None;
        slot.changed = Some(now);
        slot.operation = None;
    }

    /// Its health was told.
    pub fn told(&mut self, key: &Key, usable: bool, now: Duration) {
        let slot = self.instances.entry(key.clone()).or_default();
        slot.done();
        if let Some(has) = &mut slot.has {
            has.usable = usable;
            has.told = Some(now);
        }
    }

    /// There was no answer, or none that helps. See [`Failure`].
    pub fn failed(&mut self, call: &Call, failure: Failure, now: Duration, draw: u32) {
        let Failure { general, heard } = failure;
        let again = |failures: u32| if general { now } else { now + back_off(failures, draw) };
        match call {
            Call::List => self.list.failed(&again),
            Call::Look(name) => {
                if let Some(known) = self.services.get_mut(name) {
                    known.look.failed(&again);
                }
            }
            Call::Register(key, _) | Call::Deregister(key) | Call::Tell(key, _) => {
                let slot = self.instances.entry(key.clone()).or_default();
                slot.under_way = false;
                slot.not_before = again(slot.failures);
                slot.failures = slot.failures.saturating_add(1);
                if heard && matches!(call, Call::Register(..)) && slot.has.is_none() {
                    // It is made again, and taken back in the end.
                    slot.has = Some(Has { attributes: BTreeMap::new(), usable: true, told: None });
                    slot.changed = Some(now);
                }
            }
        }
    }

    /// What a call was about is not there: which services are has to be asked.
    pub fn gone(&mut self, call: &Call, now: Duration, draw: u32) {
        self.failed(call, Failure { general: false, heard: false }, now, draw);
        self.list.due = self.list.due.min(now);
        if let Call::Tell(key, _) = call
            && let Some(slot) = self.instances.get_mut(key)
        {
            slot.has = None;
            slot.changed = Some(now);
        }
    }
}

impl Asking {
    fn when(&self) -> Option<Duration> {
        self.under_way.is_none().then_some(self.due)
    }

    fn answered(&mut self, again: Duration) {
        *self = Self { under_way: None, due: again, failures: 0 };
    }

    fn failed(&mut self, again: &impl Fn(u32) -> Duration) {
        self.under_way = None;
        self.due = again(self.failures);
        self.failures = self.failures.saturating_add(1);
    }
}

impl Slot {
    fn done(&mut self) {
        self.under_way = false;
        self.failures = 0;
        self.not_before = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests;
