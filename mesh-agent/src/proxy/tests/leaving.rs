//! Tasks that stop while others still call them: who can go elsewhere does, and nobody else is sent away.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, client::conn::http1::SendRequest, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
    task::JoinSet,
};

use super::{
    two_agents::{Far, far},
    *,
};
use crate::{
    proxy::{
        copy,
        wire::{Socket, Wire},
    },
    transport::{
        To,
        accept::{Acceptance, Arrival, serve},
        tunnel::{Tunnel, UNTOLD},
    },
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

/// Another agent, which does `handler` with each stream.
pub(super) async fn tunnels<F>(
    identities: Identities,
    handler: impl Fn(Tunnel) -> F + Clone + Send + Sync + 'static,
) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = Acceptor::new(TcpListener::bind("127.0.0.1:0").await.unwrap().into_std().unwrap()).unwrap();
    let at = listener.local_addr().unwrap();
    let acceptance = Acceptance {
        presents: Arc::new(|_, _| Some(id("world"))),
        failed: Arc::new(drop),
        handshake_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(1),
    };
    tokio::spawn(async move {
        let (_drain, draining) = watch::channel(false);
        let spawn = move |set: &mut JoinSet<()>, arrival: Arrival| {
            let handler = handler.clone();
            set.spawn(arrival.run(move |request| handler(request.accept().unwrap())));
        };
        serve(listener, identities, acceptance, spawn, draining).await.unwrap();
    });
    at
}

const SAID: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nsaid";

/// Another agent in front of an application that answers one request of each connection. Of the first connection it then
/// takes `taken` octets of the next request, and closes, or resets; the agent had been sent all of it.
async fn one_each(identities: Identities, taken: u64, resets: bool) -> (SocketAddr, Arc<AtomicUsize>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let at = tunnels(identities, move |mut tunnel| {
        let first = counted.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            let length = u64::try_from(until(&mut tunnel, "\r\n\r\nbody").await.len()).unwrap();
            tunnel.tell_taken(length + taken);
            tunnel.write_all(SAID).await.unwrap();
            if first {
                until(&mut tunnel, "\r\n\r\nbody").await;
                if resets {
                    return tunnel.reset_with_taken(length + taken);
                }
            }
            tunnel.shutdown().await.unwrap();
            drop(rest(&mut tunnel).await);
        }
    });
    (at.await, connections)
}

async fn post(sender: &mut SendRequest<Full<Bytes>>) -> u16 {
    sender.ready().await.unwrap();
    let request = Request::post("/").header("host", "world").body(Full::from("body")).unwrap();
    soon(sender.send_request(request)).await.unwrap().status().as_u16()
}

#[tokio::test]
async fn a_post_that_the_application_was_not_given_is_sent_again_and_no_other() {
    for (taken, resets, expected, connections) in
        [(0, false, 200, 2), (1, false, 502, 1), (0, true, 200, 2), (1, true, 502, 1)]
    {
        let identities = Identities::new(ca("demo.mesh"), DAY);
        let (at, counted) = one_each(identities.clone(), taken, resets).await;
        let near = Agent::with(identities);
        let app = "127.0.0.1:9".parse().unwrap();
        near.publish(snapshot(Protocol::Http, vec![endpoint(app, Reach::Tunnel { agent: at }, &id("world"))]));
        let mut sender = client_of(near.listen().await).await;
        assert_eq!(post(&mut sender).await, 200);
        assert_eq!(post(&mut sender).await, expected, "{taken} octets taken, reset: {resets}");
        assert_eq!(counted.load(Ordering::Relaxed), connections);
    }
}

/// What an agent says that its application took of `request`, which came after the application had closed, or was read and
/// not answered.
async fn told(closed_before: bool) -> u64 {
    let identities = Identities::new(ca("demo.mesh"), DAY);
    let at = tunnels(identities.clone(), move |mut tunnel| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut app = listener.accept().await.unwrap().0;
        // The copy finds the request and the end there already when it begins, or the end later.
        let request = until(&mut tunnel, "request").await;
        let source = Wire::new(Socket::Tunnel(Box::new(tunnel))).rewound(request.into());
        let copied = copy::both_ways(source, Wire::tcp(ours), Arc::default());
        if closed_before {
            drop(app);
            copied.await;
        } else {
            let reads = async {
                until(&mut app, "request").await;
                drop(app);
            };
            tokio::join!(copied, reads);
        }
    });
    let to = To {
        agent: at.await,
        authority: "127.0.0.1:9".parse().unwrap(),
        from: id("web"),
        expect: id("world"),
        elsewhere: true,
    };
    let mut tunnel = Dialer::new(identities, Settings::default()).unwrap().open(&to).await.unwrap();
    let taken = tunnel.taken();
    tunnel.write_all(b"request").await.unwrap();
    assert_eq!(rest(&mut tunnel).await, b"", "the caller hears of an end in order");
    taken.load(Ordering::Relaxed)
}

#[tokio::test]
async fn what_an_application_was_not_given_before_its_end_is_not_taken_although_it_was_written() {
    assert_eq!((told(true).await, told(false).await), (0, 7));
}

#[tokio::test]
async fn a_reset_that_a_write_has_met_is_passed_on_as_one() {
    let identities = Identities::new(ca("demo.mesh"), DAY);
    let at = tunnels(identities.clone(), move |mut tunnel| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut app = listener.accept().await.unwrap().0;
        ours.write_all(b"re").await.unwrap();
        until(&mut app, "re").await;
        app.set_zero_linger().unwrap();
        drop(app);
        // The write takes the error, and a read after it would look like an end.
        let rest = until(&mut tunnel, "quest").await;
        let source = Wire::new(Socket::Tunnel(Box::new(tunnel))).rewound(rest.into());
        copy::both_ways(source, Wire::tcp(ours), Arc::default()).await;
    });
    let to = To {
        agent: at.await,
        authority: "127.0.0.1:9".parse().unwrap(),
        from: id("web"),
        expect: id("world"),
        elsewhere: true,
    };
    let mut tunnel = Dialer::new(identities, Settings::default()).unwrap().open(&to).await.unwrap();
    let taken = tunnel.taken();
    tunnel.write_all(b"quest").await.unwrap();
    let read = soon(tunnel.read_u8()).await;
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(taken.load(Ordering::Relaxed), UNTOLD);
}

#[tokio::test]
async fn a_task_of_this_host_is_not_given_twice_what_it_has_read() {
    let posts = Arc::new(AtomicUsize::new(0));
    let counted = posts.clone();
    let app = server(move |mut stream| {
        let counted = counted.clone();
        async move {
            until(&mut stream, "\r\n\r\nbody").await;
            counted.fetch_add(1, Ordering::Relaxed);
            stream.write_all(SAID).await.unwrap();
            until(&mut stream, "\r\n\r\nbody").await;
            counted.fetch_add(1, Ordering::Relaxed);
        }
    })
    .await;
    let agent = Agent::new(Protocol::Http, &[app]);
    let mut sender = client_of(agent.listen().await).await;
    assert_eq!((post(&mut sender).await, post(&mut sender).await), (200, 502));
    assert_eq!(posts.load(Ordering::Relaxed), 2);
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
            respond.send_response(Response::new(()), true).unwrap();
        }
    })
    .await;
    let agent = Agent::new(Protocol::Http, &[app]);
    agent.publish(snapshot(Protocol::Http, vec![leaving(local(app))]));
    let stream = TcpStream::connect(agent.listen_for(&app.to_string()).await).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    let ended = tokio::spawn(connection);
    let request = Request::get("http://world/").body(()).unwrap();
    assert_eq!(soon(sender.send_request(request, true).unwrap().0).await.unwrap().status(), 200);
    soon(ended).await.unwrap().expect("it ends in order");
}
