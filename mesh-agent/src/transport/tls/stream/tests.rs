//! The stream over real sockets: what arrives, in which memory, and how it ends.

use std::{future::poll_fn, io::Write as _, time::Duration, time::SystemTime};

use mesh_core::id::SpiffeId;
use rustls::AlertDescription;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
};
use tokio_rustls::client::TlsStream;

use super::*;
use crate::transport::tls::Framing;
use crate::{
    identity::{
        Identities,
        local_ca::LocalCa,
        tests::{DAY, Scratch, id, init},
    },
    transport::tls::{Tls, TlsError, foreign},
};

const LIMIT: Duration = Duration::from_secs(30);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what).await.expect("it happens in time")
}

fn identities() -> (Identities, LocalCa) {
    let scratch = Scratch::new();
    let created = init(&scratch, "demo.mesh");
    let open = || LocalCa::open(&created.bundle, &created.token).unwrap();
    (Identities::new(open(), DAY), open())
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (dialled, listener.accept().await.unwrap().0)
}

/// Both ends are ours: the one that dialled comes first.
async fn pair() -> (SecuredIo, SecuredIo) {
    let (identities, _) = identities();
    let tls = Tls::new(identities.clone()).unwrap();
    let (dialled, accepted) = sockets().await;
    let presents = |_, _: Option<&str>| Some(id("world"));
    let expect: SpiffeId = id("world");
    let ours = identities.leaf(&id("web")).unwrap();
    let (one, other) = soon(async {
        tokio::join!(tls.connect(ours, &expect, &[Framing::Hbone], dialled), tls.accept(accepted, &presents))
    })
    .await;
    (one.unwrap().io, other.unwrap().io)
}

/// Ours has accepted the library's.
async fn with_foreign() -> (SecuredIo, TlsStream<TcpStream>) {
    let (identities, ca) = identities();
    let tls = Tls::new(identities).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let leaf = ca.issue(&id("web"), SystemTime::now(), DAY).unwrap();
    let presents = |_, _: Option<&str>| Some(id("world"));
    let ours = async { tls.accept(listener.accept().await.unwrap().0, &presents).await.unwrap().io };
    let theirs = async { foreign::connect(addr, Some(&leaf), b"h2", None).await.unwrap() };
    soon(async { tokio::join!(ours, theirs) }).await
}

async fn plain(io: &mut SecuredIo) -> io::Result<Option<Bytes>> {
    soon(poll_fn(|cx| io.poll_plain(cx))).await
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn owns_nothing(io: &mut SecuredIo) -> bool {
    io.inbox.buffer.capacity() == 0 && io.records.outgoing().is_empty()
}

#[tokio::test]
async fn much_arrives_in_the_memory_of_the_read_and_nothing_is_kept() {
    let (mut one, mut other) = pair().await;
    let all = bytes(3_000_000);
    let send = async {
        one.write_all(&all).await.unwrap();
        one.shutdown().await.unwrap();
        one
    };
    let receive = async {
        let mut got = Vec::new();
        while let Some(plain) = plain(&mut other).await.unwrap() {
            got.push(plain);
        }
        got
    };
    let (mut one, got) = tokio::join!(send, receive);
    assert!(got.concat() == all);
    assert!(got.iter().any(|plain| plain.len() == 16 << 10));
    assert!(owns_nothing(&mut one) && owns_nothing(&mut other));
}

#[tokio::test]
async fn little_is_copied_to_memory_of_its_size() {
    let (mut one, mut other) = pair().await;
    for size in [1, 100, LITTLE - 1] {
        one.write_all(&bytes(size)).await.unwrap();
        let got = plain(&mut other).await.unwrap().unwrap();
        assert_eq!(got, bytes(size));
        assert_eq!(got.try_into_mut().unwrap().capacity(), size);
        assert!(owns_nothing(&mut one) && owns_nothing(&mut other));
        let kept = SPARE.take().unwrap();
        assert!(kept.is_empty(), "for whichever connection reads next");
        SPARE.set(Some(kept));
    }
}

#[tokio::test]
async fn readers_of_all_kinds_get_the_same() {
    let (mut one, mut other) = pair().await;
    let all = bytes(400_000);
    let mut got = Vec::new();
    let send = async {
        for part in all.chunks(9973) {
            one.write_all(part).await.unwrap();
        }
        one.shutdown().await.unwrap();
    };
    let receive = async {
        for room in [7, 20_000, 300, 70_000].into_iter().cycle() {
            let mut buffer = vec![0; room];
            let length = soon(other.read(&mut buffer)).await.unwrap();
            got.extend_from_slice(&buffer[..length]);
            match plain(&mut other).await.unwrap() {
                Some(plain) => got.extend_from_slice(&plain),
                None => return,
            }
        }
    };
    tokio::join!(send, receive);
    assert!(got == all);
    assert_eq!(other.read(&mut [0; 8]).await.unwrap(), 0, "still the end");
}

#[tokio::test]
async fn slices_are_joined_into_one_record() {
    let (mut one, mut other) = pair().await;
    let slices = [b"a".as_slice(), b"", b"bc", b"", b"def"].map(IoSlice::new);
    assert_eq!(one.write_vectored(&slices).await.unwrap(), 6);
    assert_eq!(plain(&mut other).await.unwrap().unwrap(), "abcdef");
    assert_eq!(one.write_vectored(&[IoSlice::new(&[]); 3]).await.unwrap(), 0);
    let many = vec![IoSlice::new(b"x"); 100];
    let taken = one.write_vectored(&many).await.unwrap();
    assert_eq!(plain(&mut other).await.unwrap().unwrap().len(), taken);
}

#[tokio::test]
async fn what_the_socket_does_not_take_goes_before_anything_else() {
    let (mut one, mut other) = pair().await;
    let data = bytes(1 << 20);
    let mut taken = Vec::new();
    // Until nothing more is taken, and then still more is asked to be.
    poll_fn(|cx| {
        loop {
            let at = taken.len() % data.len();
            match Pin::new(&mut one).poll_write(cx, &data[at..]) {
                Poll::Ready(length) => taken.extend_from_slice(&data[at..at + length.unwrap()]),
                Poll::Pending => return Poll::Ready(()),
            }
        }
    })
    .await;
    assert!(!one.records.outgoing().is_empty());
    let send = async {
        one.write_all(b"last").await.unwrap();
        one.shutdown().await.unwrap();
    };
    let receive = async {
        let mut got = Vec::new();
        soon(other.read_to_end(&mut got)).await.unwrap();
        got
    };
    let ((), got) = tokio::join!(send, receive);
    taken.extend_from_slice(b"last");
    assert!(got == taken);
    assert!(owns_nothing(&mut one));
}

#[tokio::test]
async fn a_record_may_arrive_in_crumbs() {
    let (mut ours, mut theirs) = with_foreign().await;
    let all = bytes(5000);
    let mut sealed = Vec::new();
    let (tcp, tls) = theirs.get_mut();
    for part in [&all[..300], &all[300..]] {
        tls.writer().write_all(part).unwrap();
        while tls.wants_write() {
            tls.write_tls(&mut sealed).unwrap();
        }
    }
    let mut got = Vec::new();
    let mut reads = 0;
    for part in sealed.chunks(13) {
        tcp.write_all(part).await.unwrap();
        soon(ours.tcp.readable()).await.unwrap();
        match poll_fn(|cx| Poll::Ready(ours.poll_plain(cx))).await {
            Poll::Ready(plain) => got.push(plain.unwrap().unwrap()),
            Poll::Pending => assert!(!ours.inbox.buffer.is_empty(), "the beginning of a record"),
        }
        reads += 1;
    }
    assert!(got.len() == 2 && got.concat() == all, "after {reads} reads");
    assert!(owns_nothing(&mut ours));
}

#[tokio::test]
async fn a_cut_is_no_end() {
    let (mut ours, mut theirs) = with_foreign().await;
    theirs.write_all(b"not all").await.unwrap();
    theirs.flush().await.unwrap();
    theirs.get_mut().0.shutdown().await.unwrap();
    let mut got = Vec::new();
    let error = soon(ours.read_to_end(&mut got)).await.unwrap_err();
    assert_eq!((got.as_slice(), error.kind()), (&b"not all"[..], io::ErrorKind::UnexpectedEof));
    assert_eq!(plain(&mut ours).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "and again");
    assert_eq!(ours.failure().refusal(), None);

    let (mut ours, mut theirs) = with_foreign().await;
    theirs.write_all(b"all").await.unwrap();
    theirs.shutdown().await.unwrap();
    assert_eq!(plain(&mut ours).await.unwrap().unwrap(), "all");
    assert_eq!(plain(&mut ours).await.unwrap(), None);
    assert_eq!(soon(ours.read(&mut [0; 8])).await.unwrap(), 0);
    // Half of it is still open.
    ours.write_all(b"answer").await.unwrap();
    ours.shutdown().await.unwrap();
    let mut answer = Vec::new();
    soon(theirs.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"answer");
}

#[tokio::test]
async fn what_is_no_record_is_refused_and_told() {
    let (mut ours, mut theirs) = with_foreign().await;
    theirs.write_all(b"good").await.unwrap();
    theirs.flush().await.unwrap();
    theirs.get_mut().0.write_all(&[23, 3, 3, 0, 20].repeat(6)).await.unwrap();
    let mut got = Vec::new();
    let error = soon(ours.read_to_end(&mut got)).await.unwrap_err();
    assert_eq!((got.as_slice(), error.kind()), (&b"good"[..], io::ErrorKind::InvalidData), "{error}");
    assert_eq!(ours.failure().refusal(), Some(Refusal::HandshakeFailed));
    assert!(ours.write_all(b"more").await.is_err());
    let told = soon(theirs.read(&mut [0; 8])).await.unwrap_err();
    assert!(told.to_string().contains("BadRecordMac"), "{told}");
    assert!(owns_nothing(&mut ours));
}

#[tokio::test]
async fn a_peer_that_we_dialled_is_told_why_we_leave() {
    let (identities, ca) = identities();
    let tls = Tls::new(identities.clone()).unwrap();
    let hour = Duration::from_secs(3600);
    let expired = ca.issue(&id("world"), SystemTime::now() - DAY, hour).unwrap();
    let (dialled, accepted) = sockets().await;
    let ours = identities.leaf(&id("web")).unwrap();
    let trust = identities.trust_bundle();
    let expect = id("world");
    let (ours, theirs) = soon(async {
        tokio::join!(
            tls.connect(ours, &expect, &[Framing::Hbone], dialled),
            foreign::accept(accepted, &trust, &expired, b"h2")
        )
    })
    .await;
    assert!(matches!(ours, Err(TlsError::Handshake { refusal: Refusal::ExpiredPeer, .. })));
    let error = theirs.unwrap_err();
    let told = error.get_ref().unwrap().downcast_ref::<Error>().unwrap();
    assert_eq!(*told, Error::AlertReceived(AlertDescription::CertificateExpired));
}

#[tokio::test]
async fn a_stranger_is_told_that_we_do_not_understand() {
    let (identities, _) = identities();
    let tls = Tls::new(identities).unwrap();
    let (mut dialled, accepted) = sockets().await;
    let presents = |_, _: Option<&str>| Some(id("world"));
    let call = async {
        dialled.write_all(b"GET / HTTP/1.1\r\nhost: world\r\n\r\n").await.unwrap();
        let mut told = Vec::new();
        dialled.read_to_end(&mut told).await.unwrap();
        drop(dialled);
        told
    };
    let (ours, told) = soon(async { tokio::join!(tls.accept(accepted, &presents), call) }).await;
    assert!(matches!(ours, Err(TlsError::Handshake { refusal: Refusal::HandshakeFailed, .. })));
    assert_eq!(told, [21, 3, 3, 0, 2, 2, 50], "decode_error");
}
