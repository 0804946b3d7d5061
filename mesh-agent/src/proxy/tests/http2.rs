//! HTTP/2 and gRPC: each stream balanced by itself, both bodies and trailers passed, what either side breaks off broken
//! off for the other.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
    server::SendResponse,
};
use http::{HeaderMap, Request, Response, StatusCode};
use tokio::{io::AsyncWriteExt as _, sync::mpsc, task::JoinHandle};

use super::*;

/// An application that handles each stream with `handler`, under h2's settings of `builder`.
async fn app_with<F>(
    builder: h2::server::Builder,
    handler: impl Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + Sync + 'static,
) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    server(move |stream| {
        let (builder, handler) = (builder.clone(), handler.clone());
        async move {
            let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(handler(request, respond));
            }
        }
    })
    .await
}

async fn app<F>(
    handler: impl Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + Sync + 'static,
) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    app_with(h2::server::Builder::new(), handler).await
}

/// A server of unary calls that echoes, and tells its name in the trailers.
async fn named(name: &'static str) -> SocketAddr {
    app(move |request, respond| unary_echo(name, request, respond)).await
}

async fn unary_echo(name: &'static str, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    assert_eq!(request.headers()["te"], "trailers");
    assert_eq!(request.uri().authority().map(|a| a.as_str()), Some("world:80"));
    let body = all(request.into_body()).await.unwrap_or_default();
    let mut answer = respond.send_response(head(), false).unwrap();
    send(&mut answer, &body, false).await;
    answer.send_trailers(trailers(&[("grpc-status", "0"), ("x-name", name)])).unwrap();
}

fn head() -> Response<()> {
    Response::builder().header("content-type", "application/grpc").body(()).unwrap()
}

fn trailers(of: &[(&'static str, &'static str)]) -> HeaderMap {
    of.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
}

/// Sends as the receiver makes room.
async fn send(to: &mut SendStream<Bytes>, mut data: &[u8], end: bool) {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let room = match std::future::poll_fn(|cx| to.poll_capacity(cx)).await {
            Some(Ok(room)) => room.min(data.len()),
            _ => return,
        };
        to.send_data(Bytes::copy_from_slice(&data[..room]), false).unwrap_or_default();
        data = &data[room..];
    }
    if end {
        to.send_data(Bytes::new(), true).unwrap_or_default();
    }
}

/// A body to its end.
async fn all(mut body: RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len()).unwrap_or_default();
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

struct Caller {
    sender: SendRequest<Bytes>,
    connection: JoinHandle<Result<(), h2::Error>>,
}

impl Caller {
    async fn of(agent: &Agent) -> Self {
        let (sender, connection) = h2::client::handshake(agent.connect().await).await.unwrap();
        Self { sender, connection: tokio::spawn(connection) }
    }

    fn begin(&mut self, request: Request<()>, end: bool) -> (ResponseFuture, SendStream<Bytes>) {
        self.sender.send_request(request, end).unwrap()
    }

    /// A unary call.
    async fn call(&mut self, path: &str, message: &[u8]) -> Result<Reply, h2::Error> {
        soon(async {
            let (response, mut body) = self.begin(call(path), false);
            send(&mut body, message, true).await;
            Reply::of(response).await
        })
        .await
    }
}

fn call(path: &str) -> Request<()> {
    Request::post(format!("http://world:80{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://world:80{path}")).body(()).unwrap()
}

#[derive(Debug)]
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
    trailers: HeaderMap,
}

impl Reply {
    async fn of(response: ResponseFuture) -> Result<Self, h2::Error> {
        let (head, mut body) = response.await?.into_parts();
        let mut bytes = Vec::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            body.flow_control().release_capacity(chunk.len())?;
            bytes.extend_from_slice(&chunk);
        }
        let trailers = body.trailers().await?.unwrap_or_default();
        Ok(Self { status: head.status, headers: head.headers, body: bytes, trailers })
    }
}

#[tokio::test]
async fn calls_of_one_connection_are_spread_over_the_endpoints() {
    for protocol in [Protocol::Auto, Protocol::Http, Protocol::Http2, Protocol::Grpc] {
        let mut agent = Agent::new(protocol, &[named("a").await, named("b").await]);
        let mut caller = Caller::of(&agent).await;
        let mut counts = BTreeMap::new();
        for number in 0..40 {
            let reply = caller.call(&format!("/pkg.World/Say{number}"), b"hello").await.unwrap();
            assert_eq!((reply.status.as_u16(), &reply.body[..]), (200, &b"hello"[..]));
            assert_eq!(reply.trailers["grpc-status"], "0");
            *counts.entry(reply.trailers["x-name"].clone().to_str().unwrap().to_owned()).or_insert(0) += 1;
            let line = agent.line().await;
            assert_eq!((&line["protocol"], &line["outcome"]), (&"grpc".into(), &"ok".into()), "{line}");
            assert_eq!(line["http.path"], format!("/pkg.World/Say{number}"));
            assert_eq!((line["http.status"].as_u64(), line["grpc.status"].as_u64()), (Some(200), Some(0)), "{line}");
            assert_eq!((line["bytes_sent"].as_u64(), line["bytes_received"].as_u64()), (Some(5), Some(5)), "{line}");
            assert_eq!(line["dst.task"], "world-1");
        }
        assert_eq!(counts.len(), 2, "{protocol:?}: {counts:?}");
        let metrics = agent.proxy.telemetry.metrics.encode();
        assert!(metrics.contains(r#"dst_service="world",dst_task="world-1",status="2xx"} 40"#), "{metrics}");
    }
}

#[tokio::test]
async fn upstream_connections_are_shared() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let addr = server(move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(unary_echo("a", request, respond));
            }
        }
    })
    .await;
    let agent = Agent::new(Protocol::Grpc, &[addr]);
    let mut callers = Vec::new();
    for _ in 0..6 {
        callers.push(Caller::of(&agent).await);
    }
    let calls = callers.iter_mut().map(|caller| async {
        for _ in 0..10 {
            assert_eq!(caller.call("/x", b"x").await.unwrap().body, b"x");
        }
    });
    futures_util::future::join_all(calls).await;
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn both_directions_stream_at_once_and_end_by_themselves() {
    let echo = app(|request, mut respond| async move {
        let mut answer = respond.send_response(head(), false).unwrap();
        let mut body = request.into_body();
        while let Some(Ok(chunk)) = body.data().await {
            body.flow_control().release_capacity(chunk.len()).unwrap();
            send(&mut answer, &chunk, false).await;
        }
        let asked = body.trailers().await.unwrap();
        assert_eq!(asked.map(|trailers| trailers["x-end"].clone()), Some("client".parse().unwrap()));
        answer.send_trailers(trailers(&[("grpc-status", "0")])).unwrap();
    })
    .await;
    let mut agent = Agent::new(Protocol::Auto, &[echo]);
    let mut caller = Caller::of(&agent).await;
    let (response, mut to) = caller.begin(call("/bidi"), false);
    let mut from = soon(response).await.unwrap().into_body();
    for round in 0..50u8 {
        send(&mut to, &[round; 1000], false).await;
        let mut back = Vec::new();
        while back.len() < 1000 {
            let chunk = soon(from.data()).await.unwrap().unwrap();
            from.flow_control().release_capacity(chunk.len()).unwrap();
            back.extend_from_slice(&chunk);
        }
        assert!(back == [round; 1000]);
    }
    to.send_trailers(trailers(&[("x-end", "client")])).unwrap();
    assert!(soon(from.data()).await.is_none());
    assert_eq!(soon(from.trailers()).await.unwrap().unwrap()["grpc-status"], "0");
    let line = agent.line().await;
    assert_eq!((&line["outcome"], line["bytes_sent"].as_u64()), (&"ok".into(), Some(50_000)), "{line}");
}

#[tokio::test]
async fn large_bodies_pass_unchanged_beside_each_other() {
    let agent = Agent::new(Protocol::Http2, &[named("a").await, named("b").await]);
    let data = noise(5 << 20);
    let mut caller = Caller::of(&agent).await;
    let calls = (0..4).map(|_| {
        let (response, mut body) = caller.begin(call("/x"), false);
        let data = &data;
        async move {
            let ((), reply) = tokio::join!(send(&mut body, data, true), Reply::of(response));
            assert!(reply.unwrap().body == *data);
        }
    });
    soon(futures_util::future::join_all(calls)).await;
}

#[tokio::test]
async fn a_cancelled_call_is_cancelled_for_the_server() {
    let (tell, mut told) = mpsc::channel(16);
    let addr = app(move |request, mut respond| {
        let tell = tell.clone();
        async move {
            tell.try_send(Reason::NO_ERROR).unwrap();
            let answered = request.uri().path() == "/answered";
            let mut answer = answered.then(|| respond.send_response(head(), false).unwrap());
            let reason = std::future::poll_fn(|cx| match &mut answer {
                Some(answer) => answer.poll_reset(cx),
                None => respond.poll_reset(cx),
            })
            .await;
            tell.try_send(reason.unwrap()).unwrap();
        }
    })
    .await;
    let mut agent = Agent::new(Protocol::Grpc, &[addr]);
    let mut caller = Caller::of(&agent).await;
    for path in ["/waiting", "/answered"] {
        let (response, mut to) = caller.begin(call(path), false);
        assert_eq!(soon(told.recv()).await, Some(Reason::NO_ERROR));
        let response = if path == "/answered" { Err(soon(response).await.unwrap()) } else { Ok(response) };
        to.send_reset(Reason::CANCEL);
        assert_eq!(soon(told.recv()).await, Some(Reason::CANCEL), "{path}");
        let line = agent.line().await;
        assert_eq!((&line["outcome"], line.get("refusal")), (&"aborted".into(), None), "{line}");
        drop(response);
    }
    // And when the client dies.
    let (_response, _to) = caller.begin(call("/waiting"), false);
    assert_eq!(soon(told.recv()).await, Some(Reason::NO_ERROR));
    caller.connection.abort();
    assert_eq!(soon(told.recv()).await, Some(Reason::CANCEL));
    assert_eq!(agent.line().await["outcome"], "aborted");
}

#[tokio::test]
async fn a_servers_reset_arrives_as_it_was() {
    let addr = app(|request, mut respond| async move {
        if request.uri().path() == "/answered" {
            let mut answer = respond.send_response(head(), false).unwrap();
            send(&mut answer, b"part", false).await;
            // Not before the client has it.
            drop(all(request.into_body()).await);
            answer.send_reset(Reason::ENHANCE_YOUR_CALM);
        } else {
            respond.send_reset(Reason::ENHANCE_YOUR_CALM);
        }
    })
    .await;
    let mut agent = Agent::new(Protocol::Grpc, &[addr]);
    let mut caller = Caller::of(&agent).await;
    let error = caller.call("/at-once", b"x").await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));
    assert_eq!(agent.line().await["refusal.label"], "upstream_reset");
    let (response, mut to) = caller.begin(call("/answered"), false);
    let mut from = soon(response).await.unwrap().into_body();
    assert_eq!(soon(from.data()).await.unwrap().unwrap(), "part");
    to.send_data(Bytes::new(), true).unwrap();
    let error = soon(from.data()).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));
    let line = agent.line().await;
    assert_eq!((&line["refusal.label"], line["http.status"].as_u64()), (&"upstream_reset".into(), Some(200)), "{line}");
    assert_eq!(agent.proxy.load(&EndpointId::of(addr)).failures, 0, "an application may reset a call");
}

#[tokio::test]
async fn a_refusal_is_an_answer_and_for_grpc_a_status() {
    let mut agent = Agent::new(Protocol::Auto, &[nobody().await]);
    let mut caller = Caller::of(&agent).await;
    let reply = caller.call("/x", b"x").await.unwrap();
    assert_eq!((reply.status.as_u16(), &reply.headers["grpc-status"]), (200, &"14".parse().unwrap()));
    assert_eq!(reply.headers["grpc-message"], "ecs-mesh: request refused, reason 8 (connect_failed)");
    let line = agent.line().await;
    assert_eq!((line["refusal"].as_u64(), line["grpc.status"].as_u64()), (Some(8), Some(14)), "{line}");
    let (response, _) = caller.begin(get("/x"), true);
    let reply = soon(Reply::of(response)).await.unwrap();
    assert_eq!(
        (reply.status.as_u16(), &reply.headers["ecs-mesh-refusal"]),
        (503, &"8 connect_failed".parse().unwrap())
    );
    assert!(String::from_utf8(reply.body).unwrap().contains("reason 8"));
    assert_eq!(agent.line().await["protocol"], "http2");
    let head = Request::head("http://world:80/x").body(()).unwrap();
    let response = soon(caller.begin(head, true).0).await.unwrap();
    assert_eq!((response.status().as_u16(), response.body().is_end_stream()), (503, true));
    assert_eq!(agent.line().await["refusal"].as_u64(), Some(8));

    let mut snapshot = snapshot(Protocol::Auto, vec![local(named("a").await)]);
    snapshot.policy = Arc::new(denying());
    agent.publish(snapshot);
    let reply = caller.call("/x", b"x").await.unwrap();
    assert_eq!(reply.headers["grpc-status"], "7", "the same connection, after the policy has changed");
    assert_eq!(agent.line().await["refusal.label"], "denied");

    let two = Request::get("http://world/").header("host", "elsewhere").body(()).unwrap();
    let (response, _) = caller.begin(two, true);
    assert_eq!(soon(Reply::of(response)).await.unwrap().status, 400);
    assert_eq!(agent.line().await["refusal.label"], "bad_request");
}

#[tokio::test]
async fn a_drain_ends_the_connection_after_its_calls() {
    let (tell, mut told) = mpsc::channel::<SendStream<Bytes>>(16);
    let addr = app(move |_request, mut respond| {
        let tell = tell.clone();
        async move { tell.try_send(respond.send_response(head(), false).unwrap()).unwrap() }
    })
    .await;
    let agent = Agent::new(Protocol::Grpc, &[addr]);
    let mut caller = Caller::of(&agent).await;
    let (response, mut to) = caller.begin(call("/x"), false);
    let mut server = soon(told.recv()).await.unwrap();
    let mut from = soon(response).await.unwrap().into_body();
    agent.proxy.drain();
    // The client is told, and begins no more here.
    soon(async {
        while std::future::poll_fn(|cx| caller.sender.poll_ready(cx)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // The present call goes on to its end.
    send(&mut to, b"more", true).await;
    send(&mut server, b"and more", false).await;
    server.send_trailers(trailers(&[("grpc-status", "0")])).unwrap();
    assert_eq!(soon(from.data()).await.unwrap().unwrap(), "and more");
    from.flow_control().release_capacity(8).unwrap();
    assert_eq!(soon(from.trailers()).await.unwrap().unwrap()["grpc-status"], "0");
    drop((to, from, server));
    soon(caller.connection).await.unwrap().unwrap();
    soon(agent.proxy.idle()).await;
}

/// Answers flow in pieces of at most `piece` octets, in this many streams that nobody reads.
async fn stops_nobody_else(piece: usize, streams: usize) {
    let written = Arc::new(AtomicUsize::new(0));
    let counted = written.clone();
    let addr = app(move |request, mut respond| {
        let counted = counted.clone();
        async move {
            if request.uri().path() != "/flood" {
                return unary_echo("a", request, respond).await;
            }
            let mut answer = respond.send_response(head(), false).unwrap();
            while counted.load(Ordering::Relaxed) < 100 << 20 {
                answer.reserve_capacity(piece);
                let mut room = answer.capacity();
                if room == 0 {
                    let Some(Ok(more)) = std::future::poll_fn(|cx| answer.poll_capacity(cx)).await else { return };
                    room = more;
                }
                counted.fetch_add(room, Ordering::Relaxed);
                answer.send_data(vec![0; room].into(), false).unwrap();
                tokio::task::yield_now().await;
            }
        }
    })
    .await;
    let agent = Agent::new(Protocol::Grpc, &[addr]);
    let mut builder = h2::client::Builder::new();
    // Else the flood would take the room of the others in the client itself.
    builder.initial_connection_window_size(1 << 20).initial_window_size(1 << 10);
    let (sender, connection) = builder.handshake(agent.connect().await).await.unwrap();
    let mut caller = Caller { sender, connection: tokio::spawn(connection) };
    let mut unread = Vec::new();
    for _ in 0..streams {
        let (response, to) = caller.begin(call("/flood"), false);
        unread.push((soon(response).await.unwrap().into_body(), to));
    }
    // Other calls use the same connections meanwhile, long enough for the writer to have come to a stop.
    let mut last = 0;
    loop {
        for _ in 0..50 {
            assert_eq!(caller.call("/x", b"x").await.unwrap().body, b"x");
        }
        match written.load(Ordering::Relaxed) {
            now if now == last => break,
            now => last = now,
        }
    }
    assert!(last > 0 && last < streams * (2 << 20), "{last} bytes for a client that reads none");
    // Those that nobody read have waited.
    for (mut body, _to) in unread {
        let mut read = 0;
        while read < 300 << 10 {
            let chunk = soon(body.data()).await.expect("the answer goes on").unwrap();
            body.flow_control().release_capacity(chunk.len()).unwrap();
            read += chunk.len();
        }
    }
}

#[tokio::test]
async fn a_reader_that_stops_stops_its_writer_and_nobody_else() {
    stops_nobody_else(16 << 10, 1).await;
}

#[tokio::test]
async fn readers_that_stop_in_the_middle_of_small_frames_stop_nobody_else() {
    stops_nobody_else(20, 6).await;
}

#[tokio::test]
async fn a_server_that_dies_in_the_middle_ends_the_call_with_a_reason() {
    let (tell, mut told) = mpsc::channel(16);
    let addr = server(move |stream| {
        let tell = tell.clone();
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut answer = respond.send_response(head(), false).unwrap();
            send(&mut answer, b"part", false).await;
            let (die, dying) = tokio::sync::oneshot::channel::<()>();
            tell.try_send(die).unwrap();
            tokio::select! {
                _ = connection.accept() => {}
                _ = dying => {}
            }
        }
    })
    .await;
    let mut agent = Agent::new(Protocol::Auto, &[addr]);
    let mut caller = Caller::of(&agent).await;
    for grpc in [true, false] {
        let (response, _to) = caller.begin(if grpc { call("/x") } else { get("/x") }, !grpc);
        let mut from = soon(response).await.unwrap().into_body();
        assert_eq!(soon(from.data()).await.unwrap().unwrap(), "part");
        drop(soon(told.recv()).await.unwrap());
        let end = soon(from.data()).await;
        if grpc {
            assert!(end.is_none(), "{end:?}");
            let trailers = soon(from.trailers()).await.unwrap().unwrap();
            assert_eq!(trailers["grpc-status"], "14");
            assert_eq!(trailers["grpc-message"], "ecs-mesh: request refused, reason 22 (upstream_reset)");
        } else {
            assert_eq!(end.unwrap().unwrap_err().reason(), Some(Reason::INTERNAL_ERROR));
        }
        let line = agent.line().await;
        assert_eq!(line["refusal.label"], "upstream_reset", "{line}");
    }
    assert!(agent.proxy.load(&EndpointId::of(addr)).failures > 0);
}

#[tokio::test]
async fn what_a_server_did_not_process_is_sent_elsewhere_whole() {
    // One refuses every stream, another leaves after its first.
    let refusing = app(|_request, mut respond| async move { respond.send_reset(Reason::REFUSED_STREAM) }).await;
    let leaving = server(|stream| async move {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        if let Some(Ok((request, respond))) = connection.accept().await {
            connection.graceful_shutdown();
            tokio::spawn(unary_echo("leaving", request, respond));
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(unary_echo("leaving", request, respond));
            }
        }
    })
    .await;
    let mut agent = Agent::new(Protocol::Grpc, &[refusing, leaving]);
    let mut caller = Caller::of(&agent).await;
    let message = noise(20_000);
    for _ in 0..30 {
        let reply = caller.call("/x", &message).await.unwrap();
        assert!(reply.body == message, "nothing of it is lost or doubled");
        assert_eq!(agent.line().await["outcome"], "ok");
    }
    // Where there is nowhere else, the client may send it again itself.
    agent.publish(snapshot(Protocol::Grpc, vec![local(refusing)]));
    assert_eq!(caller.call("/x", b"x").await.unwrap_err().reason(), Some(Reason::REFUSED_STREAM));
    assert_eq!(agent.line().await["refusal.label"], "upstream_reset");
}

#[tokio::test]
async fn the_end_of_a_body_without_an_octet_is_sent_again_too() {
    let asked = Arc::new(AtomicUsize::new(0));
    let addr = app(move |request, mut respond| {
        let first = asked.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            match first {
                true => respond.send_reset(Reason::REFUSED_STREAM),
                false => unary_echo("a", request, respond).await,
            }
        }
    })
    .await;
    let agent = Agent::new(Protocol::Grpc, &[addr]);
    let mut caller = Caller::of(&agent).await;
    // The head does not say that nothing follows.
    assert_eq!(caller.call("/x", b"").await.unwrap().body, b"");
}

#[tokio::test]
async fn a_server_with_few_streams_gets_more_connections() {
    let mut builder = h2::server::Builder::new();
    builder.max_concurrent_streams(1);
    let (tell, mut told) = mpsc::channel(16);
    let addr = app_with(builder, move |request, mut respond| {
        let tell = tell.clone();
        async move {
            if request.uri().path() == "/first" {
                return unary_echo("a", request, respond).await;
            }
            tell.try_send(respond.send_response(head(), false).unwrap()).unwrap();
        }
    })
    .await;
    let agent = Agent::new(Protocol::Grpc, &[addr]);
    let mut caller = Caller::of(&agent).await;
    // The limit is known after the first answer.
    caller.call("/first", b"x").await.unwrap();
    let open: Vec<_> = (0..5).map(|_| caller.begin(call("/open"), false)).collect();
    for _ in 0..5 {
        soon(told.recv()).await.unwrap().send_trailers(trailers(&[("grpc-status", "0")])).unwrap();
    }
    for (response, _to) in open {
        assert_eq!(soon(Reply::of(response)).await.unwrap().trailers["grpc-status"], "0");
    }
}

#[tokio::test]
async fn interim_answers_pass() {
    let addr = app(|_request, mut respond| async move {
        let hint = Response::builder().status(103).header("link", "</style.css>").body(()).unwrap();
        respond.send_informational(hint).unwrap();
        respond.send_response(Response::new(()), true).unwrap();
    })
    .await;
    let agent = Agent::new(Protocol::Http2, &[addr]);
    let mut caller = Caller::of(&agent).await;
    let (mut response, _) = caller.begin(get("/"), true);
    let interim = soon(std::future::poll_fn(|cx| response.poll_informational(cx))).await.unwrap().unwrap();
    assert_eq!((interim.status().as_u16(), &interim.headers()["link"]), (103, &"</style.css>".parse().unwrap()));
    assert_eq!(soon(response).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_server_of_http_1_is_told_from_a_dead_one() {
    let addr = server(|mut stream| async move {
        until(&mut stream, "\r\n\r\n").await;
        let answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        stream.shutdown().await.unwrap();
        rest(&mut stream).await;
    })
    .await;
    let mut agent = Agent::new(Protocol::Http, &[addr]);
    let mut caller = Caller::of(&agent).await;
    let (response, _) = caller.begin(get("/"), true);
    assert_eq!(soon(response).await.unwrap().status(), 502);
    assert_eq!(agent.line().await["refusal.label"], "bad_protocol");
}

#[tokio::test]
async fn a_server_that_greets_first_leaves_the_word_to_the_client() {
    let addr = named("a").await;
    let mut agent = Agent::new(Protocol::Auto, &[addr]);
    for _ in 0..3 {
        let stream = agent.connect().await;
        // Long enough for the upstream to be open and to have greeted.
        soon(async {
            while agent.proxy.load(&EndpointId::of(addr)).in_flight == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let (sender, connection) = h2::client::handshake(stream).await.unwrap();
        let mut caller = Caller { sender, connection: tokio::spawn(connection) };
        assert_eq!(caller.call("/x", b"x").await.unwrap().body, b"x");
        assert_eq!(agent.line().await["protocol"], "grpc");
    }
}

#[tokio::test]
async fn the_end_of_the_called_task_ends_its_calls() {
    let addr = app(|request, mut respond| async move {
        let mut answer = respond.send_response(head(), false).unwrap();
        drop(all(request.into_body()).await);
        answer.send_reset(Reason::CANCEL);
    })
    .await;
    let mut agent = Agent::new(Protocol::Grpc, &[addr]);
    let mut caller = Caller::of(&agent).await;
    let (response, _to) = caller.begin(call("/x"), false);
    let mut from = soon(response).await.unwrap().into_body();
    agent.proxy.namespaces.remove(&task("world-1"));
    assert!(soon(from.data()).await.is_none());
    assert_eq!(soon(from.trailers()).await.unwrap().unwrap()["grpc-status"], "14");
    assert_eq!(agent.line().await["refusal.label"], "upstream_reset");
    assert_eq!(caller.call("/x", b"x").await.unwrap().headers["grpc-status"], "14");
    assert_eq!(agent.line().await["refusal.label"], "task_gone");
}
