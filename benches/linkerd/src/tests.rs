//! The control plane as a proxy sees it: asked over HTTP/2 by the clients of Linkerd's own crate.

use std::{
    env, fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process,
    sync::Arc,
    time::SystemTime,
};

use linkerd2_proxy_api::{
    destination::{
        GetDestination, destination_client::DestinationClient, protocol_hint, tls_identity::Strategy, update::Update,
    },
    identity::{CertifyRequest, CertifyResponse, identity_client::IdentityClient},
    inbound::{
        self, PortSpec,
        authn::{Permit, permit_mesh_tls::Clients},
        inbound_server_policies_client::InboundServerPoliciesClient,
    },
    outbound::{
        self, TrafficSpec,
        backend::{balance_p2c::Load, endpoint_discovery},
        outbound_policies_client::OutboundPoliciesClient,
        traffic_spec::Target,
    },
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::WebPkiClientVerifier,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{Code, Request, Status, transport::Channel};

use crate::{
    CSR, KEY, Plane, TOKEN, World,
    world::{Issuer, Port, Service},
};

const OWN: &str = "caller.bench.mesh";
const PEER: &str = "called.bench.mesh";
const REQUESTS: u16 = 21_000;
const BYTES: u16 = 21_001;
const INBOUND: u16 = 21_005;

/// A control plane that answers, and its CA.
struct Running {
    channel: Channel,
    world: World,
    root: CertificateDer<'static>,
    serving: JoinHandle<()>,
}

impl Running {
    /// `name` keeps the files of tests apart.
    async fn start(name: &str) -> Self {
        let dir = env::temp_dir().join(format!("mesh-linkerd-{name}-{}", process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (issuer, root) = authority(&dir);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let listen = listener.local_addr().unwrap();
        let service = |port, opaque_by| Service {
            name: "called.bench.svc.cluster.local".to_owned(),
            address: SocketAddr::from(([198, 18, 0, 2], port)),
            endpoint: SocketAddr::from(([10, 0, 0, 2], port + 1000)),
            identity: PEER.to_owned(),
            opaque_by,
        };
        let world = World {
            listen,
            issuer,
            identity: OWN.to_owned(),
            documents: dir,
            inbound: vec![Port { port: REQUESTS, opaque: false }, Port { port: BYTES, opaque: true }],
            outbound: vec![service(REQUESTS, None), service(BYTES, Some(INBOUND))],
        };
        let plane = Plane::new(world.clone()).unwrap();
        let serving = tokio::spawn(async move {
            plane.serve(listener).await.unwrap();
        });
        let channel = Channel::from_shared(format!("http://{listen}")).unwrap().connect().await.unwrap();
        Self { channel, world, root, serving }
    }

    fn read(&self, document: &str) -> Vec<u8> {
        fs::read(self.world.document(document)).unwrap()
    }

    /// What the proxy sends, from the files that were made for it.
    fn request(&self) -> CertifyRequest {
        CertifyRequest {
            identity: OWN.to_owned(),
            token: self.read(TOKEN),
            certificate_signing_request: self.read(CSR),
        }
    }

    async fn certify(&self, request: CertifyRequest) -> Result<CertifyResponse, Status> {
        let mut client = IdentityClient::new(self.channel.clone());
        client.certify(Request::new(request)).await.map(tonic::Response::into_inner)
    }

    async fn endpoints(&self, path: &str) -> Update {
        let request = GetDestination { path: path.to_owned(), ..GetDestination::default() };
        let mut stream = DestinationClient::new(self.channel.clone()).get(request).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap().update.unwrap()
    }

    async fn policy(&self, address: SocketAddr) -> Result<outbound::proxy_protocol::Kind, Status> {
        let target = Some(Target::Addr(address.into()));
        let request = TrafficSpec { source_workload: "{}".to_owned(), target };
        let mut stream = OutboundPoliciesClient::new(self.channel.clone()).watch(request).await?.into_inner();
        let policy = stream.message().await?.unwrap();
        assert!(policy.metadata.is_some_and(|metadata| metadata.kind.is_some()), "a proxy refuses one without");
        Ok(policy.protocol.unwrap().kind.unwrap())
    }

    async fn port(&self, port: u16) -> inbound::Server {
        let request = PortSpec { workload: "{}".to_owned(), port: port.into() };
        let mut client = InboundServerPoliciesClient::new(self.channel.clone());
        client.watch_port(request).await.unwrap().into_inner().message().await.unwrap().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.serving.abort();
        fs::remove_dir_all(&self.world.documents).ok();
    }
}

fn authority(dir: &Path) -> (Issuer, CertificateDer<'static>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let root = params.self_signed(&key).unwrap();
    let write = |name: &str, text: String| -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let issuer = Issuer { certificate: write("ca.pem", root.pem()), key: write("ca.key.pem", key.serialize_pem()) };
    (issuer, root.der().clone())
}

/// As a proxy checks its own certificate and its peer's: for the name, by its trust anchors.
fn verifies(root: &CertificateDer<'static>, leaf: &[u8], name: &str) -> bool {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    let roots = Arc::new(roots);
    let provider = Arc::new(default_provider());
    let leaf = CertificateDer::from(leaf);
    let server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone()).build().unwrap();
    let client = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let now = UnixTime::now();
    server.verify_server_cert(&leaf, &[], &name, &[], now).is_ok() && client.verify_client_cert(&leaf, &[], now).is_ok()
}

#[tokio::test]
async fn a_certificate_for_the_proxys_key_verifies_by_the_trust_anchor_and_by_no_other() {
    let running = Running::start("certify").await;
    let answer = running.certify(running.request()).await.unwrap();
    assert!(verifies(&running.root, &answer.leaf_certificate, OWN));
    assert!(!verifies(&running.root, &answer.leaf_certificate, PEER));
    let stranger = Running::start("stranger").await;
    assert!(!verifies(&stranger.root, &answer.leaf_certificate, OWN));

    let (_, leaf) = x509_parser::parse_x509_certificate(&answer.leaf_certificate).unwrap();
    let key = KeyPair::try_from(running.read(KEY)).unwrap();
    assert_eq!(leaf.public_key().subject_public_key.data.as_ref(), key.public_key_raw());
    let until: SystemTime = answer.valid_until.unwrap().try_into().unwrap();
    assert!(until > SystemTime::now(), "a proxy takes no certificate that has ended");
}

#[tokio::test]
async fn who_shows_another_token_or_wants_another_name_gets_no_certificate() {
    let running = Running::start("token").await;
    let refused = |request| async { running.certify(request).await.unwrap_err().code() };
    let asked = running.request();
    assert_eq!(refused(CertifyRequest { token: b"other".to_vec(), ..asked.clone() }).await, Code::FailedPrecondition);
    assert_eq!(refused(CertifyRequest { token: Vec::new(), ..asked.clone() }).await, Code::FailedPrecondition);
    assert_eq!(refused(CertifyRequest { identity: PEER.to_owned(), ..asked.clone() }).await, Code::FailedPrecondition);

    let key = KeyPair::generate().unwrap();
    let other = CertificateParams::new([PEER.to_owned()]).unwrap().serialize_request(&key).unwrap();
    let other = CertifyRequest { certificate_signing_request: other.der().to_vec(), ..asked.clone() };
    assert_eq!(refused(other).await, Code::FailedPrecondition);
    let mut forged = asked.certificate_signing_request.clone();
    *forged.last_mut().unwrap() ^= 1;
    let forged = CertifyRequest { certificate_signing_request: forged, ..asked };
    assert_eq!(refused(forged).await, Code::InvalidArgument);
}

#[tokio::test]
async fn a_service_is_found_by_name_and_by_address_with_the_identity_of_its_endpoint() {
    let running = Running::start("destination").await;
    for path in ["called.bench.svc.cluster.local:21000", "198.18.0.2:21000"] {
        let Update::Add(set) = running.endpoints(path).await else { panic!("{path} has no endpoints") };
        let [endpoint] = set.addrs.as_slice() else { panic!("{path} has {} endpoints", set.addrs.len()) };
        let address = SocketAddr::try_from(endpoint.addr.unwrap()).unwrap();
        assert_eq!(address, SocketAddr::from(([10, 0, 0, 2], 22_000)));
        let identity = endpoint.tls_identity.clone().unwrap();
        assert_eq!(identity.server_name.unwrap().name, PEER);
        assert!(matches!(identity.strategy.unwrap(), Strategy::DnsLikeIdentity(it) if it.name == PEER));
        let hint = endpoint.protocol_hint.unwrap();
        assert!(matches!(hint.protocol, Some(protocol_hint::Protocol::H2(_))));
        assert!(hint.opaque_transport.is_none());
    }
    assert!(matches!(running.endpoints("other:21000").await, Update::NoEndpoints(none) if !none.exists));
}

#[tokio::test]
async fn bytes_go_to_the_other_proxys_own_port() {
    let running = Running::start("opaque").await;
    let Update::Add(set) = running.endpoints("called.bench.svc.cluster.local:21001").await else {
        panic!("there are no endpoints")
    };
    let hint = set.addrs[0].protocol_hint.unwrap();
    assert!(matches!(hint.protocol, Some(protocol_hint::Protocol::Opaque(_))));
    assert_eq!(hint.opaque_transport.unwrap().inbound_port, u32::from(INBOUND));
}

#[tokio::test]
async fn profiles_tell_older_proxies_the_name_and_whether_it_is_bytes() {
    let running = Running::start("profile").await;
    let mut client = DestinationClient::new(running.channel.clone());
    for (port, opaque) in [(REQUESTS, false), (BYTES, true)] {
        let request = GetDestination { path: format!("198.18.0.2:{port}"), ..GetDestination::default() };
        let profile = client.get_profile(request).await.unwrap().into_inner().message().await.unwrap().unwrap();
        assert_eq!(profile.fully_qualified_name, "called.bench.svc.cluster.local");
        assert_eq!(profile.opaque_protocol, opaque);
    }
    let request = GetDestination { path: "198.18.0.3:1".to_owned(), ..GetDestination::default() };
    assert_eq!(client.get_profile(request).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_services_policy_balances_over_what_destination_tells_of_it() {
    use outbound::{backend, http_route, opaque_route, proxy_protocol::Kind};
    let running = Running::start("outbound").await;
    let path_of = |backend: &outbound::Backend| {
        assert!(backend.metadata.is_some() && backend.queue.is_some_and(|queue| queue.failfast_timeout.is_some()));
        let Some(backend::Kind::Balancer(balancer)) = &backend.kind else { panic!("it does not balance") };
        assert!(matches!(balancer.load, Some(Load::PeakEwma(it)) if it.decay.is_some() && it.default_rtt.is_some()));
        let Some(endpoint_discovery::Kind::Dst(get)) = balancer.discovery.clone().unwrap().kind else {
            panic!("it discovers nothing")
        };
        get.path
    };
    let http = |route: &outbound::HttpRoute| {
        let Some(http_route::distribution::Kind::FirstAvailable(first)) = route.rules[0].backends.clone().unwrap().kind
        else {
            panic!("it has no backend")
        };
        path_of(first.backends[0].backend.as_ref().unwrap())
    };
    let opaque = |route: &outbound::OpaqueRoute| {
        let Some(opaque_route::distribution::Kind::FirstAvailable(first)) =
            route.rules[0].backends.clone().unwrap().kind
        else {
            panic!("it has no backend")
        };
        path_of(first.backends[0].backend.as_ref().unwrap())
    };

    let at = |port| SocketAddr::from(([198, 18, 0, 2], port));
    let Kind::Detect(detect) = running.policy(at(REQUESTS)).await.unwrap() else { panic!("it detects nothing") };
    assert!(detect.timeout.is_some());
    let expected = "called.bench.svc.cluster.local:21000";
    assert_eq!(http(&detect.http1.unwrap().routes[0]), expected);
    assert_eq!(http(&detect.http2.unwrap().routes[0]), expected);
    assert_eq!(opaque(&detect.opaque.unwrap().routes[0]), expected);
    assert!(matches!(running.endpoints(expected).await, Update::Add(_)), "what a policy names is known");

    let Kind::Opaque(bytes) = running.policy(at(BYTES)).await.unwrap() else { panic!("it is not opaque") };
    assert_eq!(opaque(&bytes.routes[0]), "called.bench.svc.cluster.local:21001");
    let nowhere = SocketAddr::from((IpAddr::from([198, 18, 0, 3]), REQUESTS));
    assert_eq!(running.policy(nowhere).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn ports_are_open_to_who_shows_a_certificate_and_to_nobody_else() {
    use inbound::proxy_protocol::Kind;
    let running = Running::start("inbound").await;
    // The last is one that it was told nothing of, as the proxy's own are.
    for (port, opaque) in [(REQUESTS, false), (BYTES, true), (4191, false)] {
        let server = running.port(port).await;
        assert_eq!(matches!(server.protocol.unwrap().kind.unwrap(), Kind::Opaque(_)), opaque);
        assert!(server.labels.contains_key("name"), "a proxy refuses a policy without");
        let [authorization] = server.authorizations.as_slice() else { panic!("there is more than one way in") };
        let networks: Vec<u32> = authorization.networks.iter().map(|it| it.net.unwrap().prefix_len).collect();
        assert_eq!(networks, [0, 0]);
        let Some(Permit::MeshTls(tls)) = authorization.authentication.clone().unwrap().permit else {
            panic!("port {port} is open to everybody")
        };
        assert!(matches!(tls.clients, Some(Clients::Identities(it)) if it.suffixes.len() == 1));
    }
}
