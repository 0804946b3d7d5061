//! Who is refused, and with which number, on both sides.

use std::{collections::HashSet, fs, sync::Arc, time::SystemTime};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::*;
use crate::{
    identity::{
        Leaf,
        local_ca::LocalCa,
        tests::{Scratch, init},
    },
    transport::{
        TunnelError,
        tls::{foreign, sni_of},
    },
};

async fn refusing_all(identities: &Identities) -> Accepting {
    accepting(identities.clone(), |request: Request| async move { request.refuse(Refusal::Denied) }).await
}

async fn error_of(dialer: &Dialer, to: &To) -> TunnelError {
    match soon(dialer.open(to)).await {
        Ok(_) => panic!("it must be refused"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn another_root_is_untrusted_on_both_sides() {
    // Same trust domain, another CA: only the keys differ.
    let mut server = refusing_all(&identities()).await;
    let error = error_of(&dialer(&identities()), &server.to()).await;
    assert_eq!(error.refusal, Refusal::UntrustedPeer, "{error:?}");
    assert_eq!(server.next_refusal().await, Refusal::UntrustedPeer);
}

#[tokio::test]
async fn another_identity_is_unexpected_on_both_sides() {
    let identities = identities();
    let mut server = refusing_all(&identities).await;
    let error = error_of(&dialer(&identities), &server.to_as("web", &id("cache"))).await;
    assert_eq!(error.refusal, Refusal::UnexpectedIdentity, "{error:?}");
    let detail = format!("{:?}", error.source);
    assert!(detail.contains("/sa/world") && detail.contains("/sa/cache"), "names both: {detail}");
    assert_eq!(server.next_refusal().await, Refusal::UnexpectedIdentity);
}

#[tokio::test]
async fn no_certificate_to_show_is_no_identity() {
    let identities = identities();
    let server = refusing_all(&identities).await;
    let mut to = server.to();
    to.from = "spiffe://other.mesh/ns/demo/sa/web".parse().unwrap();
    let error = error_of(&dialer(&identities), &to).await;
    assert_eq!(error.refusal, Refusal::NoIdentity, "{error:?}");
}

#[tokio::test]
async fn nobody_listening_is_a_failed_connect() {
    let identities = identities();
    let server = refusing_all(&identities).await;
    let to = server.to();
    server.drain.send_replace(true);
    soon(server.task).await.unwrap().unwrap();
    let error = error_of(&dialer(&identities), &to).await;
    assert_eq!(error.refusal, Refusal::ConnectFailed, "{error:?}");
}

#[tokio::test]
async fn a_peer_that_never_answers_times_out() {
    // The kernel completes the TCP handshake, nobody the TLS one.
    let (_listener, to) = foreign_listener().await;
    let settings = Settings { handshake_timeout: Duration::from_millis(100), ..settings() };
    let dialer = Dialer::new(identities(), settings).unwrap();
    assert_eq!(error_of(&dialer, &to).await.refusal, Refusal::HandshakeFailed);
}

#[tokio::test]
async fn refusals_keep_their_number_across_the_tunnel() {
    let identities = identities();
    for refusal in Refusal::ALL {
        let server =
            accepting(identities.clone(), move |request: Request| async move { request.refuse(*refusal) }).await;
        let error = error_of(&dialer(&identities), &server.to()).await;
        assert_eq!(error.refusal, *refusal);
    }
}

#[tokio::test]
async fn a_request_that_is_dropped_is_a_refused_tunnel() {
    let identities = identities();
    let server = accepting(identities.clone(), |request: Request| async move { drop(request) }).await;
    let error = error_of(&dialer(&identities), &server.to()).await;
    assert_eq!(error.refusal, Refusal::TunnelRefused, "{error:?}");
}

// What follows meets peers that are not our own agent.

/// Connects as `leaf`, or without a certificate, and reads: the server's verdict arrives there.
async fn call(server: &Accepting, leaf: Option<&Leaf>, alpn: &[u8]) -> std::io::Result<usize> {
    let mut tls = foreign::connect(server.addr, leaf, alpn, Some(&sni_of(&id("world")))).await?;
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    soon(tls.read(&mut [0; 64])).await
}

async fn foreign_listener() -> (TcpListener, To) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = To {
        agent: listener.local_addr().unwrap(),
        authority: "10.0.0.1:80".parse().unwrap(),
        from: id("web"),
        expect: id("world"),
        elsewhere: false,
    };
    (listener, to)
}

/// What we say to a server that is not ours and shows `leaf`.
async fn dial_foreign(identities: &Identities, leaf: Leaf, alpn: &'static [u8]) -> Refusal {
    let (listener, to) = foreign_listener().await;
    let trust = identities.trust_bundle();
    let server = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        // Whether it succeeds is for the caller to say.
        if let Ok(mut tls) = foreign::accept(tcp, &trust, &leaf, alpn).await {
            drop(tls.read(&mut [0; 64]).await);
        }
    });
    let refusal = error_of(&dialer(identities), &to).await.refusal;
    soon(server).await.unwrap();
    refusal
}

/// A CA in two handles: the one in the identities, and one to issue what they never would.
fn shared_ca() -> (Identities, LocalCa) {
    let scratch = Scratch::new();
    let created = init(&scratch, "demo.mesh");
    let open = || LocalCa::open(&created.bundle, &created.token).unwrap();
    (Identities::new(open(), DAY), open())
}

fn yesterday() -> SystemTime {
    SystemTime::now() - DAY
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn an_expired_caller_is_refused() {
    let (identities, ca) = shared_ca();
    let mut server = refusing_all(&identities).await;
    let expired = ca.issue(&id("web"), yesterday(), HOUR).unwrap();
    let error = call(&server, Some(&expired), b"h2").await.unwrap_err();
    assert!(error.to_string().contains("CertificateExpired"), "told by an alert: {error}");
    assert_eq!(server.next_refusal().await, Refusal::ExpiredPeer);
}

#[tokio::test]
async fn an_expired_server_is_refused() {
    let (identities, ca) = shared_ca();
    let expired = ca.issue(&id("world"), yesterday(), HOUR).unwrap();
    assert_eq!(dial_foreign(&identities, expired, b"h2").await, Refusal::ExpiredPeer);
}

#[tokio::test]
async fn a_certificate_from_the_future_is_refused() {
    let (identities, ca) = shared_ca();
    let early = ca.issue(&id("world"), SystemTime::now() + HOUR, HOUR).unwrap();
    assert_eq!(dial_foreign(&identities, early, b"h2").await, Refusal::ExpiredPeer);
}

#[tokio::test]
async fn a_rejection_after_our_own_handshake_is_told_too() {
    // We trust the server, the server does not trust us: with TLS 1.3 our handshake is done before it has even seen
    // our certificate.
    let (theirs_dir, ours_dir) = (Scratch::new(), Scratch::new());
    let (theirs, ours) = (init(&theirs_dir, "demo.mesh"), init(&ours_dir, "demo.mesh"));
    let their_root = pem::parse_many(fs::read(&theirs.bundle).unwrap()).unwrap().remove(0);
    let both = format!("{}{}", fs::read_to_string(&ours.bundle).unwrap(), pem::encode(&their_root));
    fs::write(&ours.bundle, both).unwrap();
    let open = |files: &crate::identity::local_ca::Created| {
        Identities::new(LocalCa::open(&files.bundle, &files.token).unwrap(), DAY)
    };
    let mut server = refusing_all(&open(&theirs)).await;
    let dialer = dialer(&open(&ours));
    for _ in 0..10 {
        let error = error_of(&dialer, &server.to()).await;
        assert_eq!(error.refusal, Refusal::UntrustedPeer, "{error:?}");
        assert_eq!(server.next_refusal().await, Refusal::UntrustedPeer);
    }
    assert_eq!(dialer.figures().connections, 0);
}

#[tokio::test]
async fn a_caller_of_another_ca_is_refused_and_told() {
    let mut server = refusing_all(&identities()).await;
    let (_, other_ca) = shared_ca();
    let leaf = other_ca.issue(&id("web"), SystemTime::now(), HOUR).unwrap();
    let error = call(&server, Some(&leaf), b"h2").await.unwrap_err();
    assert!(error.to_string().contains("UnknownCA"), "{error}");
    assert_eq!(server.next_refusal().await, Refusal::UntrustedPeer);
}

#[tokio::test]
async fn a_caller_without_certificate_is_refused() {
    let mut server = refusing_all(&identities()).await;
    assert!(call(&server, None, b"h2").await.is_err());
    assert_eq!(server.next_refusal().await, Refusal::HandshakeFailed);
}

#[tokio::test]
async fn a_caller_without_alpn_is_refused() {
    let (identities, ca) = shared_ca();
    let mut server = refusing_all(&identities).await;
    let leaf = ca.issue(&id("web"), SystemTime::now(), HOUR).unwrap();
    assert_eq!(call(&server, Some(&leaf), b"").await.unwrap(), 0, "closed, but in good order");
    assert_eq!(server.next_refusal().await, Refusal::HandshakeFailed);
    assert!(call(&server, Some(&leaf), b"http/1.1").await.is_err());
    assert_eq!(server.next_refusal().await, Refusal::HandshakeFailed);
}

#[tokio::test]
async fn a_server_without_alpn_is_refused() {
    let (identities, ca) = shared_ca();
    let leaf = ca.issue(&id("world"), SystemTime::now(), HOUR).unwrap();
    assert_eq!(dial_foreign(&identities, leaf, b"").await, Refusal::HandshakeFailed);
}

#[tokio::test]
async fn another_protocol_inside_tls_is_refused() {
    let (identities, ca) = shared_ca();
    let mut server = refusing_all(&identities).await;
    let leaf = ca.issue(&id("web"), SystemTime::now(), HOUR).unwrap();
    let mut tls = foreign::connect(server.addr, Some(&leaf), b"h2", Some("any.invalid")).await.unwrap();
    tls.write_all(b"GET / HTTP/1.1\r\nhost: world\r\n\r\n").await.unwrap();
    assert_eq!(server.next_refusal().await, Refusal::BadProtocol);
}

#[tokio::test]
async fn garbage_closes_that_connection_only() {
    let identities = identities();
    let mut server = refusing_all(&identities).await;
    for garbage in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0; 512], &[0x16, 3, 1, 0xff, 0xff, 1], &[0xff; 3]] {
        let mut tcp = TcpStream::connect(server.addr).await.unwrap();
        tcp.write_all(garbage).await.unwrap();
        tcp.shutdown().await.unwrap();
        drop(soon(tcp.read_to_end(&mut Vec::new())).await);
        assert_eq!(server.next_refusal().await, Refusal::HandshakeFailed, "{garbage:?}");
    }
    // It still serves.
    assert_eq!(error_of(&dialer(&identities), &server.to()).await.refusal, Refusal::Denied);
}

#[tokio::test]
async fn a_port_check_is_no_failure() {
    let identities = identities();
    let mut server = refusing_all(&identities).await;
    drop(TcpStream::connect(server.addr).await.unwrap());
    assert_eq!(error_of(&dialer(&identities), &server.to()).await.refusal, Refusal::Denied);
    server.drain.send_replace(true);
    soon(server.task).await.unwrap().unwrap();
    assert!(server.failed.recv().await.is_none(), "nothing was reported");
}

#[tokio::test]
async fn a_silent_peer_is_closed_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (tell, mut failed) = mpsc::channel(1024);
    let acceptance = Acceptance {
        presents: Arc::new(|_, _| Some(id("world"))),
        failed: Arc::new(move |failure| tell.try_send(failure).unwrap()),
        handshake_timeout: Duration::from_millis(100),
        drain: Duration::from_secs(1),
    };
    let (_drain, draining) = watch::channel(false);
    tokio::spawn(serving(listener, identities(), acceptance, |_: Request| async {}, draining));
    let mut tcp = TcpStream::connect(addr).await.unwrap();
    assert_eq!(soon(tcp.read(&mut [0; 8])).await.unwrap(), 0);
    assert_eq!(soon(failed.recv()).await.unwrap().error.refusal(), Refusal::HandshakeFailed);
}

/// What our agents answer to a request that only a stranger would send.
async fn status_of(request: http::Request<()>) -> (u16, Option<String>) {
    let (identities, ca) = shared_ca();
    let server = refusing_all(&identities).await;
    let leaf = ca.issue(&id("web"), SystemTime::now(), HOUR).unwrap();
    // As an Istio ztunnel does: without a server name.
    let tls = foreign::connect(server.addr, Some(&leaf), b"h2", None).await.unwrap();
    let (requests, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    let mut requests = requests.ready().await.unwrap();
    let (response, _send) = requests.send_request(request, true).unwrap();
    let response = soon(response).await.unwrap();
    let number = response.headers().get("ecs-mesh-refusal").map(|value| value.to_str().unwrap().to_owned());
    (response.status().as_u16(), number)
}

#[tokio::test]
async fn only_connect_to_an_address_is_served() {
    let bad = (400, Some("16".to_owned()));
    assert_eq!(status_of(http::Request::get("https://10.0.0.1:80/").body(()).unwrap()).await, bad);
    for authority in ["world:80", "10.0.0.1", "10.0.0.1:99999", "[::1]"] {
        assert_eq!(status_of(http::Request::connect(authority).body(()).unwrap()).await, bad, "{authority}");
    }
    for authority in ["10.0.0.1:80", "[::1]:80"] {
        let answer = status_of(http::Request::connect(authority).body(()).unwrap()).await;
        assert_eq!(answer, (401, Some("6".to_owned())), "{authority}: reaches the handler, which denies");
    }
}

#[tokio::test]
async fn a_foreign_refusal_is_told_by_its_status() {
    // An agent that is not ours sends no number.
    for (status, refusal) in [(401, Refusal::Denied), (403, Refusal::Denied), (503, Refusal::TunnelRefused)] {
        let (identities, ca) = shared_ca();
        let leaf = ca.issue(&id("world"), SystemTime::now(), HOUR).unwrap();
        let (listener, to) = foreign_listener().await;
        let trust = identities.trust_bundle();
        tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let tls = foreign::accept(tcp, &trust, &leaf, b"h2").await.unwrap();
            let mut connection = h2::server::handshake(tls).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let response = http::Response::builder().status(status).body(()).unwrap();
                respond.send_response(response, true).unwrap();
            }
        });
        let error = error_of(&dialer(&identities), &to).await;
        assert_eq!(error.refusal, refusal);
        let shown = error.source.unwrap().to_string();
        assert!(shown.contains(&status.to_string()), "{shown}");
    }
}

#[test]
fn server_names_are_opaque_and_differ() {
    let name = sni_of(&id("world"));
    assert_eq!(name.len(), 46);
    assert!(name.ends_with(".mesh.internal") && !name.contains("world"));
    let names: HashSet<_> = ["web", "world", "cache"].map(|service| sni_of(&id(service))).into();
    assert_eq!(names.len(), 3);
}

#[tokio::test]
async fn a_caller_of_another_trust_domain_is_refused_though_its_root_is_trusted() {
    let (ours_dir, theirs_dir) = (Scratch::new(), Scratch::new());
    let (ours, theirs) = (init(&ours_dir, "demo.mesh"), init(&theirs_dir, "other.mesh"));
    let their_root = pem::parse_many(fs::read(&theirs.bundle).unwrap()).unwrap().remove(0);
    let both = format!("{}{}", fs::read_to_string(&ours.bundle).unwrap(), pem::encode(&their_root));
    fs::write(&ours.bundle, both).unwrap();
    let mut server = refusing_all(&Identities::new(LocalCa::open(&ours.bundle, &ours.token).unwrap(), DAY)).await;
    let other = LocalCa::open(&theirs.bundle, &theirs.token).unwrap();
    let stranger = "spiffe://other.mesh/ns/demo/sa/web".parse().unwrap();
    let leaf = other.issue(&stranger, SystemTime::now(), HOUR).unwrap();
    assert!(call(&server, Some(&leaf), b"h2").await.is_err());
    assert_eq!(server.next_refusal().await, Refusal::UnexpectedIdentity);
}

#[tokio::test]
async fn nothing_to_present_is_no_identity() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = To { agent: listener.local_addr().unwrap(), ..foreign_listener().await.1 };
    let (tell, mut failed) = mpsc::channel(1024);
    let acceptance = Acceptance {
        presents: Arc::new(|_, _| None),
        failed: Arc::new(move |failure| tell.try_send(failure).unwrap()),
        handshake_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(1),
    };
    let (_drain, draining) = watch::channel(false);
    let identities = identities();
    tokio::spawn(serving(listener, identities.clone(), acceptance, |_: Request| async {}, draining));
    assert_eq!(error_of(&dialer(&identities), &to).await.refusal, Refusal::HandshakeFailed);
    let failure = soon(failed.recv()).await.unwrap();
    assert_eq!(failure.error.refusal(), Refusal::NoIdentity);
}

#[tokio::test]
async fn the_server_shows_what_the_name_asks_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let acceptance = Acceptance {
        presents: Arc::new(move |local, sni| {
            assert_eq!(local, addr);
            ["world", "cache"].map(id).into_iter().find(|id| sni == Some(&sni_of(id)))
        }),
        failed: Arc::new(|_| {}),
        handshake_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(1),
    };
    let (tell, mut presented) = mpsc::channel(1024);
    let (_drain, draining) = watch::channel(false);
    let identities = identities();
    let handler = move |request: Request| {
        let tell = tell.clone();
        async move { drop(tell.send((request.presented.clone(), request.peer.clone(), request.accept().unwrap())).await) }
    };
    tokio::spawn(serving(listener, identities.clone(), acceptance, handler, draining));
    let dialer = dialer(&identities);
    for service in ["cache", "world"] {
        let to = To { agent: addr, expect: id(service), ..foreign_listener().await.1 };
        let tunnel = soon(dialer.open(&to)).await.unwrap();
        let (ours, peer, _theirs) = soon(presented.recv()).await.unwrap();
        assert_eq!((ours, peer, tunnel.peer()), (id(service), id("web"), &id(service)));
    }
}

/// A second opinion on our TLS.
#[tokio::test]
async fn openssl_sees_tls_1_3_and_the_hybrid_key_exchange() {
    let scratch = Scratch::new();
    let created = init(&scratch, "demo.mesh");
    let open = || LocalCa::open(&created.bundle, &created.token).unwrap();
    let server = refusing_all(&Identities::new(open(), DAY)).await;
    let leaf = open().issue(&id("web"), SystemTime::now(), HOUR).unwrap();
    let file = |name: &str, tag: &str, der: &[u8]| {
        let path = scratch.path().join(name);
        fs::write(&path, pem::encode(&pem::Pem::new(tag, der.to_vec()))).unwrap();
        path
    };
    let certificate = file("leaf.pem", "CERTIFICATE", &leaf.certificate);
    let key = file("key.pem", "PRIVATE KEY", &leaf.key);
    let run = async |extra: &[&str]| {
        let mut openssl = std::process::Command::new("openssl");
        openssl
            .args(["s_client", "-connect", &server.addr.to_string(), "-alpn", "h2", "-brief"])
            .args(["-servername", &sni_of(&id("world")), "-verify_return_error", "-verify", "2"])
            .args(extra)
            .arg("-CAfile")
            .args([&created.bundle])
            .arg("-cert")
            .args([&certificate])
            .arg("-key")
            .args([&key])
            .stdin(std::process::Stdio::null());
        let output = tokio::task::spawn_blocking(move || openssl.output()).await.unwrap()?;
        let text = [output.stdout, output.stderr].concat();
        std::io::Result::Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
    };
    match run(&[]).await {
        Ok((ok, text)) => {
            assert!(ok && text.contains("TLSv1.3") && text.contains("Verification: OK"), "{text}");
            assert!(text.contains("TLS_AES_256_GCM_SHA384"), "{text}");
        }
        Err(error) => return crate::identity::tests::skipped("openssl s_client", &error),
    }
    let (_, old) = run(&["-tls1_2"]).await.unwrap();
    assert!(old.contains("alert protocol version"), "TLS 1.2 is refused: {old}");
    match run(&["-groups", "X25519MLKEM768"]).await.unwrap() {
        (true, text) => assert!(text.contains("X25519MLKEM768"), "{text}"),
        (false, text) => {
            crate::identity::tests::skipped("X25519MLKEM768 by openssl, which is before 3.5", &text.trim())
        }
    }
}

#[tokio::test]
async fn the_key_exchange_is_the_post_quantum_hybrid() {
    let (identities, ca) = shared_ca();
    let leaf = ca.issue(&id("world"), SystemTime::now(), HOUR).unwrap();
    // Ours accepting.
    let server = refusing_all(&identities).await;
    let tls = foreign::connect(server.addr, Some(&leaf), b"h2", None).await.unwrap();
    assert_eq!(foreign::group(tls.get_ref().1), Some("X25519MLKEM768"));
    // Ours dialling.
    let (listener, to) = foreign_listener().await;
    let dialing = tokio::spawn(async move { drop(dialer(&identities).open(&to).await) });
    let (tcp, _) = listener.accept().await.unwrap();
    let trust = ca.trust_bundle();
    let tls = foreign::accept(tcp, &trust, &leaf, b"h2").await.unwrap();
    assert_eq!(foreign::group(tls.get_ref().1), Some("X25519MLKEM768"));
    dialing.abort();
}
