//! What the stand-in knows of its containers, in the words of Docker's API, and the events about them.
//!
//! Shapes: Docker Engine API 1.41, `ContainerInspect`, `ContainerList`, `SystemEvents`. It must not know processes.

use std::{
    net::Ipv4Addr,
    sync::mpsc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::engine::{ContainerSpec, Network};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Created,
    Running,
    Exited(i32),
}

/// One container.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) spec: ContainerSpec,
    pub(crate) state: State,
    /// Its first process as the lab sees it.
    pub(crate) outer: u32,
    /// The same as the host sees it.
    pub(crate) inner: u32,
    pub(crate) address: Option<Ipv4Addr>,
    /// Container ports and host ports.
    pub(crate) published: Vec<(u16, u16)>,
    pub(crate) netns: String,
    created: Duration,
    started: Duration,
}

/// All containers and what has happened to them.
#[derive(Debug, Default)]
pub(crate) struct Book {
    records: Vec<Record>,
    events: Vec<(Duration, String)>,
    listeners: Vec<mpsc::Sender<String>>,
}

impl Record {
    pub(crate) fn new(id: &str, spec: &ContainerSpec) -> Self {
        Self {
            id: id.to_owned(),
            spec: spec.clone(),
            state: State::Created,
            outer: 0,
            inner: 0,
            address: None,
            published: Vec::new(),
            netns: String::new(),
            created: now(),
            started: Duration::ZERO,
        }
    }

    fn status(&self) -> &'static str {
        match self.state {
            State::Created => "created",
            State::Running => "running",
            State::Exited(_) => "exited",
        }
    }

    fn labels(&self) -> Map<String, Value> {
        self.spec.labels.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect()
    }

    pub(crate) fn summary(&self) -> Value {
        json!({
            "Id": self.id,
            "Names": [format!("/{}", self.spec.name)],
            "Image": self.spec.image,
            "Created": self.created.as_secs(),
            "Labels": self.labels(),
            "State": self.status(),
            "HostConfig": { "NetworkMode": self.network_mode() },
        })
    }

    pub(crate) fn inspect(&self) -> Value {
        let exposed: Map<String, Value> =
            self.spec.ports.iter().map(|port| (format!("{port}/tcp"), json!({}))).collect();
        let binding = |host: &str| json!([{ "HostIp": "", "HostPort": host }]);
        let asked: Map<String, Value> = match self.spec.network {
            Network::Bridge => self.spec.ports.iter().map(|port| (format!("{port}/tcp"), binding("0"))).collect(),
            Network::None | Network::Host | Network::Of(_) => Map::new(),
        };
        let given: Map<String, Value> = self
            .published
            .iter()
            .map(|(port, host)| (format!("{port}/tcp"), json!([{ "HostIp": "0.0.0.0", "HostPort": host.to_string() }])))
            .collect();
        let running = self.state == State::Running;
        let address = self.address.filter(|_| running).map_or_else(String::new, |address| address.to_string());
        let mode = self.network_mode();
        let networks = match self.spec.network {
            Network::Of(_) => json!({}),
            Network::Bridge | Network::None | Network::Host => json!({ mode.as_str(): { "IPAddress": address } }),
        };
        json!({
            "Id": self.id,
            "Name": format!("/{}", self.spec.name),
            "Created": rfc3339(self.created),
            "State": {
                "Status": self.status(),
                "Running": running,
                "Pid": if running { self.inner } else { 0 },
                "ExitCode": if let State::Exited(code) = self.state { code } else { 0 },
                "StartedAt": rfc3339(self.started),
            },
            "Config": {
                "Image": self.spec.image,
                "Cmd": self.spec.command,
                "Labels": self.labels(),
                "ExposedPorts": exposed,
            },
            "HostConfig": {
                "NetworkMode": mode,
                "CgroupParent": self.spec.cgroup_parent,
                "PortBindings": asked,
            },
            "NetworkSettings": {
                "SandboxKey": self.netns,
                "IPAddress": address,
                "Ports": given,
                "Networks": networks,
            },
        })
    }

    fn network_mode(&self) -> String {
        match &self.spec.network {
            Network::Bridge => "bridge".to_owned(),
            Network::None => "none".to_owned(),
            Network::Host => "host".to_owned(),
            Network::Of(other) => format!("container:{other}"),
        }
    }
}

impl Book {
    pub(crate) fn add(&mut self, record: Record) {
        let id = record.id.clone();
        self.records.push(record);
        self.event(&id, "create", &[]);
    }

    pub(crate) fn placed(
        &mut self,
        id: &str,
        outer: u32,
        inner: u32,
        address: Option<Ipv4Addr>,
        published: Vec<(u16, u16)>,
        netns: &str,
    ) {
        self.change(id, |record| {
            (record.outer, record.inner, record.address) = (outer, inner, address);
            record.published = published;
            if record.spec.network.is_own() {
                netns.clone_into(&mut record.netns);
            }
        });
    }

    pub(crate) fn started(&mut self, id: &str) {
        self.change(id, |record| (record.state, record.started) = (State::Running, now()));
        self.event(id, "start", &[]);
    }

    pub(crate) fn ended(&mut self, id: &str, code: i32) {
        self.change(id, |record| record.state = State::Exited(code));
        self.event(id, "die", &[("exitCode", &code.to_string())]);
        self.event(id, "stop", &[]);
    }

    pub(crate) fn removed(&mut self, id: &str) {
        self.event(id, "destroy", &[]);
        self.records.retain(|record| record.id != id);
    }

    /// By id, the beginning of one, or name.
    pub(crate) fn find(&self, id: &str) -> Result<Record> {
        let found = self.records.iter().find(|record| record.id.starts_with(id) || record.spec.name == id);
        found.cloned().with_context(|| format!("no such container: {id}"))
    }

    pub(crate) fn records(&self) -> &[Record] {
        &self.records
    }

    /// Tells everybody who listens.
    pub(crate) fn event(&mut self, id: &str, action: &str, more: &[(&str, &str)]) {
        let Ok(record) = self.find(id) else { return };
        let mut attributes = record.labels();
        attributes.insert("name".to_owned(), record.spec.name.clone().into());
        attributes.insert("image".to_owned(), record.spec.image.clone().into());
        attributes.extend(more.iter().map(|&(key, value)| (key.to_owned(), value.into())));
        let at = now();
        let event = json!({
            "status": action,
            "id": id,
            "from": record.spec.image,
            "Type": "container",
            "Action": action,
            "Actor": { "ID": id, "Attributes": attributes },
            "scope": "local",
            "time": at.as_secs(),
            "timeNano": u64::try_from(at.as_nanos()).unwrap_or(u64::MAX),
        });
        let line = format!("{event}\n");
        self.listeners.retain(|listener| listener.send(line.clone()).is_ok());
        self.events.push((at, line));
    }

    /// Events from `since` on, then all to come.
    pub(crate) fn listen(&mut self, since: Duration) -> mpsc::Receiver<String> {
        let (listener, events) = mpsc::channel();
        for (_, event) in self.events.iter().filter(|(at, _)| *at >= since) {
            // The receiver is here.
            listener.send(event.clone()).ok();
        }
        self.listeners.push(listener);
        events
    }

    fn change(&mut self, id: &str, change: impl FnOnce(&mut Record)) {
        if let Some(record) = self.records.iter_mut().find(|record| record.id == id) {
            change(record);
        }
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A time as Docker writes it; day counts by Howard Hinnant's `civil_from_days`.
fn rfc3339(at: Duration) -> String {
    let (days, second) = (at.as_secs() / 86_400, at.as_secs() % 86_400);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", at.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_docker_does() {
        assert_eq!(rfc3339(Duration::ZERO), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(Duration::new(951_782_400, 5)), "2000-02-29T00:00:00.000000005Z");
        assert_eq!(rfc3339(Duration::from_secs(1_735_689_599)), "2024-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn events_are_told_once_to_each_who_listens_and_the_past_to_who_asks() {
        let spec = ContainerSpec {
            name: "one".to_owned(),
            labels: vec![("key".to_owned(), "value".to_owned())],
            network: Network::Bridge,
            cgroup_parent: "/a".to_owned(),
            ports: vec![80],
            image: "i".to_owned(),
            command: Vec::new(),
            stop_signal: None,
        };
        let mut book = Book::default();
        book.add(Record::new("abc", &spec));
        let (all, new) = (book.listen(Duration::ZERO), book.listen(Duration::MAX));
        book.started("abc");
        let actions = |events: &mpsc::Receiver<String>| -> Vec<String> {
            let parse =
                |line: String| serde_json::from_str::<Value>(&line).expect("an event is JSON")["Action"].to_string();
            events.try_iter().map(parse).collect()
        };
        assert_eq!(actions(&all), ["\"create\"", "\"start\""]);
        assert_eq!(actions(&new), ["\"start\""]);
        let inspect = book.find("ab").expect("by the beginning of its id").inspect();
        assert_eq!(inspect["Config"]["ExposedPorts"]["80/tcp"], json!({}));
        assert_eq!(inspect["State"]["Status"], "running");
    }
}
