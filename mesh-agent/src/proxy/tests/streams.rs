//! Byte streams, and the finding out that they are.

use std::{io::ErrorKind, time::Instant};

use tokio::io::AsyncWriteExt as _;

use super::*;

async fn echo(mut stream: TcpStream) {
    let (mut reading, mut writing) = stream.split();
    drop(tokio::io::copy(&mut reading, &mut writing).await);
    drop(writing.shutdown().await);
}

/// A server that greets first, as SMTP and MySQL do.
async fn greeter() -> SocketAddr {
    server(|mut stream| async move {
        stream.write_all(b"220 ready\r\n").await.unwrap();
        echo(stream).await;
    })
    .await
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_at_once() {
    let mut agent = Agent::new(Protocol::Auto, &[greeter().await]);
    for attempt in 0..3 {
        let began = Instant::now();
        let mut client = agent.connect().await;
        assert_eq!(until(&mut client, "\r\n").await, "220 ready\r\n");
        assert!(began.elapsed() < Duration::from_millis(200), "attempt {attempt} took {:?}", began.elapsed());
        client.write_all(b"QUIT\r\n").await.unwrap();
        assert_eq!(until(&mut client, "\r\n").await, "QUIT\r\n");
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut client).await, b"");
        let line = agent.line().await;
        assert_eq!((&line["protocol"], &line["outcome"]), (&"tcp".into(), &"ok".into()), "{line}");
        assert_eq!((line["bytes_sent"].as_u64(), line["bytes_received"].as_u64()), (Some(6), Some(17)));
        assert_eq!((&line["src.task"], &line["dst.task"]), (&"web-1".into(), &"world-1".into()));
        assert_eq!(line["dst.addr"], VIP);
    }
}

#[tokio::test]
async fn a_client_that_speaks_first_and_not_http_gets_a_byte_stream() {
    let mut agent = Agent::new(Protocol::Auto, &[server(echo).await]);
    for _ in 0..2 {
        let mut client = agent.connect().await;
        client.write_all(b"*1\r\n$4\r\nPING\r\n").await.unwrap();
        assert_eq!(until(&mut client, "PING\r\n").await, "*1\r\n$4\r\nPING\r\n");
        drop(client);
        assert_eq!(agent.line().await["protocol"], "tcp");
    }
}

#[tokio::test]
async fn something_like_the_start_of_a_request_is_not_waited_for() {
    let agent = Agent::new(Protocol::Auto, &[server(echo).await]);
    let mut client = agent.connect().await;
    client.write_all(b"G").await.unwrap();
    assert_eq!(until(&mut client, "G").await, "G");
}

#[tokio::test]
async fn a_client_that_only_listens_and_ends_is_passed_on() {
    let agent = Agent::new(
        Protocol::Auto,
        &[server(|mut stream| async move {
            let all = rest(&mut stream).await;
            stream.write_all(format!("{} bytes", all.len()).as_bytes()).await.unwrap();
        })
        .await],
    );
    let mut client = agent.connect().await;
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut client).await, b"0 bytes");
}

#[tokio::test]
async fn a_dead_endpoint_costs_another_attempt() {
    let mut agent = Agent::new(Protocol::Tcp, &[nobody().await, nobody().await, server(echo).await]);
    for _ in 0..4 {
        let mut client = agent.connect().await;
        client.write_all(b"x").await.unwrap();
        assert_eq!(until(&mut client, "x").await, "x");
        drop(client);
        let line = agent.line().await;
        assert!(line.get("refusal").is_none() && line["tries"].as_u64() <= Some(3), "{line}");
    }
}

#[tokio::test]
async fn when_all_are_dead_the_client_is_reset_and_told_why() {
    for protocol in [Protocol::Tcp, Protocol::Auto] {
        let mut agent = Agent::new(protocol, &[nobody().await, nobody().await]);
        let mut client = agent.connect().await;
        let error = soon(client.read_u8()).await.expect_err("a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let line = agent.line().await;
        assert_eq!((line["refusal"].as_u64(), line["tries"].as_u64()), (Some(8), Some(2)), "{line}");
        assert_eq!(line["outcome"], "refused");
        let metrics = agent.proxy.telemetry.metrics.encode();
        assert!(metrics.contains(r#"number="8",refusal="connect_failed"} 1"#), "{metrics}");
    }
}

#[tokio::test]
async fn policy_and_unknown_ports_refuse_with_their_number() {
    let mut agent = Agent::new(Protocol::Tcp, &[server(echo).await]);
    let mut client = TcpStream::connect(agent.listen_for("240.240.0.1:81").await).await.unwrap();
    assert_eq!(soon(client.read_u8()).await.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    assert_eq!(agent.line().await["refusal.label"], "unknown_port");

    let mut snapshot = snapshot(Protocol::Tcp, vec![local(server(echo).await)]);
    snapshot.policy = Arc::new(denying());
    agent.publish(snapshot);
    let mut client = agent.connect().await;
    assert_eq!(soon(client.read_u8()).await.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    let line = agent.line().await;
    assert_eq!((&line["refusal.label"], &line["src.service"]), (&"denied".into(), &"web".into()), "{line}");
}

#[tokio::test]
async fn draining_closes_the_door_and_waits_for_who_is_inside() {
    let agent = Agent::new(Protocol::Tcp, &[server(echo).await]);
    let listener = agent.listen().await;
    let mut client = TcpStream::connect(listener).await.unwrap();
    client.write_all(b"a").await.unwrap();
    assert_eq!(until(&mut client, "a").await, "a");
    agent.proxy.drain();
    soon(async { while TcpStream::connect(listener).await.is_ok() {} }).await;
    assert_eq!(agent.proxy.connections(), 1);
    client.write_all(b"b").await.unwrap();
    assert_eq!(until(&mut client, "b").await, "b", "the stream goes on");
    drop(client);
    soon(agent.proxy.idle()).await;
}

#[tokio::test]
async fn endpoints_in_use_are_known_to_the_balancer() {
    let addr = server(echo).await;
    let agent = Agent::new(Protocol::Tcp, &[addr]);
    let mut client = agent.connect().await;
    client.write_all(b"a").await.unwrap();
    until(&mut client, "a").await;
    assert_eq!(agent.proxy.load(&EndpointId::of(addr)).in_flight, 1);
    drop(client);
    soon(agent.proxy.idle()).await;
    assert_eq!(agent.proxy.load(&EndpointId::of(addr)).in_flight, 0);
}

#[tokio::test]
async fn connections_end_with_the_task_at_either_end() {
    let mut agent = Agent::new(Protocol::Tcp, &[server(echo).await]);
    let mut client = agent.connect().await;
    client.write_all(b"a").await.unwrap();
    until(&mut client, "a").await;
    agent.proxy.namespaces.remove(&task("world-1"));
    assert_eq!(soon(client.read_u8()).await.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    assert_eq!(agent.line().await["outcome"], "reset");
    let mut client = agent.connect().await;
    soon(client.read_u8()).await.expect_err("a reset");
    assert_eq!(agent.line().await["refusal.label"], "task_gone");

    let agent = Agent::new(Protocol::Tcp, &[server(echo).await]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let place = Place { netns: 0, who: Who::Task(web()), originals: Originals::Fixed(VIP.parse().unwrap()) };
    let serving = tokio::spawn(serve(&agent.proxy, listener, place));
    let mut client = TcpStream::connect(addr).await.unwrap();
    client.write_all(b"a").await.unwrap();
    until(&mut client, "a").await;
    serving.abort();
    assert!(matches!(soon(client.read(&mut [0])).await, Ok(0) | Err(_)));
    soon(agent.proxy.idle()).await;
}
