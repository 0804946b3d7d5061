//! Real servers on loopback, and the turn from probes to the next snapshot and back.

use std::{
    convert::Infallible,
    net::Ipv4Addr,
    sync::atomic::{AtomicU16, Ordering},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use mesh_core::{
    config::{Enrol, VipRanges},
    merge::{self, Merged},
    model::{OnAgentDeath, TlsMode},
    task::{Container, NetworkMode},
};
use tokio::{net::TcpListener, time::timeout};

use super::*;
use crate::{proxy::places::Home, state};

/// Far more than any step needs, so that only lost news fails.
const PATIENCE: Duration = Duration::from_secs(10);

/// A host with one task in host mode, whose port is on loopback.
struct Host {
    tasks: Arc<watch::Sender<Arc<Vec<Task>>>>,
    /// What the snapshot says of the task's first port.
    health: watch::Receiver<Option<Health>>,
    ports: watch::Receiver<Vec<LocalPort>>,
    stops: mpsc::Receiver<Stop>,
    _running: JoinSet<()>,
}

fn task(id: &str, ports: &[u16], labels: &[(&str, &str)]) -> Task {
    Task {
        id: id.parse().unwrap(),
        cluster: None,
        family: "world".into(),
        mode: NetworkMode::Host,
        phase: Phase::Running,
        containers: vec![Container {
            id: id.repeat(32),
            name: "world".into(),
            exposed: ports.to_vec(),
            published: Vec::new(),
            cgroup: None,
            pid: Some(1),
            health: None,
        }],
        address: None,
        netns: None,
        labels: labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
    }
}

impl Host {
    /// The tasks start now, or had started before the agent.
    fn with(first: Vec<Task>, presumed: bool) -> Self {
        Self::of(Readiness::default(), first, presumed)
    }

    fn of(readiness: Readiness, first: Vec<Task>, presumed: bool) -> Self {
        let (publisher, published) = state::publish();
        let (tasks, observed) = watch::channel(Arc::new(if presumed { first.clone() } else { Vec::new() }));
        let tasks = Arc::new(tasks);
        let (gate_sender, mut gate) = watch::channel(Gate::default());
        let probed = gate.clone();
        let (stop, stops) = mpsc::channel(4);
        let (armed_sender, armed) = watch::channel(None);
        let (told, health) = watch::channel(None);
        let namespaces = Arc::new(Namespaces::unmarked());
        let mut running = JoinSet::new();
        let sources = Sources { readiness, published, tasks: observed.clone(), namespaces: namespaces.clone(), armed };
        let (ports_sender, ports) = watch::channel(Vec::new());
        running.spawn(run(sources, Listeners { gate: gate_sender, ports: ports_sender, stop }));
        let mut seen = observed;
        running.spawn(async move {
            let enrol =
                Enrol { default: true, exclude: Vec::new(), tls: TlsMode::Strict, on_agent_death: OnAgentDeath::Open };
            let vips = VipRanges { v4: "240.240.0.0/16".parse().unwrap(), v6: "fd65::/96".parse().unwrap() };
            let mut merged = Merged::default();
            loop {
                let now = gate.borrow_and_update().clone();
                let tasks = seen.borrow_and_update().clone();
                for task in tasks.iter() {
                    namespaces.put(task.id.clone(), Home::Host);
                }
                let sources = merge::Sources {
                    sets: &[],
                    tasks,
                    gate: &now,
                    enrol: &enrol,
                    cluster: &"demo".parse().unwrap(),
                    trust_domain: &"t".parse().unwrap(),
                    host: Ipv4Addr::LOCALHOST.into(),
                    tunnel: (Ipv4Addr::LOCALHOST, 15008).into(),
                    zone: None,
                    vips: &vips,
                };
                merged = merge::merge(&merged, &sources);
                publisher.replace(merged.snapshot.clone());
                armed_sender.send_replace(Some(BTreeSet::new()));
                told.send_replace(served(&merged.snapshot).next().map(|(_, _, _, health)| health));
                tokio::select! {
                    _ = seen.changed() => {}
                    _ = gate.changed() => {}
                }
            }
        });
        if !presumed {
            let (tasks, mut probed) = (tasks.clone(), probed);
            running.spawn(async move {
                probed.wait_for(|gate| *gate != Gate::Open).await.unwrap();
                tasks.send_replace(Arc::new(first));
            });
        }
        Self { tasks, health, ports, stops, _running: running }
    }

    async fn is(&mut self, wanted: Health) {
        let is = self.health.wait_for(|health| *health == Some(wanted));
        timeout(PATIENCE, is).await.unwrap_or_else(|_| panic!("not {wanted:?}")).unwrap();
    }

    /// What is said of the task's first port; nothing: it is ready.
    async fn says(&mut self, part: &str) {
        let is = self.ports.wait_for(|ports| {
            let said = ports.first().map(|port| port.unready.as_deref().unwrap_or_default());
            said.is_some_and(|said| if part.is_empty() { said.is_empty() } else { said.contains(part) })
        });
        timeout(PATIENCE, is).await.unwrap_or_else(|_| panic!("nobody says `{part}`")).unwrap();
    }

    /// It does not become `other` for some probes' time.
    async fn stays(&mut self, other: Health) {
        let changed = self.health.wait_for(|health| *health == Some(other));
        assert!(timeout(Duration::from_millis(120), changed).await.is_err(), "{other:?}");
    }
}

/// A port that nobody has.
async fn free() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

async fn listen(port: u16) -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap()
}

#[tokio::test]
async fn a_port_that_opens_late_is_published_then() {
    let port = free().await;
    let mut host = Host::with(vec![task("a", &[port], &[])], false);
    host.is(Health::Unhealthy).await;
    host.stays(Health::Healthy).await;
    host.says("it has not been ready yet: no connection to 127.0.0.1:").await;
    let listener = listen(port).await;
    host.is(Health::Healthy).await;
    host.says("").await;
    // Asked once, and never again.
    listener.accept().await.unwrap();
    assert!(timeout(Duration::from_millis(100), listener.accept()).await.is_err());
    drop(listener);
    host.stays(Health::Unhealthy).await;
    // Another process, which has not opened its port yet.
    let mut again = task("a", &[port], &[]);
    again.containers[0].pid = Some(2);
    host.tasks.send_replace(Arc::new(vec![again]));
    host.is(Health::Unhealthy).await;
    let _listener = listen(port).await;
    host.is(Health::Healthy).await;
}

#[tokio::test]
async fn what_was_in_use_before_the_agent_stays_until_a_probe_fails() {
    let port = free().await;
    let listener = listen(port).await;
    let mut host = Host::with(vec![task("a", &[port], &[])], true);
    host.is(Health::Healthy).await;
    listener.accept().await.unwrap();
    host.stays(Health::Unhealthy).await;
    let mut host = Host::with(vec![task("b", &[free().await], &[])], true);
    host.is(Health::Unhealthy).await;
}

#[tokio::test]
async fn without_a_check_it_is_ready_as_it_runs() {
    let mut host = Host::with(vec![task("a", &[free().await], &[("ecs-mesh.ready", "none")])], false);
    host.is(Health::Healthy).await;
}

/// Answers every request with a status that can be changed.
async fn http(port: u16, status: Arc<AtomicU16>) {
    let listener = listen(port).await;
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let status = status.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let found = request.uri().path() == "/healthz" && request.headers()["user-agent"] == "ecs-mesh/0.1.0";
                let status = if found { status.load(Ordering::Relaxed) } else { 404 };
                let response = Response::builder().status(status).body(Full::new(Bytes::from_static(b"said")));
                async move { Ok::<_, Infallible>(response.unwrap()) }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
}

const HTTP: [(&str, &str); 4] = [
    ("ecs-mesh.ready", "http"),
    ("ecs-mesh.ready.path", "/healthz"),
    ("ecs-mesh.ready.interval", "100ms"),
    ("ecs-mesh.ready.failures", "2"),
];

#[tokio::test]
async fn an_http_check_is_asked_all_its_life() {
    let (port, status) = (free().await, Arc::new(AtomicU16::new(503)));
    http(port, status.clone()).await;
    let mut host = Host::with(vec![task("a", &[port], &HTTP)], false);
    host.is(Health::Unhealthy).await;
    host.stays(Health::Healthy).await;
    for (code, health) in [(204, Health::Healthy), (500, Health::Unhealthy), (200, Health::Healthy)] {
        status.store(code, Ordering::Relaxed);
        host.is(health).await;
    }
}

#[tokio::test]
async fn one_port_may_speak_for_the_whole_task() {
    let (port, status) = (free().await, Arc::new(AtomicU16::new(503)));
    http(port, status.clone()).await;
    // Nobody need listen on the port that is served.
    let served = free().await;
    let number = port.to_string();
    let labels = [&HTTP[..], &[("ecs-mesh.ready.port", number.as_str())]].concat();
    let mut host = Host::with(vec![task("a", &[served], &labels)], false);
    host.stays(Health::Healthy).await;
    status.store(200, Ordering::Relaxed);
    host.is(Health::Healthy).await;
}

#[tokio::test]
async fn a_grpc_server_says_whether_it_is_serving() {
    let (port, serving) = (free().await, Arc::new(AtomicU16::new(2)));
    let listener = listen(port).await;
    let answer = serving.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                    let mut body = respond.send_response(Response::new(()), false).unwrap();
                    let status = u8::try_from(answer.load(Ordering::Relaxed)).unwrap();
                    body.send_data(vec![0, 0, 0, 0, 2, 8, status].into(), false).unwrap();
                    let trailers = http::HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
                    body.send_trailers(trailers).unwrap();
                }
            });
        }
    });
    let labels = [("ecs-mesh.ready", "grpc"), ("ecs-mesh.ready.interval", "100ms"), ("ecs-mesh.ready.failures", "1")];
    let mut host = Host::with(vec![task("a", &[port], &labels)], false);
    host.stays(Health::Healthy).await;
    for (status, health) in [(1, Health::Healthy), (2, Health::Unhealthy), (1, Health::Healthy)] {
        serving.store(status, Ordering::Relaxed);
        host.is(health).await;
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_not_ready() {
    let port = free().await;
    let listener = listen(port).await;
    let labels = [("ecs-mesh.ready", "http"), ("ecs-mesh.ready.timeout", "20ms")];
    let mut host = Host::with(vec![task("a", &[port], &labels)], false);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(timeout(PATIENCE, listener.accept()).await.unwrap().unwrap());
    }
    host.stays(Health::Healthy).await;
}

#[tokio::test]
async fn an_ill_task_is_stopped_while_another_serves() {
    let (well, ill) = (free().await, free().await);
    let _listener = listen(well).await;
    let default = Settings { stop_after: Some(Duration::from_millis(100)), ..Settings::default() };
    let readiness = Readiness { default, ..Readiness::default() };
    let tasks = vec![task("a", &[well], &[]), task("b", &[ill], &[]), task("c", &[ill], &[])];
    let mut host = Host::of(readiness, tasks, false);
    let first = timeout(PATIENCE, host.stops.recv()).await.unwrap().unwrap();
    assert_eq!((first.task.as_str(), first.container), ("b", "b".repeat(32)));
    // The next one waits until that is gone.
    assert!(timeout(STOP_LOOK * 2, host.stops.recv()).await.is_err());
    host.tasks.send_replace(Arc::new(vec![task("a", &[well], &[]), task("c", &[ill], &[])]));
    assert_eq!(timeout(PATIENCE, host.stops.recv()).await.unwrap().unwrap().task.as_str(), "c");
    // Nobody else serves.
    host.tasks.send_replace(Arc::new(vec![task("d", &[ill], &[])]));
    assert!(timeout(STOP_LOOK * 2, host.stops.recv()).await.is_err());
}
