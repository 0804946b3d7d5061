//! Tasks that stop while others still call them: who can go elsewhere does, and nobody else is sent away.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, client::conn::http1::SendRequest, service::service_fn};
use hyper_util::rt::TokioIo;

use super::{
    two_agents::{Far, far},
    *,
};

/// A server that says its name, and how many connections it got.
async fn named(name: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let addr = server(move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            let service =
                service_fn(move |_| async move { Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(name))) });
            drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        }
    });
    (addr.await, connections)
}

/// A server that reads a request and closes without a word, and how many it got.
async fn mute() -> (SocketAddr, Arc<AtomicUsize>) {
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    let addr = server(move |mut stream| {
        let counted = counted.clone();
        async move {
            until(&mut stream, "\r\n\r\n").await;
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    (addr.await, requests)
}

async fn client_of(at: SocketAddr) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(at).await.unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn ask(sender: &mut SendRequest<Full<Bytes>>, method: Method) -> (u16, bool, String) {
    soon(async {
        sender.ready().await.unwrap();
        let request = Request::builder().method(method).uri("/").header("host", "world");
        let response = sender.send_request(request.body(Full::default()).unwrap()).await.unwrap();
        let closes = response.headers().get("connection").is_some_and(|value| value == "close");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, closes, String::from_utf8_lossy(&body).into_owned())
    })
    .await
}

fn leaving(endpoint: Endpoint) -> Endpoint {
    Endpoint { health: Health::Draining, ..endpoint }
}

fn behind(far: &Far, app: SocketAddr) -> Endpoint {
    endpoint(app, Reach::Tunnel { agent: far.tunnels }, &id("world"))
}

#[tokio::test]
async fn the_agent_of_a_leaving_task_sends_callers_elsewhere_if_they_have_a_choice() {
    let identities = Identities::new(ca("demo.mesh"), DAY);
    let ((goes, asked), (stays, _)) = (named("goes").await, named("stays").await);
    let (leaves, remains) = (far(identities.clone(), goes).await, far(identities.clone(), stays).await);
    leaves.agent.publish(snapshot(Protocol::Auto, vec![leaving(local(goes))]));
    let near = Agent::with(identities);
    // As the registry still says.
    near.publish(snapshot(Protocol::Http, vec![behind(&leaves, goes), behind(&remains, stays)]));
    let mut sender = client_of(near.listen().await).await;
    for method in [Method::POST, Method::GET, Method::DELETE, Method::PATCH].into_iter().cycle().take(40) {
        assert_eq!(ask(&mut sender, method).await, (200, false, "stays".into()));
    }
    assert_eq!(asked.load(Ordering::Relaxed), 0, "not one connection");
    let metrics = near.proxy.telemetry.metrics.encode();
    assert!(!metrics.contains("not_ready"), "the callers were served: {metrics}");

    // Nobody else is left: what there is must do.
    near.publish(Snapshot { generation: 2, ..snapshot(Protocol::Http, vec![behind(&leaves, goes)]) });
    assert_eq!(ask(&mut sender, Method::POST).await, (200, false, "goes".into()));
}

#[tokio::test]
async fn a_request_that_may_be_repeated_goes_elsewhere_when_a_new_connection_dies_under_it() {
    let ((dies, _), (lives, _)) = (mute().await, named("lives").await);
    let agent = Agent::new(Protocol::Http, &[dies, lives]);
    for _ in 0..20 {
        let mut sender = client_of(agent.listen().await).await;
        assert_eq!(ask(&mut sender, Method::GET).await, (200, false, "lives".into()));
    }
}

#[tokio::test]
async fn a_request_is_sent_to_no_third_server_that_dies_of_it() {
    let all = [mute().await, mute().await, mute().await];
    let heard = || all.iter().map(|(_, requests)| requests.load(Ordering::Relaxed)).sum::<usize>();
    let agent = Agent::new(Protocol::Http, &all.each_ref().map(|(addr, _)| *addr));
    let mut sender = client_of(agent.listen().await).await;
    assert_eq!(ask(&mut sender, Method::GET).await.0, 502);
    assert_eq!(heard(), 2);
    assert_eq!(ask(&mut sender, Method::POST).await.0, 502);
    assert_eq!(heard(), 3, "what the server may have done is not done again");
}

#[tokio::test]
async fn a_client_that_has_named_a_leaving_task_is_told_to_look_for_another() {
    let (app, _) = named("named").await;
    let agent = Agent::new(Protocol::Http, &[app]);
    let at = agent.listen_for(&app.to_string()).await;
    let mut sender = client_of(at).await;
    assert_eq!(ask(&mut sender, Method::GET).await, (200, false, "named".into()));
    agent.publish(Snapshot { generation: 2, ..snapshot(Protocol::Http, vec![leaving(local(app))]) });
    assert_eq!(ask(&mut sender, Method::GET).await, (200, true, "named".into()));
    assert!(soon(sender.ready()).await.is_err(), "the connection is closed");
}

#[tokio::test]
async fn so_is_one_that_speaks_http2() {
    let app = server(|stream| async move {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((_request, mut respond))) = connection.accept().await {
            respond.send_response(http::Response::new(()), true).unwrap();
        }
    })
    .await;
    let agent = Agent::new(Protocol::Http, &[app]);
    agent.publish(snapshot(Protocol::Http, vec![leaving(local(app))]));
    let stream = TcpStream::connect(agent.listen_for(&app.to_string()).await).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    let ended = tokio::spawn(connection);
    let request = http::Request::get("http://world/").body(()).unwrap();
    assert_eq!(soon(sender.send_request(request, true).unwrap().0).await.unwrap().status(), 200);
    soon(ended).await.unwrap().expect("it ends in order");
}
