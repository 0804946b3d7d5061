//! One tunnel is one TCP connection to its users: order, half-close, resets, backpressure.

use std::{io, task::Poll};

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

#[tokio::test]
async fn bytes_go_round_and_each_side_knows_the_other() {
    let (_dialer, _server, mut ours, mut theirs) = pair().await;
    assert_eq!(*ours.peer(), id("world"));
    assert_eq!(*theirs.peer(), id("web"));
    ours.write_all(b"ping").await.unwrap();
    let mut four = [0; 4];
    soon(theirs.read_exact(&mut four)).await.unwrap();
    assert_eq!(&four, b"ping");
    theirs.write_all(b"pong").await.unwrap();
    soon(ours.read_exact(&mut four)).await.unwrap();
    assert_eq!(&four, b"pong");
}

#[tokio::test]
async fn the_server_may_speak_first() {
    let (_dialer, _server, mut ours, mut theirs) = pair().await;
    theirs.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    soon(ours.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
}

async fn half_close(mut closing: Tunnel, mut other: Tunnel) {
    closing.write_all(b"question").await.unwrap();
    closing.shutdown().await.unwrap();
    assert_eq!(closing.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let mut all = Vec::new();
    soon(other.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all, b"question");
    // The other direction still works, also long after.
    other.write_all(b"answer").await.unwrap();
    other.shutdown().await.unwrap();
    drop(other);
    let mut all = Vec::new();
    soon(closing.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all, b"answer");
}

#[tokio::test]
async fn half_close_by_the_caller() {
    let (_dialer, _server, ours, theirs) = pair().await;
    half_close(ours, theirs).await;
}

#[tokio::test]
async fn half_close_by_the_called() {
    let (_dialer, _server, ours, theirs) = pair().await;
    half_close(theirs, ours).await;
}

async fn reset(dropped: Tunnel, mut other: Tunnel) {
    drop(dropped);
    let error = soon(other.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let error = other.write(b"into the void").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_caller_that_drops_resets() {
    let (_dialer, _server, ours, theirs) = pair().await;
    reset(ours, theirs).await;
}

#[tokio::test]
async fn a_called_that_drops_resets() {
    let (_dialer, _server, ours, theirs) = pair().await;
    reset(theirs, ours).await;
}

#[tokio::test]
async fn a_writer_that_waits_for_room_hears_of_a_reset() {
    let (_dialer, _server, mut ours, theirs) = pair().await;
    let writer = tokio::spawn(async move {
        let piece = vec![0; 64 << 10];
        loop {
            if let Err(error) = ours.write_all(&piece).await {
                return error.kind();
            }
        }
    });
    let (mut receiving, sending) = theirs.into_split();
    soon(receiving.read_exact(&mut [0; 1024])).await.unwrap();
    drop((receiving, sending));
    assert_eq!(soon(writer).await.unwrap(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_lost_connection_is_a_reset() {
    let (_dialer, server, mut ours, theirs) = pair().await;
    server.task.abort();
    let error = soon(ours.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    drop(theirs);
}

/// Position-dependent content, so that loss, repetition and reordering all show.
fn pattern(at: usize) -> u8 {
    (at % 251) as u8
}

async fn send_all(tunnel: &mut crate::transport::tunnel::Sending, total: usize) {
    let mut at = 0;
    while at < total {
        let length = (total - at).min(100_000);
        let piece: Vec<u8> = (at..at + length).map(pattern).collect();
        tunnel.write_all(&piece).await.unwrap();
        at += length;
    }
    tunnel.shutdown().await.unwrap();
}

async fn receive_all(tunnel: &mut crate::transport::tunnel::Receiving) -> usize {
    let mut at = 0;
    while let Some(data) = std::future::poll_fn(|cx| tunnel.poll_data(cx)).await.unwrap() {
        for byte in data {
            assert_eq!(byte, pattern(at), "at {at}");
            at += 1;
        }
    }
    at
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_goes_both_ways_at_once() {
    const TOTAL: usize = 64 << 20;
    let (_dialer, _server, ours, theirs) = pair().await;
    let one_side = |tunnel: Tunnel| async move {
        let (mut receiving, mut sending) = tunnel.into_split();
        let sent = tokio::spawn(async move { send_all(&mut sending, TOTAL).await });
        let received = receive_all(&mut receiving).await;
        sent.await.unwrap();
        received
    };
    let (left, right) = (tokio::spawn(one_side(ours)), tokio::spawn(one_side(theirs)));
    assert_eq!((soon(left).await.unwrap(), soon(right).await.unwrap()), (TOTAL, TOTAL));
}

/// Writes until there is no more room, and returns how much fitted.
async fn fill(tunnel: &mut Tunnel) -> usize {
    let piece = vec![7; 64 << 10];
    let mut written = 0;
    // Nobody reads, so a pause without room is the end; no event tells of something that does not happen.
    while let Ok(room) = tokio::time::timeout(Duration::from_millis(300), tunnel.write(&piece)).await {
        written += room.unwrap();
        assert!(written < 64 << 20, "a reader that does not read must stop the writer");
    }
    written
}

#[tokio::test]
async fn a_reader_that_does_not_read_stops_the_writer() {
    let (_dialer, _server, mut ours, mut theirs) = pair().await;
    let written = fill(&mut ours).await;
    // One stream window and what may wait to be sent.
    assert!((1 << 20..=2 << 20).contains(&written), "{written}");
    ours.shutdown().await.unwrap();
    let mut all = Vec::new();
    soon(theirs.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all.len(), written, "nothing of it is lost");
}

#[tokio::test]
async fn stalled_streams_do_not_stop_their_neighbours() {
    let identities = identities();
    let (tell, mut accepted) = mpsc::channel(1024);
    let server = accepting(identities.clone(), move |request: Request| {
        let tell = tell.clone();
        async move { drop(tell.send(request.accept().unwrap()).await) }
    })
    .await;
    let dialer = dialer(&identities);
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let mut ours = soon(dialer.open(&server.to())).await.unwrap();
        let theirs = soon(accepted.recv()).await.unwrap();
        fill(&mut ours).await;
        stalled.push((ours, theirs));
    }
    let mut ours = soon(dialer.open(&server.to())).await.unwrap();
    let mut theirs = soon(accepted.recv()).await.unwrap();
    assert_eq!(dialer.figures().handshakes, 1, "all on one connection");
    ours.write_all(b"through").await.unwrap();
    soon(theirs.read_exact(&mut [0; 7])).await.unwrap();
    drop(stalled);
}

#[tokio::test]
async fn pieces_are_sent_without_a_copy() {
    let (_dialer, _server, ours, theirs) = pair().await;
    let (_receiving, mut sending) = ours.into_split();
    let mut data = Bytes::from(vec![1; 300_000]);
    let mut sent = 0;
    while !data.is_empty() {
        sent += soon(std::future::poll_fn(|cx| sending.poll_send(cx, &mut data))).await.unwrap();
    }
    assert_eq!(sent, 300_000);
    let none = std::future::poll_fn(|cx| Poll::Ready(sending.poll_send(cx, &mut Bytes::new()))).await;
    assert!(matches!(none, Poll::Ready(Ok(0))));
    sending.shutdown().await.unwrap();
    let mut all = Vec::new();
    let (mut receiving, _sending) = theirs.into_split();
    soon(receiving.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all.len(), 300_000);
}
