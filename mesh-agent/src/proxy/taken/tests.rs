//! Applications that end in every order that matters: nothing runs between the steps of a test, so each order is certain.

use std::{
    future::poll_fn,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener},
};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::proxy::tests::soon;

/// A connection to an application, which blocks, and has read `early`.
async fn connected() -> (TcpStream, std::net::TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let mut app = listener.accept().unwrap().0;
    ours.write_all(b"early").await.unwrap();
    app.read_exact(&mut [0; 5]).unwrap();
    (ours, app)
}

/// What is said when the end has been read.
async fn settled(stream: &mut TcpStream, written: u64) -> u64 {
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0, "it ends in order");
    let mut settling = Settling::default();
    let taken = poll_fn(|cx| settling.poll(cx, stream, None, written));
    let taken = soon(taken).await;
    assert!(!settling.is_under_way());
    taken
}

#[tokio::test]
async fn what_meets_a_closed_connection_was_not_taken() {
    let (mut ours, app) = connected().await;
    drop(app);
    ours.write_all(b"late").await.unwrap();
    assert_eq!(settled(&mut ours, 9).await, 5);
}

#[tokio::test]
async fn nor_was_what_meets_one_that_is_shut_down_both_ways() {
    let (mut ours, app) = connected().await;
    app.shutdown(Shutdown::Both).unwrap();
    ours.write_all(b"late").await.unwrap();
    assert_eq!(settled(&mut ours, 9).await, 5);
}

#[tokio::test]
async fn what_was_read_before_the_end_was_taken() {
    let (mut ours, mut app) = connected().await;
    ours.write_all(b"late").await.unwrap();
    app.read_exact(&mut [0; 4]).unwrap();
    drop(app);
    assert_eq!(settled(&mut ours, 9).await, 9);
}

#[tokio::test]
async fn so_was_what_may_be_read_after_it() {
    // An application that ends its answers may read what comes after that, today or tomorrow.
    for reads in [false, true] {
        let (mut ours, mut app) = connected().await;
        app.shutdown(Shutdown::Write).unwrap();
        ours.write_all(b"late").await.unwrap();
        if reads {
            app.read_exact(&mut [0; 4]).unwrap();
        }
        assert_eq!(settled(&mut ours, 9).await, 9, "read: {reads}");
    }
}

#[tokio::test]
async fn an_end_with_nothing_under_way_is_settled_at_once() {
    let (mut ours, mut app) = connected().await;
    app.write_all(b"bye").unwrap();
    drop(app);
    ours.read_exact(&mut [0; 3]).await.unwrap();
    assert_eq!(settled(&mut ours, 5).await, 5);
}
