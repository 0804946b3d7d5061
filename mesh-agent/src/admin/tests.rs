//! Both servers on real sockets: a raw client, because a good one would not send what has to be refused.

use std::{os::unix::fs::PermissionsExt as _, path::Path};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    sync::oneshot,
    task::JoinHandle,
};

use super::*;
use crate::{api::tests as sample, state};

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-admin-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the temporary directory is writable");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).expect("it was made by this test");
    }
}

struct Running {
    socket: PathBuf,
    metrics: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    // Last: the directory outlives the server.
    _scratch: Scratch,
}

fn handles() -> Handles {
    let (publisher, snapshot) = state::publish();
    publisher.replace(sample::snapshot());
    let example = config::parse(&config::example()).expect("the example parses");
    Handles {
        snapshot,
        status: Arc::new(sample::status),
        metrics: Arc::new(|| "mesh_up 1\n# EOF\n".into()),
        ready: Arc::new(|| Err(vec!["docker is not connected".into(), "no certificate yet".into()])),
        load: Arc::new(|_| Load {
            failures: 0,
            ejected_until: Duration::ZERO,
            ..sample::load(&EndpointId::of(([10, 0, 0, 1], 80).into()))
        }),
        now: Arc::new(|| Duration::from_secs(5)),
        draw: Arc::new(|| 0x1234_5678_9abc_def0),
        dns: example.dns,
        vips: example.vip,
    }
}

fn config(socket: &Path) -> config::Admin {
    config::Admin { socket: socket.into(), metrics: ([127, 0, 0, 1], 0).into() }
}

async fn start(name: &str) -> Running {
    start_with(name, LIMITS).await
}

async fn start_with(name: &str, limits: Limits) -> Running {
    let scratch = Scratch::new(name);
    let socket = scratch.0.join("run/admin.sock");
    let admin = Admin::bind(&config(&socket), handles()).await.expect("both listeners open");
    let admin = Admin { limits, ..admin };
    let metrics = admin.metrics_addr().expect("it is bound");
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(admin.run(async { drop(stopped.await) }));
    Running { socket, metrics, stop, task, _scratch: scratch }
}

impl Running {
    async fn admin(&self, request: &str) -> String {
        exchange(UnixStream::connect(&self.socket).await.expect("the server listens"), request).await
    }

    async fn metrics(&self, request: &str) -> String {
        exchange(TcpStream::connect(self.metrics).await.expect("the server listens"), request).await
    }

    async fn stop(self) {
        self.stop.send(()).expect("the server runs");
        self.task.await.expect("the server does not panic");
        assert!(!self.socket.exists(), "the socket file goes with the server");
    }
}

/// Everything that the server says until it closes.
async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.expect("the server reads");
    let mut answer = String::new();
    // A reset after the answer is as good an end as any.
    drop(stream.read_to_string(&mut answer).await);
    answer
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

fn body<T: serde::de::DeserializeOwned>(answer: &str) -> T {
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no body: {answer}"));
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

#[tokio::test]
async fn documents_are_served() {
    let server = start("documents").await;
    assert_eq!(body::<api::Status>(&server.admin(&get("/v1/status")).await), sample::status());
    let services: api::Services = body(&server.admin(&get("/v1/services")).await);
    assert_eq!(services.services[0].name, "world");
    assert_eq!(services.services[0].ports[0].endpoints.len(), 3);
    server.stop().await;
}

#[tokio::test]
async fn metrics_and_health_are_served() {
    let server = start("metrics").await;
    let answer = server.metrics(&get("/metrics")).await;
    assert_eq!(status(&answer), "200");
    assert!(answer.ends_with("\r\n\r\nmesh_up 1\n# EOF\n"), "{answer}");
    assert!(answer.contains("content-type: application/openmetrics-text"), "{answer}");
    assert_eq!(status(&server.metrics(&get("/healthz")).await), "200");
    let answer = server.metrics(&get("/readyz")).await;
    assert_eq!(status(&answer), "503");
    assert!(answer.ends_with("not ready\ndocker is not connected\nno certificate yet\n"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn explanations_are_served() {
    let server = start("explain").await;
    let explain = async |query: &str| server.admin(&get(&format!("/v1/explain?{query}"))).await;
    // The services' own endpoints: whichever is drawn.
    for to in ["world", "world.mesh", "World:80", "240.240.0.7:80", "240.240.0.7", "%5B::ffff:240.240.0.7%5D:80"] {
        for source in ["web", "web-1", "web-"] {
            let explained: api::Explain = body(&explain(&format!("source={source}&to={to}")).await);
            assert_eq!(explained.question.source, "web-1", "{to}");
            assert_eq!(explained.question.destination, Some(([240, 240, 0, 7], 80).into()), "{to}");
            let api::Verdict::Plan { service, port, .. } = &explained.verdict else { panic!("{explained:?}") };
            assert_eq!((service.as_str(), *port), ("world", 80));
            assert!(explained.reasons.len() > 1, "{explained:?}");
        }
    }
    let refused: api::Explain = body(&explain("source=web&to=world:81").await);
    assert!(matches!(refused.verdict, api::Verdict::Refusal { number: 1, .. }), "{refused:?}");
    let passed: api::Explain = body(&explain("source=web&to=192.0.2.1:443").await);
    assert_eq!(passed.verdict, api::Verdict::Pass);
    let foreign: api::Explain = body(&explain("source=web&to=example.com:443").await);
    assert_eq!((foreign.verdict, foreign.question.destination), (api::Verdict::Pass, None));
    let nobody: api::Explain = body(&explain("source=web&to=nobody.mesh").await);
    assert_eq!(nobody.verdict, api::Verdict::NoSuchName);
    for wrong in ["", "source=web", "source=nobody&to=world", "source=web&to=http://world/", "source=web&to=192.0.2.1"]
    {
        let answer = explain(wrong).await;
        assert_eq!(status(&answer), "400", "{wrong}");
        assert!(!body::<api::Failure>(&answer).remedy.is_empty(), "{wrong}");
    }
    server.stop().await;
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let server = start("paths").await;
    for path in ["/", "/metrics", "/v1/status/", "/v2/status"] {
        let answer = server.admin(&get(path)).await;
        assert_eq!(status(&answer), "404", "{path}");
        assert!(body::<api::Failure>(&answer).error.contains(path));
    }
    assert_eq!(status(&server.metrics(&get("/v1/status")).await), "404");
    let post = |path: &str| format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
    for answer in [server.admin(&post("/v1/status")).await, server.metrics(&post("/metrics")).await] {
        assert_eq!(status(&answer), "405", "{answer}");
        assert!(answer.contains("\r\nallow: GET\r\n"), "{answer}");
    }
    server.stop().await;
}

#[tokio::test]
async fn garbage_ends_its_own_connection_only() {
    let server = start("garbage").await;
    let mut waiting = UnixStream::connect(&server.socket).await.expect("the server listens");
    waiting.write_all(b"GET /v1/status HTTP/1.1\r\n").await.expect("the server reads");
    let huge = format!("GET /v1/status HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(MAX_HEAD));
    for garbage in ["\x16\x03\x01\x00\x05\r\n\r\n", "nonsense\r\n\r\n", huge.as_str()] {
        for answer in [server.admin(garbage).await, server.metrics(garbage).await] {
            assert!(answer.is_empty() || status(&answer).starts_with('4'), "{answer}");
        }
    }
    let answer = exchange(waiting, "Host: x\r\n\r\n").await;
    assert_eq!(status(&answer), "200", "the connection that was open all along is served");
    server.stop().await;
}

#[tokio::test]
async fn silent_connections_hold_their_places_for_a_while_only() {
    let limits = Limits { connections: 2, lifetime: Duration::from_millis(200) };
    let server = start_with("silent", limits).await;
    let since = std::time::Instant::now();
    let silent = [UnixStream::connect(&server.socket).await, UnixStream::connect(&server.socket).await];
    assert!(silent.iter().all(Result::is_ok));
    // It comes after the two, and is answered when they have been cut off.
    assert_eq!(status(&server.admin(&get("/v1/status")).await), "200");
    assert!(since.elapsed() >= limits.lifetime, "there was a place too many: {:?}", since.elapsed());
    server.stop().await;
}

#[tokio::test]
async fn who_holds_the_port_does_not_hold_the_socket() {
    let server = start_with("apart", Limits { connections: 2, lifetime: Duration::from_secs(60) }).await;
    let held = [TcpStream::connect(server.metrics).await, TcpStream::connect(server.metrics).await];
    assert!(held.iter().all(Result::is_ok));
    assert_eq!(status(&server.admin(&get("/v1/status")).await), "200");
    // Else stopping waits for them, for a second.
    drop(held);
    server.stop().await;
}

#[tokio::test]
async fn only_the_owner_may_open_the_socket() {
    let server = start("mode").await;
    let mode = std::fs::metadata(&server.socket).expect("it exists").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    server.stop().await;
}

#[tokio::test]
async fn a_living_servers_socket_is_not_taken() {
    let server = start("living").await;
    let second = Admin::bind(&config(&server.socket), handles()).await;
    assert!(matches!(second, Err(AdminError::Answered { .. })));
    assert_eq!(status(&server.admin(&get("/v1/status")).await), "200", "the first still answers");
    server.stop().await;
}

#[tokio::test]
async fn a_dead_servers_socket_is_replaced_and_a_file_is_not() {
    let scratch = Scratch::new("stale");
    let socket = scratch.0.join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("the directory is writable"));
    assert!(socket.exists(), "a dropped listener leaves its file");
    let admin = Admin::bind(&config(&socket), handles()).await.expect("nobody answers on it");
    drop(admin);
    assert!(!socket.exists());
    std::fs::write(&socket, "precious").expect("the directory is writable");
    assert!(matches!(Admin::bind(&config(&socket), handles()).await, Err(AdminError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&socket).expect("it is still there"), "precious");
}

#[tokio::test]
async fn a_successors_socket_is_left_alone() {
    let scratch = Scratch::new("successor");
    let socket = scratch.0.join("admin.sock");
    let first = Admin::bind(&config(&socket), handles()).await.expect("it is free");
    std::fs::remove_file(&socket).expect("it exists");
    let second = Admin::bind(&config(&socket), handles()).await.expect("it is free again");
    drop(first);
    assert!(socket.exists(), "the file is the second one's");
    drop(second);
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_taken_metrics_port_is_named() {
    let scratch = Scratch::new("taken");
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("loopback has free ports");
    let addr = taken.local_addr().expect("it is bound");
    let config = config::Admin { metrics: addr, ..config(&scratch.0.join("admin.sock")) };
    let Err(error) = Admin::bind(&config, handles()).await else { panic!("the port is taken") };
    assert!(error.to_string().contains(&addr.to_string()), "{error}");
}
