//! One record per connection or request: counted and logged together when it is dropped, so that no path forgets.
//!
//! A reader of standard output that stalls costs lines, which are counted, and never traffic. Must not know how the connection is carried.

use std::{
    cell::RefCell,
    io::{self, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use http::{Method, Uri};
use mesh_common::refusal::Refusal;
use mesh_core::{
    id::{ServiceName, SpiffeId, TaskId},
    model::EndpointId,
};
use prometheus_client::metrics::counter::Counter;
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    Telemetry, fields,
    lines::Lines,
    metrics::{Direction, Link, LinkKey, Outcome, Protocol},
};

thread_local! {
    /// A line in the making.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Takes finished lines. Cheap to clone.
#[derive(Clone)]
pub struct AccessLog {
    sink: Sink,
    lost: Counter,
}

#[derive(Clone)]
enum Sink {
    Off,
    Lines(Lines),
    #[cfg(test)]
    Channel(std::sync::mpsc::Sender<Vec<u8>>),
}

/// Payload bytes that have passed, seen from the source. Shared with whoever moves them.
#[derive(Debug, Default)]
pub struct Counts {
    pub sent: AtomicU64,
    pub received: AtomicU64,
}

/// Who connected, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Source {
    pub addr: Option<SocketAddr>,
    pub task: Option<TaskId>,
    pub service: Option<ServiceName>,
    pub id: Option<SpiffeId>,
}

/// Where it went, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Destination {
    pub addr: Option<SocketAddr>,
    pub service: Option<ServiceName>,
    pub port: Option<u16>,
    pub endpoint: Option<EndpointId>,
    pub task: Option<TaskId>,
    pub id: Option<SpiffeId>,
    pub agent: Option<SocketAddr>,
}

/// What was asked, for HTTP.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    /// Only its path is logged.
    pub uri: Uri,
}

/// The record of one connection or request, from its beginning until it is dropped.
pub struct Access {
    telemetry: Telemetry,
    time: SystemTime,
    began: Instant,
    pub direction: Direction,
    pub protocol: Protocol,
    pub src: Source,
    pub dst: Destination,
    /// Of few connections, so it takes no room in the others' records.
    pub request: Option<Box<Request>>,
    pub status: Option<u16>,
    /// What a gRPC server said of the call.
    pub grpc_status: Option<u16>,
    pub refusal: Option<Refusal>,
    /// How it ended where it was not refused. `Aborted` until somebody says otherwise: a record that is dropped
    /// half-way belongs to a connection that was.
    pub outcome: Outcome,
    pub tries: u32,
    /// Known to whoever keeps metric handles; looked up otherwise.
    pub link: Option<Arc<Link>>,
    pub counts: Arc<Counts>,
    /// How long it took, where somebody else has measured it.
    pub took: Option<Duration>,
    discarded: bool,
}

impl AccessLog {
    /// Lines are written to `writer` by a thread that lives until the last handle is dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn to(writer: impl Write + Send + 'static, lost: Counter) -> io::Result<Self> {
        Ok(Self { sink: Sink::Lines(Lines::to("access-log", writer)?), lost })
    }

    /// Lines are received from the channel, one by one.
    #[cfg(test)]
    pub(crate) fn channel() -> (Self, std::sync::mpsc::Receiver<Vec<u8>>) {
        let (lines, queue) = std::sync::mpsc::channel();
        (Self { sink: Sink::Channel(lines), lost: Counter::default() }, queue)
    }

    /// No lines at all.
    pub fn off() -> Self {
        Self { sink: Sink::Off, lost: Counter::default() }
    }

    /// Waits until all lines have been written, or for `limit`.
    pub fn flush(&self, limit: Duration) {
        if let Sink::Lines(lines) = &self.sink {
            lines.flush(limit);
        }
    }

    fn line(&self, access: &Access) {
        let taken = match &self.sink {
            Sink::Off => return,
            Sink::Lines(lines) => SCRATCH.with_borrow_mut(|line| {
                line.clear();
                written(line, access) && lines.push(line)
            }),
            #[cfg(test)]
            Sink::Channel(lines) => {
                let mut line = Vec::new();
                written(&mut line, access) && lines.send(line).is_ok()
            }
        };
        if !taken {
            self.lost.inc();
        }
    }
}

fn written(line: &mut Vec<u8>, access: &Access) -> bool {
    let written = serde_json::to_writer(&mut *line, access).is_ok();
    line.push(b'\n');
    written
}

impl Counts {
    /// Adds to what the source has sent.
    pub fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Adds to what the source has received.
    pub fn add_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Access {
    /// Begins a record now.
    pub fn begin(
        telemetry: &Telemetry,
        direction: Direction,
        protocol: Protocol,
        src: Source,
        dst: Destination,
    ) -> Self {
        Self {
            telemetry: telemetry.clone(),
            time: SystemTime::now(),
            began: Instant::now(),
            direction,
            protocol,
            src,
            dst,
            request: None,
            status: None,
            grpc_status: None,
            refusal: None,
            outcome: Outcome::Aborted,
            tries: 0,
            link: None,
            counts: Arc::default(),
            took: None,
            discarded: false,
        }
    }

    /// How long it has been going on.
    pub fn elapsed(&self) -> Duration {
        self.took.unwrap_or_else(|| self.began.elapsed())
    }

    /// Neither counts nor logs it: its connection is told of by other records, one per request.
    pub fn discard(mut self) {
        self.discarded = true;
    }

    /// The pair of ends that it is counted under.
    pub fn link_key(&self) -> LinkKey {
        LinkKey {
            direction: self.direction,
            src_service: self.src.service.clone(),
            src_task: self.src.task.clone(),
            dst_service: self.dst.service.clone(),
            dst_task: self.dst.task.clone(),
        }
    }

    fn settled(&self) -> Outcome {
        if self.refusal.is_some() { Outcome::Refused } else { self.outcome }
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        if self.discarded {
            return;
        }
        let link = self.link.take().unwrap_or_else(|| self.telemetry.metrics.link(&self.link_key()));
        let sent = self.counts.sent.load(Ordering::Relaxed);
        let received = self.counts.received.load(Ordering::Relaxed);
        let took = self.elapsed();
        self.took = Some(took);
        link.bytes(sent, received);
        match self.protocol {
            Protocol::Tcp => link.connection(self.settled(), took),
            Protocol::Http | Protocol::Http2 | Protocol::Grpc => link.request(self.status, took),
        }
        if let Some(refusal) = self.refusal {
            link.refused(refusal);
        }
        self.telemetry.access.line(self);
    }
}

impl Serialize for Access {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        fn put<M: serde::ser::SerializeMap>(
            map: &mut M,
            key: &'static str,
            value: Option<impl std::fmt::Display>,
        ) -> Result<(), M::Error> {
            match value {
                Some(value) => map.serialize_entry(key, &Shown(value)),
                None => Ok(()),
            }
        }
        let mut map = serializer.serialize_map(None)?;
        put(&mut map, fields::TIME, OffsetDateTime::from(self.time).format(&Rfc3339).ok())?;
        map.serialize_entry(fields::DIRECTION, self.direction.label())?;
        map.serialize_entry(fields::PROTOCOL, self.protocol.label())?;
        put(&mut map, fields::SRC_ADDR, self.src.addr)?;
        put(&mut map, fields::SRC_TASK, self.src.task.as_ref())?;
        put(&mut map, fields::SRC_SERVICE, self.src.service.as_ref())?;
        put(&mut map, fields::SRC_ID, self.src.id.as_ref())?;
        put(&mut map, fields::DST_ADDR, self.dst.addr)?;
        put(&mut map, fields::DST_SERVICE, self.dst.service.as_ref())?;
        if let Some(port) = self.dst.port {
            map.serialize_entry(fields::DST_PORT, &port)?;
        }
        put(&mut map, fields::DST_ENDPOINT, self.dst.endpoint)?;
        put(&mut map, fields::DST_TASK, self.dst.task.as_ref())?;
        put(&mut map, fields::DST_ID, self.dst.id.as_ref())?;
        put(&mut map, fields::DST_AGENT, self.dst.agent)?;
        if let Some(request) = &self.request {
            map.serialize_entry(fields::METHOD, request.method.as_str())?;
            map.serialize_entry(fields::PATH, request.uri.path())?;
        }
        if let Some(status) = self.status {
            map.serialize_entry(fields::STATUS, &status)?;
        }
        if let Some(status) = self.grpc_status {
            map.serialize_entry(fields::GRPC_STATUS, &status)?;
        }
        map.serialize_entry(fields::BYTES_SENT, &self.counts.sent.load(Ordering::Relaxed))?;
        map.serialize_entry(fields::BYTES_RECEIVED, &self.counts.received.load(Ordering::Relaxed))?;
        let micros = u32::try_from(self.elapsed().as_micros()).unwrap_or(u32::MAX);
        map.serialize_entry(fields::DURATION_MS, &(f64::from(micros) / 1000.0))?;
        map.serialize_entry(fields::TRIES, &self.tries)?;
        map.serialize_entry(fields::OUTCOME, self.settled().label())?;
        if let Some(refusal) = self.refusal {
            map.serialize_entry(fields::REFUSAL, &(refusal as u32))?;
            map.serialize_entry(fields::REFUSAL_LABEL, refusal.label())?;
        }
        map.end()
    }
}

/// Serialised as its `Display` shows it, without a string in between.
struct Shown<T>(T);

impl<T: std::fmt::Display> Serialize for Shown<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn a_dropped_record_is_logged_and_counted_once() {
        let (access, lines) = AccessLog::channel();
        let telemetry = Telemetry { metrics: Arc::new(Metrics::new()), access };
        let src = Source {
            addr: Some(([10, 0, 0, 1], 40000).into()),
            task: Some("t1".parse().expect("valid")),
            service: Some("web".parse().expect("valid")),
            id: Some("spiffe://demo.mesh/ns/demo/sa/web".parse().expect("valid")),
        };
        let dst = Destination {
            service: Some("world".parse().expect("valid")),
            port: Some(80),
            endpoint: Some(EndpointId::of(([10, 0, 0, 2], 8080).into())),
            ..Destination::default()
        };
        let mut access = Access::begin(&telemetry, Direction::Outbound, Protocol::Http, src, dst);
        access.request = Some(Box::new(Request { method: Method::GET, uri: "/a/b?secret=1".parse().expect("valid") }));
        access.status = Some(503);
        access.refusal = Some(Refusal::NoEndpoint);
        access.counts.add_received(7);
        drop(access);
        let line: serde_json::Value = serde_json::from_slice(&lines.try_recv().expect("one line")).expect("JSON");
        let text = |key: &str| line[key].as_str().unwrap_or_else(|| panic!("{key} in {line}")).to_owned();
        assert_eq!(text("direction"), "outbound");
        assert_eq!(text("src.task"), "t1");
        assert_eq!(text("dst.service"), "world");
        assert_eq!(text("dst.endpoint"), "10.0.0.2:8080");
        assert_eq!(text("http.path"), "/a/b", "the query stays out of the log");
        assert_eq!(text("refusal.label"), "no_endpoint");
        assert_eq!(text("outcome"), "refused");
        assert_eq!((line["refusal"].as_u64(), line["http.status"].as_u64()), (Some(2), Some(503)));
        assert_eq!(line["bytes_received"].as_u64(), Some(7));
        assert!(lines.try_recv().is_err(), "exactly one line");
        let text = telemetry.metrics.encode();
        assert!(text.contains(r#"mesh_requests_total{direction="outbound",src_service="web",src_task="t1",dst_service="world",dst_task="",status="5xx"} 1"#), "{text}");
        assert!(text.contains(r#"refusal="no_endpoint""#), "{text}");
    }
}
