//! Whole connections through the proxy on loopback: listeners that stand for `world:80`, endpoints that are plain
//! sockets, and where two agents are needed, real mTLS between them.

use std::{
    net::SocketAddr,
    sync::{Arc, mpsc::Receiver},
    time::Duration,
};

use mesh_core::{
    addr::Vip,
    id::{SpiffeId, TaskId},
    model::{
        Destination, Endpoint, EndpointId, Health, OnAgentDeath, Protocol, Reach, Service, ServicePort, Snapshot,
        Target, TlsMode, Workload,
    },
    policy::{Effect, Policy, Rule},
    task::NetworkMode,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::{TcpListener, TcpStream},
};

use super::{
    Proxy,
    outbound::{self, Originals, Place, Who},
    places::{Home, Namespaces},
    workers::Workers,
};
use crate::{
    identity::{
        Identities,
        tests::{DAY, ca, id},
    },
    state::{self, Publisher},
    sys::socket::Acceptor,
    telemetry::{Telemetry, access::AccessLog, metrics::Metrics},
    transport::dial::{Dialer, Settings},
};

mod http2;
mod leaving;
mod requests;
mod stalled;
mod streams;
mod two_agents;

/// Where `world:80` is to its callers.
const VIP: &str = "240.240.0.1:80";

pub(super) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("it happens in time")
}

/// An agent with the task `web-1` of service `web`, which calls service `world`.
struct Agent {
    proxy: Arc<Proxy>,
    publisher: Publisher,
    lines: Receiver<Vec<u8>>,
    identities: Identities,
}

impl Agent {
    /// `world` has these endpoints, on this host.
    fn new(protocol: Protocol, endpoints: &[SocketAddr]) -> Self {
        let agent = Self::with(Identities::new(ca("demo.mesh"), DAY));
        agent.publish(snapshot(protocol, endpoints.iter().map(|addr| local(*addr)).collect()));
        agent
    }

    fn with(identities: Identities) -> Self {
        let (publisher, published) = state::publish();
        let (access, lines) = AccessLog::channel();
        let telemetry = Telemetry { metrics: Arc::new(Metrics::new()), access };
        let namespaces = Namespaces::unmarked();
        namespaces.put(task("world-1"), Home::Host);
        let dialer = Dialer::new(identities.clone(), Settings::default()).expect("the bundle is good");
        let proxy = Proxy::new(published, dialer, Arc::new(namespaces), telemetry, Duration::from_secs(2));
        Self { proxy, publisher, lines, identities }
    }

    fn publish(&self, snapshot: Snapshot) {
        self.publisher.replace(snapshot);
    }

    /// A listener that carries `web-1`'s connections to `dst`.
    async fn listen_for(&self, dst: &str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let place =
            Place { netns: 0, who: Who::Task(web()), originals: Originals::Fixed(dst.parse().expect("an address")) };
        tokio::spawn(serve(&self.proxy, listener, place));
        addr
    }

    async fn listen(&self) -> SocketAddr {
        self.listen_for(VIP).await
    }

    /// A connection of `web-1` to `world:80`.
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.listen().await).await.unwrap()
    }

    /// The next access line.
    async fn line(&mut self) -> serde_json::Value {
        let line = soon(async {
            loop {
                match self.lines.try_recv() {
                    Ok(line) => return line,
                    Err(_none_yet) => tokio::time::sleep(Duration::from_millis(2)).await,
                }
            }
        });
        serde_json::from_slice(&line.await).expect("a line is JSON")
    }
}

/// Serves a listener on the calling runtime until the proxy drains.
fn serve(proxy: &Arc<Proxy>, listener: TcpListener, place: Place) -> impl Future<Output = ()> + Send + use<> {
    let listener = Acceptor::new(listener.into_std().unwrap()).unwrap();
    outbound::serve(Workers::here(proxy.clone()), listener, place, proxy.drain.subscribe())
}

fn task(name: &str) -> TaskId {
    name.parse().expect("valid")
}

fn workload(service: &str, number: u32) -> Arc<Workload> {
    Arc::new(Workload {
        number,
        task: task(&format!("{service}-1")),
        service: service.parse().expect("valid"),
        identity: id(service),
        mode: NetworkMode::Bridge,
    })
}

fn web() -> Arc<Workload> {
    workload("web", 1)
}

/// An endpoint of the task `world-1` of this host.
fn local(addr: SocketAddr) -> Endpoint {
    endpoint(addr, Reach::Local { task: task("world-1"), deliver: addr, direct: false }, &id("world"))
}

fn endpoint(addr: SocketAddr, reach: Reach, identity: &SpiffeId) -> Endpoint {
    Endpoint {
        id: EndpointId::of(addr),
        reach,
        identity: Some(identity.clone()),
        health: Health::Healthy,
        weight: 100,
        zone: None,
        attributes: Arc::default(),
    }
}

fn snapshot(protocol: Protocol, endpoints: Vec<Endpoint>) -> Snapshot {
    let name: mesh_core::id::ServiceName = "world".parse().expect("valid");
    let mut endpoints: Vec<_> = endpoints.into_iter().map(Arc::new).collect();
    endpoints.sort_by_key(|endpoint| endpoint.id);
    let mut snapshot = Snapshot { generation: 1, ..Snapshot::default() };
    let vip: SocketAddr = VIP.parse().expect("an address");
    let mut insert = |addr: SocketAddr, number, target| {
        snapshot.by_address.insert(addr.into(), Arc::new(Destination { number, target }));
    };
    insert(vip, 7, Target::Service { service: name.clone(), port: 80 });
    for (number, endpoint) in (8..).zip(&endpoints) {
        let target = Target::Endpoint { service: name.clone(), port: 80, endpoint: endpoint.id };
        insert(endpoint.addr(), number, target);
    }
    let service = Service {
        name: name.clone(),
        vip: Vip { v4: "240.240.0.1".parse().expect("an address"), v6: "fd65::1".parse().expect("an address") },
        ports: vec![ServicePort { id: 7, port: 80, protocol, endpoints }],
        tls: TlsMode::Strict,
        on_agent_death: OnAgentDeath::Open,
        owners: None,
    };
    snapshot.services.insert(name, Arc::new(service));
    for workload in [web(), workload("world", 2)] {
        snapshot.by_number.insert(workload.number, workload.clone());
        snapshot.workloads.insert(workload.task.clone(), workload);
    }
    snapshot
}

/// A policy under which `web` may not call `world`.
fn denying() -> Policy {
    let rule = Rule {
        name: "no-web".into(),
        effect: Effect::Deny,
        from: vec![id("web").to_string()],
        to: vec!["world".parse().expect("valid")],
    };
    Policy { default: Effect::Allow, rules: vec![rule] }
}

/// An address at which nobody listens.
async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A server that handles each connection with `handler`.
async fn server<F>(handler: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(handler(stream));
        }
    });
    addr
}

/// Reads until the text ends with `end`.
async fn until(stream: &mut (impl AsyncRead + Unpin), end: &str) -> String {
    let mut text = Vec::new();
    soon(async {
        while !text.ends_with(end.as_bytes()) {
            match stream.read_u8().await {
                Ok(byte) => text.push(byte),
                Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&text)),
            }
        }
    })
    .await;
    String::from_utf8(text).expect("text")
}

/// Reads to the end.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon(stream.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let step = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(step).take(length).collect()
}
