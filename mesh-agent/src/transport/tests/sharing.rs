//! Many streams, few handshakes; and what happens when a connection or a certificate grows old.

use std::time::SystemTime;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// Accepts everything and sends back what it gets.
async fn echoing(identities: &Identities) -> Accepting {
    accepting(identities.clone(), |request: Request| async move {
        let (mut receiving, mut sending) = request.accept().unwrap().into_split();
        drop(tokio::io::copy(&mut receiving, &mut sending).await);
        drop(sending.shutdown().await);
    })
    .await
}

async fn round(tunnel: &mut Tunnel) {
    tunnel.write_all(b"round").await.unwrap();
    let mut back = [0; 5];
    soon(tunnel.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"round");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_streams_at_once_take_two_handshakes() {
    let identities = identities();
    let server = echoing(&identities).await;
    let dialer = dialer(&identities);
    let opening: Vec<_> = (0..200)
        .map(|_| {
            let (dialer, to) = (dialer.clone(), server.to());
            tokio::spawn(async move {
                let mut tunnel = dialer.open(&to).await.unwrap();
                round(&mut tunnel).await;
                tunnel
            })
        })
        .collect();
    let mut open = Vec::new();
    for tunnel in opening {
        open.push(soon(tunnel).await.unwrap());
    }
    let figures = dialer.figures();
    assert_eq!((figures.handshakes, figures.connections, figures.streams), (2, 2, 200));
    drop(open);
    assert_eq!(dialer.figures().streams, 0, "places are given back");
    round(&mut soon(dialer.open(&server.to())).await.unwrap()).await;
    assert_eq!(dialer.figures().handshakes, 2, "and used again");
}

#[tokio::test]
async fn many_short_streams_share_one_connection() {
    let identities = identities();
    let server = echoing(&identities).await;
    let dialer = dialer(&identities);
    for _ in 0..500 {
        let mut tunnel = soon(dialer.open(&server.to())).await.unwrap();
        round(&mut tunnel).await;
        tunnel.shutdown().await.unwrap();
        assert_eq!(soon(tunnel.read(&mut [0; 8])).await.unwrap(), 0);
    }
    assert_eq!(dialer.figures().handshakes, 1);
}

#[tokio::test]
async fn one_failed_attempt_is_shared_by_all_who_wait() {
    let server = echoing(&identities()).await;
    let strangers = dialer(&identities());
    let opening: Vec<_> = (0..50)
        .map(|_| {
            let (dialer, to) = (strangers.clone(), server.to());
            tokio::spawn(async move { dialer.open(&to).await.err().unwrap().refusal })
        })
        .collect();
    for refusal in opening {
        assert_eq!(soon(refusal).await.unwrap(), Refusal::UntrustedPeer);
    }
    let mut failed = server.failed;
    let mut handshakes = 0;
    while failed.try_recv().is_ok() {
        handshakes += 1;
    }
    assert!(handshakes <= 2, "{handshakes} handshakes for one herd");
}

#[tokio::test]
async fn workloads_do_not_share_connections() {
    let identities = identities();
    let server = echoing(&identities).await;
    let dialer = dialer(&identities);
    let _web = soon(dialer.open(&server.to())).await.unwrap();
    let _batch = soon(dialer.open(&server.to_as("batch", &id("world")))).await.unwrap();
    assert_eq!(dialer.figures().handshakes, 2);
}

#[tokio::test]
async fn a_caller_that_gives_up_does_not_spoil_it_for_others() {
    let identities = identities();
    let server = echoing(&identities).await;
    let dialer = dialer(&identities);
    let to = server.to();
    let first = tokio::spawn({
        let (dialer, to) = (dialer.clone(), to.clone());
        async move { drop(dialer.open(&to).await) }
    });
    // The first has asked for the connection; abort it while it waits, or just after.
    tokio::task::yield_now().await;
    first.abort();
    round(&mut soon(dialer.open(&to)).await.unwrap()).await;
    assert_eq!(dialer.figures().handshakes, 1);
}

#[tokio::test]
async fn renewal_swaps_the_certificate_and_breaks_no_stream() {
    let identities = identities();
    let server = echoing(&identities).await;
    let dialer = dialer(&identities);
    let mut old = soon(dialer.open(&server.to())).await.unwrap();
    round(&mut old).await;
    identities.renew(&id("web")).unwrap();
    identities.renew(&id("world")).unwrap();
    let mut new = soon(dialer.open(&server.to())).await.unwrap();
    assert_eq!(dialer.figures().handshakes, 2, "a new certificate, a new connection");
    round(&mut old).await;
    round(&mut new).await;
}

#[tokio::test]
async fn idle_connections_are_closed_and_busy_ones_kept() {
    let identities = identities();
    let server = echoing(&identities).await;
    let settings = Settings { idle_timeout: Duration::from_millis(100), ..settings() };
    let dialer = Dialer::new(identities, settings).unwrap();
    let mut busy = soon(dialer.open(&server.to())).await.unwrap();
    drop(soon(dialer.open(&server.to_as("batch", &id("world")))).await.unwrap());
    soon(async {
        while dialer.figures().connections > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    round(&mut busy).await;
    assert_eq!(dialer.figures().connections, 1);
}

#[tokio::test]
async fn a_dead_pooled_connection_costs_one_more_attempt() {
    let identities = identities();
    let first = echoing(&identities).await;
    let dialer = dialer(&identities);
    let to = first.to();
    drop(soon(dialer.open(&to)).await.unwrap());
    // The agent there dies and is started again at the same address.
    first.task.abort();
    drop(soon(first.task).await);
    let listener = TcpListener::bind(first.addr).await.unwrap();
    let acceptance = Acceptance {
        presents: Arc::new(|_, _| Some(id("world"))),
        failed: Arc::new(|_| {}),
        handshake_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(1),
    };
    let (_drain, draining) = watch::channel(false);
    tokio::spawn(serving(
        listener,
        identities.clone(),
        acceptance,
        |request: Request| async move {
            let mut tunnel = request.accept().unwrap();
            drop(tunnel.write_all(b"again").await);
            drop(tunnel.shutdown().await);
            drop(tunnel.read(&mut [0]).await);
        },
        draining,
    ));
    let mut tunnel = soon(dialer.open(&to)).await.unwrap();
    soon(tunnel.read_exact(&mut [0; 5])).await.unwrap();
    assert_eq!(dialer.figures().handshakes, 2);
}

#[tokio::test]
async fn draining_lets_streams_finish_and_takes_no_more() {
    let identities = identities();
    let server = echoing(&identities).await;
    let dialer = dialer(&identities);
    let to = server.to();
    let mut old = soon(dialer.open(&to)).await.unwrap();
    round(&mut old).await;
    server.drain.send_replace(true);
    // Refused by the closed listener, once the pooled connection has said that it goes away.
    let refusal = soon(async {
        loop {
            match dialer.open(&to).await {
                Ok(tunnel) => drop(tunnel),
                Err(error) => break error.refusal,
            }
        }
    })
    .await;
    assert_eq!(refusal, Refusal::ConnectFailed);
    round(&mut old).await;
    old.shutdown().await.unwrap();
    assert_eq!(soon(old.read(&mut [0; 8])).await.unwrap(), 0);
    drop(old);
    soon(server.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn draining_ends_in_time_whatever_the_streams_do() {
    let identities = identities();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let acceptance = Acceptance {
        presents: Arc::new(|_, _| Some(id("world"))),
        failed: Arc::new(|_| {}),
        handshake_timeout: Duration::from_secs(5),
        drain: Duration::from_millis(100),
    };
    let (drain, draining) = watch::channel(false);
    let (tell, mut handled) = mpsc::channel(1);
    let task = tokio::spawn(serving(
        listener,
        identities.clone(),
        acceptance,
        move |request: Request| {
            let tell = tell.clone();
            async move {
                let mut tunnel = request.accept().unwrap();
                drop(tunnel.read(&mut [0]).await);
                tell.send(()).await.unwrap();
            }
        },
        draining,
    ));
    let to = To {
        agent: addr,
        authority: "10.0.0.1:80".parse().unwrap(),
        from: id("web"),
        expect: id("world"),
        elsewhere: false,
    };
    let mut open = soon(dialer(&identities).open(&to)).await.unwrap();
    drop(drain);
    soon(task).await.unwrap().unwrap();
    let error = soon(open.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    soon(handled.recv()).await.expect("who carried it heard of it, too");
}

#[tokio::test]
async fn a_connection_is_not_used_beyond_its_certificates() {
    // One second of validity for everybody: the leaf expires, is issued anew, and the connection with it.
    let identities = Identities::new(ca("demo.mesh"), Duration::from_secs(2));
    let server = echoing(&identities).await;
    let dialer = dialer(&identities);
    let mut old = soon(dialer.open(&server.to())).await.unwrap();
    let end = identities.leaf(&id("web")).unwrap().not_after;
    tokio::time::sleep(end.duration_since(SystemTime::now()).unwrap_or_default()).await;
    let mut new = soon(dialer.open(&server.to())).await.unwrap();
    assert_eq!(dialer.figures().handshakes, 2);
    round(&mut old).await;
    round(&mut new).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_off_downloads_leave_the_connection_whole() {
    // More in all than the connection's window, and more resets in flight than h2 remembers by default: what was sent
    // but never read must be granted again, and must not count against the connection.
    let identities = identities();
    let server = accepting(identities.clone(), |request: Request| async move {
        let mut tunnel = request.accept().unwrap();
        let piece = vec![0; 64 << 10];
        while tunnel.write_all(&piece).await.is_ok() {}
    })
    .await;
    let dialer = dialer(&identities);
    for _ in 0..4 {
        let mut open = Vec::new();
        for _ in 0..90 {
            let mut tunnel = soon(dialer.open(&server.to())).await.unwrap();
            soon(tunnel.read_exact(&mut [0; 1000])).await.unwrap();
            open.push(tunnel);
        }
        drop(open);
    }
    assert_eq!(dialer.figures().handshakes, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openings_given_up_leave_the_connection_whole() {
    let identities = identities();
    // Nobody is ever answered.
    let server = accepting(identities.clone(), |request: Request| async move {
        std::future::pending::<()>().await;
        drop(request);
    })
    .await;
    let dialer = dialer(&identities);
    for _ in 0..20 {
        let opening: Vec<_> = (0..90)
            .map(|_| {
                let (dialer, to) = (dialer.clone(), server.to());
                tokio::spawn(async move { drop(dialer.open(&to).await) })
            })
            .collect();
        soon(async {
            while dialer.figures().streams < 90 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        for task in opening {
            task.abort();
            drop(task.await);
        }
        // Those given up make room for the next ones.
        soon(async {
            while dialer.figures().streams > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    assert_eq!(dialer.figures().handshakes, 1);
}

#[tokio::test]
async fn a_connection_that_does_not_answer_is_not_asked_again() {
    let identities = identities();
    let server = accepting(identities.clone(), |request: Request| async move {
        std::future::pending::<()>().await;
        drop(request);
    })
    .await;
    let settings = Settings { answer_timeout: Duration::from_millis(100), ..settings() };
    let dialer = Dialer::new(identities, settings).unwrap();
    for handshakes in 1..=2 {
        let error = soon(dialer.open(&server.to())).await.err().unwrap();
        assert_eq!(error.refusal, Refusal::ConnectTimeout);
        let figures = dialer.figures();
        assert_eq!((figures.handshakes, figures.connections), (handshakes, 0));
    }
}
