//! Two agents on loopback with real mutual TLS: a task of the one calls a task of the other.

use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncWriteExt as _, sync::watch, task::JoinSet};

use super::*;
use crate::{
    proxy::inbound,
    transport::accept::{Acceptance, Arrival, serve},
};

/// The agent in front of an application, and where it takes tunnels.
pub(super) struct Far {
    pub(super) agent: Agent,
    pub(super) tunnels: SocketAddr,
    _drain: watch::Sender<bool>,
}

pub(super) async fn far(identities: Identities, app: SocketAddr) -> Far {
    let agent = Agent::with(identities);
    agent.publish(snapshot(Protocol::Auto, vec![local(app)]));
    let listener = Acceptor::new(TcpListener::bind("127.0.0.1:0").await.unwrap().into_std().unwrap()).unwrap();
    let tunnels = listener.local_addr().unwrap();
    let acceptance = Acceptance {
        presents: Arc::new(|_, _| Some(id("world"))),
        failed: Arc::new(drop),
        handshake_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(1),
    };
    let (drain, draining) = watch::channel(false);
    let proxy = agent.proxy.clone();
    let spawn = move |connections: &mut JoinSet<()>, arrival: Arrival| {
        let proxy = proxy.clone();
        connections.spawn(arrival.run(move |request| inbound::handle(proxy.clone(), request)));
    };
    tokio::spawn(serve(listener, agent.identities.clone(), acceptance, spawn, draining));
    Far { agent, tunnels, _drain: drain }
}

/// An agent that knows `app` behind the other one.
fn near(far: &Far, app: SocketAddr, expect: &str) -> Agent {
    let agent = Agent::with(far.agent.identities.clone());
    let there = endpoint(app, Reach::Tunnel { agent: far.tunnels }, &id(expect));
    agent.publish(snapshot(Protocol::Auto, vec![there]));
    agent
}

async fn echo_server() -> SocketAddr {
    server(|mut stream| async move {
        let (mut reading, mut writing) = stream.split();
        tokio::io::copy(&mut reading, &mut writing).await.unwrap();
        writing.shutdown().await.unwrap();
    })
    .await
}

#[tokio::test]
async fn a_stream_crosses_both_agents_and_both_know_who_speaks() {
    let app = echo_server().await;
    let mut far = far(Identities::new(ca("demo.mesh"), DAY), app).await;
    let mut near = near(&far, app, "world");
    let mut client = near.connect().await;
    let data = noise(3 << 20);
    let sent = [b"\0", &data[..]].concat();
    let (mut reading, mut writing) = client.split();
    let write = async {
        writing.write_all(&sent).await.unwrap();
        writing.shutdown().await.unwrap();
    };
    let ((), received) = soon(async { tokio::join!(write, rest(&mut reading)) }).await;
    assert!(received == sent);
    let (out, inn) = (near.line().await, far.agent.line().await);
    for line in [&out, &inn] {
        assert_eq!((&line["src.service"], &line["dst.service"]), (&"web".into(), &"world".into()), "{line}");
        assert_eq!(line["src.id"], id("web").to_string());
        assert_eq!(line["dst.id"], id("world").to_string());
        assert_eq!(line["bytes_sent"].as_u64(), Some(sent.len() as u64), "{line}");
        assert_eq!((&line["outcome"], &line["protocol"]), (&"ok".into(), &"tcp".into()), "{line}");
    }
    assert_eq!((&out["direction"], &inn["direction"]), (&"outbound".into(), &"inbound".into()));
    assert_eq!((&out["src.task"], &inn["dst.task"]), (&"web-1".into(), &"world-1".into()));
    assert_eq!(out["dst.agent"], far.tunnels.to_string());
}

#[tokio::test]
async fn requests_cross_over_pooled_tunnels() {
    let app = server(|stream| async move {
        let service = hyper::service::service_fn(|_| async {
            Ok::<_, std::convert::Infallible>(hyper::Response::new(http_body_util::Full::<bytes::Bytes>::from("far")))
        });
        drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
    })
    .await;
    let mut far = far(Identities::new(ca("demo.mesh"), DAY), app).await;
    let mut near = near(&far, app, "world");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(near.connect().await)).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..20 {
        sender.ready().await.unwrap();
        let request = hyper::Request::get("/").header("host", "world").body(Empty::<bytes::Bytes>::new()).unwrap();
        assert_eq!(soon(sender.send_request(request)).await.unwrap().status(), 200);
        let line = near.line().await;
        assert_eq!((line["http.status"].as_u64(), &line["dst.id"]), (Some(200), &id("world").to_string().into()));
    }
    near.proxy.drain();
    let line = far.agent.line().await;
    assert_eq!(line["outcome"], "ok", "an idle connection is left in good order: {line}");
}

/// Asks until another connection was made, which is to happen because a certificate has expired.
async fn asked_beyond_a_certificate(near: &Agent, mut ask: impl AsyncFnMut()) {
    ask().await;
    assert_eq!(near.proxy.dialer.figures().handshakes, 1);
    let began = std::time::Instant::now();
    while near.proxy.dialer.figures().handshakes < 2 {
        assert!(began.elapsed() < Duration::from_secs(15), "the certificate has expired long ago");
        ask().await;
        // Steadily, so that no connection is ever idle for long.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_busy_connection_does_not_outlive_its_certificates() {
    const TTL: Duration = Duration::from_secs(4);
    let app = server(|stream| async move {
        let service = hyper::service::service_fn(|_| async {
            Ok::<_, std::convert::Infallible>(hyper::Response::new(Empty::<bytes::Bytes>::new()))
        });
        drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
    })
    .await;
    let request = || hyper::Request::get("http://world/").header("host", "world").body(Empty::<bytes::Bytes>::new());

    let far_side = far(Identities::new(ca("demo.mesh"), TTL), app).await;
    let agent = near(&far_side, app, "world");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(agent.connect().await)).await.unwrap();
    tokio::spawn(connection);
    asked_beyond_a_certificate(&agent, async || {
        sender.ready().await.unwrap();
        assert_eq!(soon(sender.send_request(request().unwrap())).await.unwrap().status(), 200);
    })
    .await;

    let app = server(|stream| async move {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((_request, mut respond))) = connection.accept().await {
            drop(respond.send_response(http::Response::<()>::new(()), true));
        }
    })
    .await;
    let far_side = far(Identities::new(ca("demo.mesh"), TTL), app).await;
    let agent = near(&far_side, app, "world");
    let (mut sender, connection) = h2::client::handshake(agent.connect().await).await.unwrap();
    tokio::spawn(connection);
    asked_beyond_a_certificate(&agent, async || {
        let request = request().unwrap().map(|_empty| ());
        let (answer, _) = sender.send_request(request, true).unwrap();
        assert_eq!(soon(answer).await.unwrap().status(), 200);
    })
    .await;
}

#[tokio::test]
async fn calls_cross_in_one_tunnel_stream_together() {
    let streams = Arc::new(AtomicUsize::new(0));
    let counted = streams.clone();
    let app = server(move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_request, mut respond))) = connection.accept().await {
                let mut body = respond.send_response(http::Response::new(()), false).unwrap();
                body.send_data(bytes::Bytes::from_static(b"far"), false).unwrap();
                let trailers = [(http::HeaderName::from_static("grpc-status"), http::HeaderValue::from(0))];
                body.send_trailers(trailers.into_iter().collect()).unwrap();
            }
        }
    })
    .await;
    let mut far = far(Identities::new(ca("demo.mesh"), DAY), app).await;
    let mut near = near(&far, app, "world");
    let (mut sender, connection) = h2::client::handshake(near.connect().await).await.unwrap();
    tokio::spawn(connection);
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let request = http::Request::get("http://world/").header("content-type", "application/grpc");
            sender.send_request(request.body(()).unwrap(), true).unwrap().0
        })
        .collect();
    for call in calls {
        let mut body = soon(call).await.unwrap().into_body();
        assert_eq!(soon(body.data()).await.unwrap().unwrap(), "far");
        assert_eq!(soon(body.trailers()).await.unwrap().unwrap()["grpc-status"], "0");
        let line = near.line().await;
        assert_eq!((line["grpc.status"].as_u64(), &line["dst.id"]), (Some(0), &id("world").to_string().into()));
    }
    assert_eq!(streams.load(Ordering::Relaxed), 1, "one connection for all");
    near.proxy.drain();
    let line = far.agent.line().await;
    assert_eq!(line["outcome"], "ok", "the upstream connection is left in good order: {line}");
}

#[tokio::test]
async fn a_reset_crosses_both_agents() {
    let (tell, mut accepted) = tokio::sync::mpsc::channel(16);
    let app = server(move |stream| {
        tell.try_send(stream).unwrap_or_default();
        async {}
    })
    .await;
    let far = far(Identities::new(ca("demo.mesh"), DAY), app).await;
    let near = near(&far, app, "world");
    let mut client = near.connect().await;
    client.write_all(b"\0").await.unwrap();
    let mut server = soon(accepted.recv()).await.unwrap();
    assert_eq!(soon(server.read_u8()).await.unwrap(), 0);
    client.set_zero_linger().unwrap();
    drop(client);
    let error = soon(server.read_u8()).await.expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_after_the_end_of_one_direction_crosses_both_agents() {
    for caller_dies in [true, false] {
        let (tell, mut accepted) = tokio::sync::mpsc::channel(16);
        let app = server(move |stream| {
            tell.try_send(stream).unwrap_or_default();
            async {}
        })
        .await;
        let mut far = far(Identities::new(ca("demo.mesh"), DAY), app).await;
        let mut near = near(&far, app, "world");
        let mut client = near.connect().await;
        client.write_all(b"\0").await.unwrap();
        let mut server = soon(accepted.recv()).await.unwrap();
        assert_eq!(soon(server.read_u8()).await.unwrap(), 0);
        let (mut dies, mut waits) = if caller_dies { (client, server) } else { (server, client) };
        dies.shutdown().await.unwrap();
        assert_eq!(rest(&mut waits).await, b"");
        dies.set_zero_linger().unwrap();
        drop(dies);
        // It neither reads nor writes, and learns of it all the same.
        soon(waits.ready(tokio::io::Interest::ERROR)).await.unwrap();
        for line in [near.line().await, far.agent.line().await] {
            assert_eq!(line["outcome"], "reset", "{line}");
        }
    }
}

#[tokio::test]
async fn a_dead_application_is_refused_by_its_own_number_at_both_ends() {
    let app = nobody().await;
    let mut far = far(Identities::new(ca("demo.mesh"), DAY), app).await;
    let mut near = near(&far, app, "world");
    let mut client = near.connect().await;
    let error = soon(client.read_u8()).await.expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    for line in [near.line().await, far.agent.line().await] {
        assert_eq!(line["refusal.label"], "connect_failed", "{line}");
    }
}

#[tokio::test]
async fn the_other_agent_enforces_policy_too_and_a_stale_registry_is_told() {
    let app = echo_server().await;
    let mut far = far(Identities::new(ca("demo.mesh"), DAY), app).await;
    let mut near = near(&far, app, "world");
    let mut denying_snapshot = snapshot(Protocol::Auto, vec![local(app)]);
    denying_snapshot.policy = Arc::new(denying());
    far.agent.publish(denying_snapshot);
    let mut client = near.connect().await;
    soon(client.read_u8()).await.expect_err("a reset");
    assert_eq!(near.line().await["refusal.label"], "denied");
    let line = far.agent.line().await;
    assert_eq!((&line["refusal.label"], &line["src.id"]), (&"denied".into(), &id("web").to_string().into()), "{line}");

    far.agent.publish(snapshot(Protocol::Auto, vec![]));
    let mut client = near.connect().await;
    soon(client.read_u8()).await.expect_err("a reset");
    assert_eq!(near.line().await["refusal.label"], "not_local");
}

#[tokio::test]
async fn an_address_that_another_service_uses_now_is_refused() {
    let app = echo_server().await;
    let far = far(Identities::new(ca("demo.mesh"), DAY), app).await;
    let mut near = near(&far, app, "other");
    let mut client = near.connect().await;
    soon(client.read_u8()).await.expect_err("a reset");
    assert_eq!(near.line().await["refusal.label"], "unexpected_identity");
}
