//! HTTP requests: balanced one by one, retried where that is safe, refused where it is not, and passed unchanged.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http1::SendRequest, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncWriteExt as _, sync::mpsc};

use super::*;

/// An HTTP server of some application.
async fn app<F>(handler: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static) -> SocketAddr
where
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    server(move |stream| {
        let handler = handler.clone();
        async move {
            let service = service_fn(move |request| {
                let answer = handler(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        }
    })
    .await
}

/// A server that says its name.
async fn named(name: &'static str) -> SocketAddr {
    app(move |_| async move { Response::new(Full::from(name)) }).await
}

/// A server that answers each connection's first head with `answer`, byte for byte, and tells what it had read.
async fn canned(answer: &'static str) -> (SocketAddr, mpsc::Receiver<String>) {
    let (tell, heard) = mpsc::channel(16);
    let addr = server(move |mut stream| {
        let tell = tell.clone();
        async move {
            let head = until(&mut stream, "\r\n\r\n").await;
            tell.try_send(head).unwrap_or_default();
            stream.write_all(answer.as_bytes()).await.unwrap_or_default();
        }
    })
    .await;
    (addr, heard)
}

async fn client(agent: &Agent) -> SendRequest<Full<Bytes>> {
    let stream = agent.connect().await;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).header("host", "world").body(Full::default()).expect("a request")
}

async fn text(sender: &mut SendRequest<Full<Bytes>>, request: Request<Full<Bytes>>) -> (u16, String) {
    soon(async {
        sender.ready().await.unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("text"))
    })
    .await
}

#[tokio::test]
async fn requests_of_one_connection_are_spread_over_the_endpoints() {
    for protocol in [Protocol::Auto, Protocol::Http] {
        let endpoints = [named("a").await, named("b").await, named("c").await];
        let mut agent = Agent::new(protocol, &endpoints);
        let mut sender = client(&agent).await;
        let mut counts = BTreeMap::new();
        for number in 0..60 {
            let (status, name) = text(&mut sender, get(&format!("/{number}?secret"))).await;
            assert_eq!(status, 200);
            *counts.entry(name).or_insert(0) += 1;
            let line = agent.line().await;
            assert_eq!((&line["protocol"], &line["http.path"]), (&"http".into(), &format!("/{number}").into()));
            assert_eq!((line["http.status"].as_u64(), &line["outcome"]), (Some(200), &"ok".into()), "{line}");
            assert_eq!((&line["src.task"], &line["dst.task"]), (&"web-1".into(), &"world-1".into()));
        }
        // How many each gets follows its response times; a busy test machine may slow one of them down.
        assert_eq!(counts.len(), 3, "{counts:?}");
        let metrics = agent.proxy.telemetry.metrics.encode();
        assert!(metrics.contains(r#"dst_service="world",dst_task="world-1",status="2xx"} 60"#), "{metrics}");
        assert!(!metrics.contains("mesh_connections_total{"), "requests are counted, their connection is not");
    }
}

#[tokio::test]
async fn upstream_connections_are_used_again() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let addr = server(move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            let service = service_fn(|_| async { Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("x"))) });
            drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        }
    })
    .await;
    let agent = Agent::new(Protocol::Auto, &[addr]);
    for _ in 0..3 {
        let mut sender = client(&agent).await;
        for _ in 0..10 {
            assert_eq!(text(&mut sender, get("/")).await.0, 200);
        }
    }
    assert!(connections.load(Ordering::Relaxed) <= 3, "{connections:?}");
}

#[tokio::test]
async fn a_head_may_come_byte_by_byte() {
    let mut agent = Agent::new(Protocol::Auto, &[named("a").await]);
    let mut client = agent.connect().await;
    client.set_nodelay(true).unwrap();
    for byte in b"GET /slow HTTP/1.1\r\nHost: world\r\nConnection: close\r\n\r\n" {
        client.write_all(&[*byte]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let answer = String::from_utf8(rest(&mut client).await).expect("text");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\na"), "{answer}");
    assert_eq!(agent.line().await["http.path"], "/slow");
}

#[tokio::test]
async fn heads_pass_as_they_were_written() {
    let (addr, mut heard) =
        canned("HTTP/1.1 200 OK\r\nX-MiXed: 1\r\nConnection: x-hop\r\nX-Hop: 1\r\nContent-Length: 2\r\n\r\nok").await;
    let agent = Agent::new(Protocol::Auto, &[addr]);
    let mut client = agent.connect().await;
    let head = "GET /a%20b?c HTTP/1.1\r\nHoSt: World:80\r\nX-CaSe: 1\r\nConnection: close, x-drop\r\nX-Drop: 1\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    let answer = String::from_utf8(rest(&mut client).await).expect("text");
    let asked = soon(heard.recv()).await.expect("a head");
    assert_eq!(asked, "GET /a%20b?c HTTP/1.1\r\nHoSt: World:80\r\nX-CaSe: 1\r\n\r\n");
    assert!(answer.contains("X-MiXed: 1\r\n") && !answer.contains("X-Hop"), "{answer}");
    assert!(!answer.to_lowercase().contains("date:"), "nothing is added: {answer}");
}

#[tokio::test]
async fn a_dead_endpoint_costs_another_attempt() {
    let mut agent = Agent::new(Protocol::Auto, &[nobody().await, named("alive").await]);
    let mut sender = client(&agent).await;
    for _ in 0..10 {
        assert_eq!(text(&mut sender, get("/")).await, (200, "alive".into()));
        assert_eq!(agent.line().await["http.status"].as_u64(), Some(200));
    }
}

#[tokio::test]
async fn when_all_are_dead_the_answer_says_why() {
    let mut agent = Agent::new(Protocol::Http, &[nobody().await, nobody().await]);
    let mut sender = client(&agent).await;
    let response = soon(sender.send_request(get("/"))).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["ecs-mesh-refusal"], "8 connect_failed");
    let line = agent.line().await;
    assert_eq!((line["refusal"].as_u64(), line["tries"].as_u64()), (Some(8), Some(2)), "{line}");

    let mut snapshot = snapshot(Protocol::Http, vec![local(named("a").await)]);
    snapshot.policy = Arc::new(denying());
    agent.publish(snapshot);
    assert_eq!(text(&mut sender, get("/")).await.0, 403, "the same connection, after the policy has changed");
    assert_eq!(agent.line().await["refusal.label"], "denied");
}

#[tokio::test]
async fn bodies_pass_unchanged_with_a_length_and_in_chunks() {
    const SIZE: usize = 9 << 20;
    let addr = app(|request| async move {
        let chunked = request.headers().contains_key("transfer-encoding");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let told = if chunked { "chunked" } else { "length" };
        Response::builder().header("x-told", told).body(Full::from(body)).expect("a response")
    })
    .await;
    let agent = Agent::new(Protocol::Auto, &[addr]);
    let data = noise(SIZE);
    let mut sender = client(&agent).await;
    let request = Request::post("/").header("host", "world").body(Full::from(data.clone())).expect("a request");
    let response = soon(sender.send_request(request)).await.unwrap();
    assert_eq!(response.headers()["x-told"], "length");
    assert!(soon(response.into_body().collect()).await.unwrap().to_bytes() == data);

    let mut client = agent.connect().await;
    let sent = data.clone();
    let (mut reading, mut writing) = client.split();
    let write = async {
        let head = b"POST / HTTP/1.1\r\nHost: world\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
        writing.write_all(head).await.unwrap();
        for chunk in sent.chunks(100_000) {
            writing.write_all(format!("{:x}\r\n", chunk.len()).as_bytes()).await.unwrap();
            writing.write_all(chunk).await.unwrap();
            writing.write_all(b"\r\n").await.unwrap();
        }
        writing.write_all(b"0\r\n\r\n").await.unwrap();
    };
    let ((), answer) = soon(async { tokio::join!(write, rest(&mut reading)) }).await;
    let head_end = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("a head") + 4;
    assert!(String::from_utf8_lossy(&answer[..head_end]).contains("x-told: chunked"));
    assert!(answer[head_end..] == data);
}

#[tokio::test]
async fn answers_in_chunks_come_with_their_trailers() {
    let answer =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 6\r\n\r\n";
    let agent = Agent::new(Protocol::Auto, &[canned(answer).await.0]);
    let mut client = agent.connect().await;
    client.write_all(b"GET / HTTP/1.1\r\nHost: w\r\nTE: trailers\r\nConnection: te, close\r\n\r\n").await.unwrap();
    let text = String::from_utf8(rest(&mut client).await).expect("text").to_lowercase();
    assert!(text.contains("3\r\nabc\r\n0\r\nx-sum: 6\r\n\r\n"), "{text}");
}

#[tokio::test]
async fn head_and_http_1_0_and_pipelines_are_understood() {
    let agent = Agent::new(Protocol::Auto, &[named("abc").await]);
    let mut client = agent.connect().await;
    let two = "HEAD / HTTP/1.1\r\nHost: w\r\n\r\nGET / HTTP/1.1\r\nHost: w\r\nConnection: close\r\n\r\n";
    client.write_all(two.as_bytes()).await.unwrap();
    let answers = String::from_utf8(rest(&mut client).await).expect("text");
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 2, "{answers}");
    assert_eq!(answers.matches("content-length: 3").count(), 2, "{answers}");
    assert!(answers.ends_with("\r\n\r\nabc") && answers.matches("abc").count() == 1, "{answers}");

    let mut client = agent.connect().await;
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let answer = String::from_utf8(rest(&mut client).await).expect("text");
    assert!(answer.starts_with("HTTP/1.0 200") && answer.ends_with("abc"), "{answer}");
}

#[tokio::test]
async fn a_client_may_wait_to_be_told_to_continue() {
    let addr =
        app(|request| async { Response::new(Full::new(request.into_body().collect().await.unwrap().to_bytes())) });
    let agent = Agent::new(Protocol::Auto, &[addr.await]);
    let mut client = agent.connect().await;
    let head = "POST / HTTP/1.1\r\nHost: w\r\nContent-Length: 4\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(until(&mut client, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"body").await.unwrap();
    assert!(rest(&mut client).await.ends_with(b"\r\n\r\nbody"));
}

#[tokio::test]
async fn after_an_upgrade_bytes_pass_both_ways() {
    let addr = server(|mut stream| async move {
        let head = until(&mut stream, "\r\n\r\n").await.to_lowercase();
        assert!(head.contains("upgrade: websocket") && head.contains("connection: upgrade"), "{head}");
        let agreed = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello";
        stream.write_all(agreed.as_bytes()).await.unwrap();
        let (mut reading, mut writing) = stream.split();
        tokio::io::copy(&mut reading, &mut writing).await.unwrap();
        writing.write_all(b"bye").await.unwrap();
    })
    .await;
    let mut agent = Agent::new(Protocol::Auto, &[addr]);
    let mut client = agent.connect().await;
    // The client speaks the new protocol before it has the server's consent.
    let asked = "GET /chat HTTP/1.1\r\nHost: w\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly ";
    client.write_all(asked.as_bytes()).await.unwrap();
    let head = until(&mut client, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    client.write_all(b"late").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut client).await, b"helloearly latebye");
    let line = agent.line().await;
    assert_eq!((line["http.status"].as_u64(), &line["outcome"]), (Some(101), &"ok".into()), "{line}");
    assert_eq!((line["bytes_sent"].as_u64(), line["bytes_received"].as_u64()), (Some(10), Some(18)), "{line}");
}

#[tokio::test]
async fn a_client_that_goes_in_the_middle_of_an_answer_takes_the_upstream_with_it() {
    let (tell, mut gone) = mpsc::channel(16);
    let addr = server(move |mut stream| {
        let tell = tell.clone();
        async move {
            until(&mut stream, "\r\n\r\n").await;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").await.unwrap();
            while stream.write_all(&[0; 65536]).await.is_ok() {}
            tell.try_send(()).unwrap_or_default();
        }
    })
    .await;
    let mut agent = Agent::new(Protocol::Auto, &[addr]);
    let mut client = agent.connect().await;
    client.write_all(b"GET / HTTP/1.1\r\nHost: w\r\n\r\n").await.unwrap();
    until(&mut client, "\r\n\r\n").await;
    drop(client);
    soon(gone.recv()).await.expect("the upstream is told");
    let line = agent.line().await;
    assert_eq!((&line["outcome"], line.get("refusal")), (&"aborted".into(), None), "{line}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_breaks_off_for_the_client_too() {
    let (addr, _heard) = canned("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await;
    let mut agent = Agent::new(Protocol::Auto, &[addr]);
    let mut client = agent.connect().await;
    client.write_all(b"GET / HTTP/1.1\r\nHost: w\r\n\r\n").await.unwrap();
    let answer = rest(&mut client).await;
    assert!(answer.ends_with(b"\r\n\r\nhalf"), "and nothing follows");
    assert_eq!(agent.line().await["refusal.label"], "upstream_reset");
}

#[tokio::test]
async fn an_answer_that_breaks_off_does_not_look_whole_to_a_client_of_http_1_0() {
    let (addr, _heard) = canned("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    let mut agent = Agent::new(Protocol::Auto, &[addr]);
    let mut client = agent.connect().await;
    client.write_all(b"GET / HTTP/1.0\r\nHost: w\r\n\r\n").await.unwrap();
    // To it, the end of the connection is the end of the body.
    let mut answer = Vec::new();
    let error = soon(client.read_to_end(&mut answer)).await.expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(agent.line().await["refusal.label"], "upstream_reset");
}

#[tokio::test]
async fn of_a_length_beside_chunks_the_client_hears_nothing() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ] {
        let (addr, _heard) = canned(answer).await;
        let agent = Agent::new(Protocol::Auto, &[addr]);
        let mut client = agent.connect().await;
        client.write_all(b"GET / HTTP/1.1\r\nHost: w\r\nConnection: close\r\n\r\n").await.unwrap();
        let heard = String::from_utf8(rest(&mut client).await).unwrap().to_lowercase();
        assert!(heard.starts_with("http/1.1 200") && heard.ends_with("\r\n\r\n3\r\nabc\r\n0\r\n\r\n"), "{heard}");
        assert!(!heard.contains("content-length"), "{heard}");
    }
}

#[tokio::test]
async fn what_is_no_answer_becomes_502() {
    for answer in ["", "SSH-2.0-x\r\n\r\n"] {
        let (addr, mut heard) = canned(answer).await;
        let mut agent = Agent::new(Protocol::Auto, &[addr]);
        let mut sender = client(&agent).await;
        assert_eq!(text(&mut sender, get("/")).await.0, 502);
        soon(heard.recv()).await.expect("it was asked");
        assert!(heard.try_recv().is_err(), "and not asked twice: it may have acted on the request");
        assert!(matches!(agent.line().await["refusal"].as_u64(), Some(16 | 22)));
    }
}

#[tokio::test]
async fn a_pooled_connection_that_died_costs_nothing() {
    // Each connection serves one request and is closed without saying so beforehand.
    let addr = server(|mut stream| async move {
        until(&mut stream, "\r\n\r\n").await;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        // The next request arrives, and is met by a close.
        drop(stream.read_u8().await);
    })
    .await;
    let agent = Agent::new(Protocol::Auto, &[addr]);
    let mut sender = client(&agent).await;
    for number in 0..5 {
        assert_eq!(text(&mut sender, get("/")).await, (200, "ok".into()), "request {number}");
    }
}

#[tokio::test]
async fn requests_that_two_readers_could_read_differently_are_refused() {
    for (case, head) in [
        ("two lengths", "POST / HTTP/1.1\r\nHost: w\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        ("not chunked last", "POST / HTTP/1.1\r\nHost: w\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        ("length is no number", "POST / HTTP/1.1\r\nHost: w\r\nContent-Length: +3\r\n\r\nabc"),
        ("space before colon", "GET / HTTP/1.1\r\nHost : w\r\n\r\n"),
        ("folded line", "GET / HTTP/1.1\r\nHost: w\r\nX: a\r\n b\r\n\r\n"),
        ("no host", "GET / HTTP/1.1\r\n\r\n"),
        ("two hosts", "GET / HTTP/1.1\r\nHost: w\r\nHost: x\r\n\r\n"),
        ("nul in a value", "GET / HTTP/1.1\r\nHost: w\r\nX: a\0b\r\n\r\n"),
    ] {
        let (addr, mut heard) = canned("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        let mut agent = Agent::new(Protocol::Auto, &[addr]);
        let mut client = agent.connect().await;
        client.write_all(head.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let answer = String::from_utf8(rest(&mut client).await).expect("text");
        assert!(answer.starts_with("HTTP/1.1 400"), "{case}: {answer}");
        assert!(heard.try_recv().is_err(), "{case}: nothing of it reaches the server");
        assert_eq!(agent.line().await["refusal.label"], "bad_request", "{case}");
    }
}

#[tokio::test]
async fn heads_are_bounded_far_above_what_servers_take() {
    let addr = app(|request| async move {
        let length = request.headers()["cookie"].len();
        Response::new(Full::from(length.to_string()))
    })
    .await;
    let agent = Agent::new(Protocol::Auto, &[addr]);
    let mut sender = client(&agent).await;
    let mut long = get("/");
    long.headers_mut().insert("cookie", "c".repeat(100 << 10).parse().unwrap());
    assert_eq!(text(&mut sender, long).await, (200, (100 << 10).to_string()));
    let mut longer = agent.connect().await;
    longer.write_all(b"GET / HTTP/1.1\r\nHost: w\r\nCookie: ").await.unwrap();
    // What comes after the refusal may meet a closed connection.
    drop(longer.write_all(&b"c".repeat(200 << 10)).await);
    let answer = String::from_utf8(rest(&mut longer).await).expect("text");
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test]
async fn a_length_beside_chunks_never_reaches_the_server() {
    for head in [
        "POST / HTTP/1.1\r\nHost: w\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: w\r\nTransfer-Encoding: chunked\r\nContent-Length: 6\r\nConnection: close\r\n\r\n",
    ] {
        let (addr, mut heard) = canned("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        let agent = Agent::new(Protocol::Auto, &[addr]);
        let mut client = agent.connect().await;
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(b"0\r\n\r\n").await.unwrap();
        client.shutdown().await.unwrap();
        let answer = String::from_utf8(rest(&mut client).await).expect("text");
        match heard.try_recv() {
            Ok(asked) => assert!(!asked.to_lowercase().contains("content-length"), "{asked}"),
            Err(_nothing) => assert!(answer.starts_with("HTTP/1.1 400"), "{answer}"),
        }
    }
}

#[tokio::test]
async fn a_client_that_dies_while_it_waits_takes_the_upstream_with_it() {
    let (tell, mut gone) = mpsc::channel(16);
    let addr = server(move |mut stream| {
        let tell = tell.clone();
        async move {
            until(&mut stream, "\r\n\r\n").await;
            tell.try_send(()).unwrap_or_default();
            // Never answers.
            drop(stream.read_u8().await);
            tell.try_send(()).unwrap_or_default();
        }
    })
    .await;
    let mut agent = Agent::new(Protocol::Http, &[addr]);
    let mut client = agent.connect().await;
    client.write_all(b"GET / HTTP/1.1\r\nHost: w\r\n\r\n").await.unwrap();
    soon(gone.recv()).await.expect("the upstream has the request");
    client.set_zero_linger().unwrap();
    drop(client);
    soon(gone.recv()).await.expect("the upstream is told");
    assert_eq!(agent.line().await["outcome"], "aborted");
}

#[tokio::test]
async fn a_client_that_ends_its_direction_still_gets_its_answer() {
    let agent = Agent::new(Protocol::Auto, &[named("abc").await]);
    let mut client = agent.connect().await;
    client.write_all(b"GET / HTTP/1.1\r\nHost: w\r\n\r\n").await.unwrap();
    client.shutdown().await.unwrap();
    assert!(rest(&mut client).await.ends_with(b"\r\n\r\nabc"));
}

#[tokio::test]
async fn an_answer_before_the_end_of_an_upload_arrives() {
    let refusing = server(|mut stream| async move {
        until(&mut stream, "\r\n\r\n").await;
        let answer = b"HTTP/1.1 413 Too Much\r\ncontent-length: 3\r\nconnection: close\r\n\r\nno\n";
        stream.write_all(answer).await.unwrap_or_default();
        // And reads no more.
        tokio::time::sleep(Duration::from_millis(200)).await;
    })
    .await;
    for _ in 0..4 {
        let agent = Agent::new(Protocol::Http, &[refusing]);
        let mut stream = agent.connect().await;
        stream.write_all(b"PUT / HTTP/1.1\r\nhost: world\r\ncontent-length: 64000000\r\n\r\n").await.unwrap();
        // More than all buffers on the way hold. Many clients send all before they read, and give up at the first
        // failure to send.
        soon(stream.write_all(&vec![7; 64_000_000])).await.unwrap();
        let answer = until(&mut stream, "no\n").await;
        assert!(answer.starts_with("HTTP/1.1 413 Too Much\r\n"), "{answer}");
    }
}

#[tokio::test]
async fn what_a_server_sent_before_it_broke_off_arrives() {
    let breaking = server(|mut stream| async move {
        until(&mut stream, "\r\n\r\n").await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n").await.unwrap();
    })
    .await;
    let agent = Agent::new(Protocol::Http, &[breaking]);
    let mut stream = agent.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: world\r\n\r\n").await.unwrap();
    let said = String::from_utf8(rest(&mut stream).await).unwrap();
    assert_eq!(said, "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n");
}
