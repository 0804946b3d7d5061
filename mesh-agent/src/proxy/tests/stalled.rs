//! Streams of small pieces that nobody takes: they wait, nothing of them is lost, and nobody else on the connection notices.

use std::io::ErrorKind;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::mpsc,
};

use super::{leaving::tunnels, *};
use crate::{
    proxy::{
        copy,
        wire::{Socket, Wire},
    },
    transport::{To, tunnel::Tunnel},
};

/// Pieces for each stream. h2 charges a connection for what small frames waste, this many of them with more than half of
/// what it bears; and all of them fit into one stream's window.
const PIECES: usize = 130_000;
const STREAMS: usize = 3;

/// A listener whose connections hold little, so that what nobody takes comes to a stop early.
fn narrow() -> TcpListener {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(8 << 10).unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    socket.listen(64).unwrap()
}

async fn connect(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap();
    socket.connect(to).await.unwrap()
}

fn pieces(stream: usize) -> impl Iterator<Item = [u8; 2]> {
    (0..PIECES).map(move |number| [(number % 251) as u8, stream as u8])
}

/// Hands all pieces to h2. An error here is the end of the connection.
async fn write(tunnel: &mut Tunnel, stream: usize) -> std::io::Result<()> {
    for (number, piece) in pieces(stream).enumerate() {
        tunnel.write_all(&piece).await?;
        if number % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_application_that_takes_no_small_pieces_stops_no_other() {
    let (tell, mut apps) = mpsc::channel(16);
    let identities = Identities::new(ca("demo.mesh"), DAY);
    let agent = tunnels(identities.clone(), move |tunnel| {
        let tell = tell.clone();
        async move {
            let listener = narrow();
            let (app, ours) = tokio::join!(connect(listener.local_addr().unwrap()), listener.accept());
            tell.send(app).await.unwrap();
            let tunnel = Wire::new(Socket::Tunnel(Box::new(tunnel)));
            copy::both_ways(tunnel, Wire::tcp(ours.unwrap().0), Arc::default()).await;
        }
    })
    .await;
    let dialer = Dialer::new(identities, Settings::default()).unwrap();
    let authority = "10.90.1.11:8080".parse().unwrap();
    let to = To { agent, authority, from: id("web"), expect: id("world"), elsewhere: false };
    let mut stalled = Vec::new();
    for stream in 0..STREAMS {
        let mut tunnel = soon(dialer.open(&to)).await.unwrap();
        let app = soon(apps.recv()).await.unwrap();
        soon(write(&mut tunnel, stream)).await.expect("the connection goes on");
        stalled.push((tunnel, app));
    }
    let mut neighbour = soon(dialer.open(&to)).await.unwrap();
    let mut app = soon(apps.recv()).await.unwrap();
    neighbour.write_all(b"through").await.unwrap();
    soon(app.read_exact(&mut [0; 7])).await.unwrap();
    assert_eq!(dialer.figures().handshakes, 1, "all on one connection");
    for (stream, (mut tunnel, mut app)) in stalled.into_iter().enumerate() {
        tunnel.shutdown().await.unwrap();
        let expected: Vec<u8> = pieces(stream).flatten().collect();
        assert!(rest(&mut app).await == expected, "nothing is lost or out of order");
    }
}

#[tokio::test]
async fn a_client_that_takes_no_small_chunks_stops_no_other() {
    let (tell, mut told) = mpsc::channel(16);
    let identities = Identities::new(ca("demo.mesh"), DAY);
    let tunnels = tunnels(identities.clone(), move |mut tunnel| {
        let tell = tell.clone();
        async move {
            let asked = until(&mut tunnel, "\r\n\r\n").await;
            if asked.starts_with("GET /neighbour") {
                tunnel.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                tell.send(Ok(())).await.unwrap();
                drop(rest(&mut tunnel).await);
                return;
            }
            tunnel.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
            let mut sent = Ok(());
            for number in 0..PIECES {
                sent = sent.and(tunnel.write_all(b"1\r\n.\r\n").await);
                if number % 64 == 0 {
                    tokio::task::yield_now().await;
                }
            }
            sent = sent.and(tunnel.write_all(b"0\r\n\r\n").await);
            tell.send(sent.map_err(|error| error.kind())).await.unwrap();
            drop(rest(&mut tunnel).await);
        }
    })
    .await;
    let agent = Agent::with(identities);
    let app = "127.0.0.1:1".parse().unwrap();
    agent.publish(snapshot(Protocol::Http, vec![endpoint(app, Reach::Tunnel { agent: tunnels }, &id("world"))]));
    let listener = narrow();
    let at = listener.local_addr().unwrap();
    let place = Place { netns: 0, who: Who::Task(web()), originals: Originals::Fixed(VIP.parse().unwrap()) };
    tokio::spawn(serve(&agent.proxy, listener, place));
    let mut stalled = Vec::new();
    for _ in 0..STREAMS {
        let mut client = connect(at).await;
        client.write_all(b"GET /stalled HTTP/1.1\r\nhost: world\r\nconnection: close\r\n\r\n").await.unwrap();
        let sent: Result<(), ErrorKind> = soon(told.recv()).await.unwrap();
        sent.expect("the connection goes on");
        stalled.push(client);
    }
    let mut neighbour = connect(at).await;
    neighbour.write_all(b"GET /neighbour HTTP/1.1\r\nhost: world\r\n\r\n").await.unwrap();
    assert!(until(&mut neighbour, "\r\n\r\n").await.starts_with("HTTP/1.1 204"));
    assert_eq!(agent.proxy.dialer.figures().handshakes, 1, "all on one connection");
    for mut client in stalled {
        let answer = rest(&mut client).await;
        assert!(answer.ends_with(b"\r\n0\r\n\r\n"), "it is whole");
        assert_eq!(answer.iter().filter(|byte| **byte == b'.').count(), PIECES + 1, "with that of the version");
    }
}
