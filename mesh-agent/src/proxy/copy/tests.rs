//! What TCP promises, through the copy: ends, resets, backpressure, every byte.

use std::{io::ErrorKind, sync::atomic::Ordering, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::*;

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("it happens in time")
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (ours, theirs) =
        tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), async { listener.accept().await.unwrap().0 });
    (ours.unwrap(), theirs)
}

/// A client and a server with a copy between them, and what the copy returns.
async fn between() -> (TcpStream, TcpStream, JoinHandle<(Outcome, u64, u64)>) {
    let ((client, source), (destination, server)) = (pair().await, pair().await);
    let copy = tokio::spawn(async move {
        let counts = Arc::<Counts>::default();
        let outcome = both_ways(Wire::tcp(source), Wire::tcp(destination), counts.clone()).await;
        (outcome, counts.sent.load(Ordering::Relaxed), counts.received.load(Ordering::Relaxed))
    });
    (client, server, copy)
}

async fn all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon(stream.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

async fn is_reset(stream: &mut TcpStream) {
    let error = soon(stream.read_u8()).await.expect_err("a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    let (mut client, mut server, copy) = between().await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(all(&mut server).await, b"question", "the end of the question arrives while the other way is open");
    server.write_all(b"a long answer").await.unwrap();
    drop(server);
    assert_eq!(all(&mut client).await, b"a long answer");
    assert_eq!(soon(copy).await.unwrap(), (Outcome::Ok, 8, 13));
}

#[tokio::test]
async fn the_server_may_end_first() {
    let (mut client, mut server, copy) = between().await;
    server.write_all(b"bye").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(all(&mut client).await, b"bye");
    client.write_all(b"late").await.unwrap();
    drop(client);
    assert_eq!(all(&mut server).await, b"late");
    assert_eq!(soon(copy).await.unwrap().0, Outcome::Ok);
}

#[tokio::test]
async fn a_reset_reaches_the_other_side_while_it_idles() {
    let (client, mut server, copy) = between().await;
    client.set_zero_linger().unwrap();
    drop(client);
    is_reset(&mut server).await;
    assert_eq!(soon(copy).await.unwrap().0, Outcome::Reset);

    let (mut client, server, copy) = between().await;
    server.set_zero_linger().unwrap();
    drop(server);
    is_reset(&mut client).await;
    assert_eq!(soon(copy).await.unwrap().0, Outcome::Reset);
}

#[tokio::test]
async fn a_reset_after_the_end_of_one_direction_reaches_the_other_side() {
    let (mut client, mut server, copy) = between().await;
    client.shutdown().await.unwrap();
    assert_eq!(all(&mut server).await, b"");
    client.set_zero_linger().unwrap();
    drop(client);
    // The server neither reads nor writes; it learns of the reset all the same.
    soon(server.ready(Interest::ERROR)).await.unwrap();
    assert_eq!(soon(copy).await.unwrap().0, Outcome::Reset);
}

#[tokio::test]
async fn what_a_dying_server_said_last_is_delivered() {
    let (mut client, mut server, copy) = between().await;
    server.write_all(b"last words").await.unwrap();
    let mut heard = [0; 10];
    soon(client.read_exact(&mut heard)).await.unwrap();
    drop(server);
    // The server is gone: what is sent now is answered by a reset, which must reach the client.
    let refused = soon(async {
        loop {
            if client.write_all(b"x").await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
    });
    refused.await;
    assert_eq!(&heard, b"last words");
    assert_eq!(soon(copy).await.unwrap().0, Outcome::Reset);
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let step = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(step).take(length).collect()
}

#[tokio::test]
async fn long_streams_pass_unchanged_both_ways_at_once() {
    let (client, server, copy) = between().await;
    let (up, down) = (noise(24 << 20), noise(17 << 20));
    let side = |stream: TcpStream, send: Vec<u8>| async move {
        let (mut reading, mut writing) = stream.into_split();
        let writer = tokio::spawn(async move {
            writing.write_all(&send).await.unwrap();
            writing.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        reading.read_to_end(&mut received).await.unwrap();
        writer.await.unwrap();
        received
    };
    let (at_client, at_server) =
        soon(async { tokio::join!(side(client, down.clone()), side(server, up.clone())) }).await;
    assert!(at_client == up && at_server == down);
    assert_eq!(soon(copy).await.unwrap(), (Outcome::Ok, down.len() as u64, up.len() as u64));
}

#[tokio::test]
async fn a_slow_reader_holds_the_writer_back_and_loses_nothing() {
    let ((client, source), (destination, mut server)) = (pair().await, pair().await);
    for socket in [&client, &source, &destination, &server] {
        let socket = socket2::SockRef::from(socket);
        socket.set_send_buffer_size(64 << 10).unwrap();
        socket.set_recv_buffer_size(64 << 10).unwrap();
    }
    let copy = tokio::spawn(async move {
        let counts = Arc::<Counts>::default();
        both_ways(Wire::tcp(source), Wire::tcp(destination), counts.clone()).await
    });
    let data = noise(1 << 20);
    let mut sent = 0;
    // Nobody reads. The kernel's buffers fill, and then nothing is taken any more: the proxy does not hoard.
    loop {
        let rest = &data[sent % data.len()..];
        match tokio::time::timeout(Duration::from_millis(300), client.writable()).await {
            Ok(ready) => ready.unwrap(),
            Err(_full) => break,
        }
        match client.try_write(rest) {
            Ok(n) => sent += n,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        assert!(sent < 8 << 20, "somebody hoards");
    }
    let expected: Vec<u8> = data.iter().copied().cycle().take(sent).collect();
    drop(client);
    assert!(all(&mut server).await == expected, "{sent} bytes");
    drop(server);
    assert_eq!(soon(copy).await.unwrap(), Outcome::Ok);
}

#[tokio::test]
async fn what_was_read_before_comes_first() {
    let ((client, source), (destination, mut server)) = (pair().await, pair().await);
    let source = Wire::tcp(source).rewound(Bytes::from_static(b"early "));
    let copy = tokio::spawn(async move { both_ways(source, Wire::tcp(destination), Arc::default()).await });
    let mut client = client;
    client.write_all(b"and late").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(all(&mut server).await, b"early and late");
    drop((client, server));
    soon(copy).await.unwrap();
}

proptest::proptest! {
    #[test]
    fn what_several_pieces_left_is_what_was_not_written(lengths in [0_usize..5, 0_usize..5, 0..5, 0..5], gone in 0_usize..20) {
        let whole: Vec<u8> = (0..20).collect();
        let mut from = 0;
        let pieces = lengths.map(|length| {
            from += length;
            Bytes::copy_from_slice(&whole[from - length..from])
        });
        let gone = gone.min(from);
        proptest::prop_assert_eq!(&rest(&pieces, gone)[..], &whole[gone..from]);
    }
}
