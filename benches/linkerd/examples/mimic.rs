//! A proxy that asks Linkerd's control plane as linkerd2-proxy does, and carries bytes over mutual TLS: what the way of the
//! benchmark is tried with where there is no linkerd2-proxy. Its figures say nothing about Linkerd's.
//!
//! It reads the same variables, certifies itself, asks for policies, takes what is redirected to it, and terminates or
//! makes TLS by what it was told. Requests are bytes to it. It must not know the stand-in's files or types.
#![expect(clippy::print_stderr, reason = "its log is its standard error")]
#![expect(clippy::wildcard_enum_match_arm, reason = "it understands what it is told here, and says so of the rest")]

use std::{
    env, fs, io,
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    sync::{Arc, OnceLock},
};

use anyhow::{Context as _, Result, bail, ensure};
use linkerd2_proxy_api::{
    destination::{GetDestination, WeightedAddr, destination_client::DestinationClient, tls_identity, update::Update},
    identity::{CertifyRequest, identity_client::IdentityClient},
    inbound::{self, PortSpec, authn::Permit, inbound_server_policies_client::InboundServerPoliciesClient},
    outbound::{
        Backend, TrafficSpec, backend, backend::endpoint_discovery, http_route, opaque_route,
        outbound_policies_client::OutboundPoliciesClient, proxy_protocol, traffic_spec::Target,
    },
};
use mesh_linkerd::header;
use nix::sys::socket::{getsockopt, sockopt};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs::default_provider, server::WebPkiClientVerifier,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::Channel;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mimic: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A variable whose name begins as all do.
fn variable(name: &str) -> Result<String> {
    let name = format!("LINKERD2_PROXY_{name}");
    env::var(&name).with_context(|| format!("{name} must be set"))
}

/// What every connection needs.
struct Proxy {
    workload: String,
    /// Destination and policy.
    destination: Channel,
    policy: Channel,
    /// Its own port, and the certificate that it shows.
    inbound: SocketAddr,
    client: ClientConfig,
    server: ServerConfig,
}

async fn run() -> Result<()> {
    let ready = Arc::new(OnceLock::new());
    let admin = TcpListener::bind(variable("ADMIN_LISTEN_ADDR")?).await.context("admin")?;
    tokio::spawn(administer(admin, ready.clone()));
    let outbound = TcpListener::bind(variable("OUTBOUND_LISTEN_ADDR")?).await.context("outbound")?;
    let at: SocketAddr = variable("INBOUND_LISTEN_ADDR")?.parse().context("inbound")?;
    let inbound = TcpListener::bind(at).await.context("inbound")?;
    let (client, server) = certified().await?;
    let proxy = Proxy {
        workload: variable("POLICY_WORKLOAD")?,
        destination: channel("DESTINATION_SVC_ADDR").await?,
        policy: channel("POLICY_SVC_ADDR").await?,
        inbound: at,
        client,
        server,
    };
    let proxy = Arc::new(proxy);
    ready.set(()).ok();
    tokio::try_join!(
        accept(outbound, proxy.clone(), |proxy, stream| async move { proxy.outward(stream).await }),
        accept(inbound, proxy, |proxy, stream| async move { proxy.inward(stream).await }),
    )?;
    Ok(())
}

async fn accept<F>(listener: TcpListener, proxy: Arc<Proxy>, carry: fn(Arc<Proxy>, TcpStream) -> F) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        stream.set_nodelay(true).ok();
        let carried = carry(proxy.clone(), stream);
        tokio::spawn(async move {
            if let Err(error) = carried.await {
                eprintln!("mimic: {error:#}");
            }
        });
    }
}

/// `GET /ready`.
async fn administer(listener: TcpListener, ready: Arc<OnceLock<()>>) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        let mut question = [0; 1024];
        if stream.read(&mut question).await.unwrap_or_default() > 0 {
            let status = if ready.get().is_some() { "200 OK" } else { "503 Service Unavailable" };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.ok();
        }
    }
}

async fn channel(name: &str) -> Result<Channel> {
    let at = variable(name)?;
    Channel::from_shared(format!("http://{at}"))?.connect().await.with_context(|| format!("cannot reach {at}"))
}

/// Both ends of TLS, with a certificate from the identity service.
async fn certified() -> Result<(ClientConfig, ServerConfig)> {
    let dir = variable("IDENTITY_DIR")?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let key = read(&Path::new(&dir).join("key.p8"))?;
    let request = CertifyRequest {
        identity: variable("IDENTITY_SERVER_NAME")?,
        token: read(Path::new(&variable("IDENTITY_TOKEN_FILE")?))?,
        certificate_signing_request: read(&Path::new(&dir).join("csr.der"))?,
    };
    let mut client = IdentityClient::new(channel("IDENTITY_SVC_ADDR").await?);
    let answer = client.certify(request).await.context("not certified")?.into_inner();
    let chain = vec![CertificateDer::from(answer.leaf_certificate)];
    let key = PrivateKeyDer::try_from(key).ok().context("key.p8 holds no key")?;

    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(variable("IDENTITY_TRUST_ANCHORS")?.as_bytes()) {
        roots.add(root.context("a trust anchor is no certificate")?)?;
    }
    let (roots, provider) = (Arc::new(roots), Arc::new(default_provider()));
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain.clone(), key.clone_key())?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).allow_unauthenticated().build()?;
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    Ok((client, server))
}

/// Where it was meant to go before it was redirected.
fn meant(stream: &TcpStream) -> Result<SocketAddr> {
    let original = getsockopt(stream, sockopt::OriginalDst).context("it was not redirected")?;
    Ok(SocketAddr::from((original.sin_addr.s_addr.to_ne_bytes(), u16::from_be(original.sin_port))))
}

impl Proxy {
    /// From the task to a service.
    async fn outward(&self, mut stream: TcpStream) -> Result<()> {
        let endpoint = self.endpoint(meant(&stream)?).await?;
        let mut to = SocketAddr::try_from(endpoint.addr.context("an endpoint has an address")?)?;
        let identity = endpoint.tls_identity.context("this proxy speaks TLS or not at all")?;
        let Some(tls_identity::Strategy::DnsLikeIdentity(name)) = identity.strategy else {
            bail!("the identity is no DNS name")
        };
        let name = ServerName::try_from(name.name)?;
        let behind = to.port();
        let through = endpoint.protocol_hint.and_then(|hint| hint.opaque_transport);
        let mut configuration = self.client.clone();
        if let Some(through) = through {
            to.set_port(u16::try_from(through.inbound_port)?);
            configuration.alpn_protocols = vec![header::PROTOCOL.to_vec()];
        }
        let other = TcpStream::connect(to).await.with_context(|| format!("cannot connect to {to}"))?;
        other.set_nodelay(true)?;
        let mut other = TlsConnector::from(Arc::new(configuration)).connect(name, other).await?;
        if through.is_some() {
            header::write(&mut other, behind).await?;
        }
        carry(&mut stream, &mut other).await
    }

    /// What the control plane says is behind an address.
    async fn endpoint(&self, address: SocketAddr) -> Result<WeightedAddr> {
        let target = Some(Target::Addr(address.into()));
        let request = TrafficSpec { source_workload: self.workload.clone(), target };
        let mut policies = OutboundPoliciesClient::new(self.policy.clone()).watch(request).await?.into_inner();
        let policy = policies.message().await?.context("no policy")?;
        let backend = match policy.protocol.and_then(|protocol| protocol.kind).context("no protocol")? {
            proxy_protocol::Kind::Opaque(opaque) => of_opaque(opaque),
            proxy_protocol::Kind::Detect(detect) => of_http(detect.http1.context("no HTTP/1")?),
            other => bail!("{other:?} is nothing that this proxy understands"),
        };
        let Some(backend::Kind::Balancer(balancer)) = backend.and_then(|backend| backend.kind) else {
            bail!("a route has no balancer")
        };
        let Some(endpoint_discovery::Kind::Dst(get)) = balancer.discovery.and_then(|it| it.kind) else {
            bail!("a balancer has no discovery")
        };
        let request = GetDestination { path: get.path, ..GetDestination::default() };
        let mut endpoints = DestinationClient::new(self.destination.clone()).get(request).await?.into_inner();
        match endpoints.message().await?.and_then(|update| update.update) {
            Some(Update::Add(set)) => set.addrs.into_iter().next().context("no endpoint"),
            other => bail!("{address} has no endpoints: {other:?}"),
        }
    }

    /// From another proxy to the task.
    async fn inward(&self, mut stream: TcpStream) -> Result<()> {
        let mut to = meant(&stream)?;
        let mut configuration = self.server.clone();
        let direct = to.port() == self.inbound.port();
        if direct {
            configuration.alpn_protocols = vec![header::PROTOCOL.to_vec()];
        } else if self.is_opaque(to.port()).await? {
            // What is not for the proxy itself is not its to decrypt; and without an identity nothing is let in.
            stream.shutdown().await.ok();
            bail!("{to} takes bytes through the proxy's own port only");
        }
        let mut stream = TlsAcceptor::from(Arc::new(configuration)).accept(stream).await?;
        ensure!(stream.get_ref().1.peer_certificates().is_some(), "{to} is not for who shows no certificate");
        if direct {
            to.set_port(header::read(&mut stream).await?);
            self.is_opaque(to.port()).await?;
        }
        let mut task = TcpStream::connect(to).await.with_context(|| format!("cannot connect to {to}"))?;
        task.set_nodelay(true)?;
        carry(&mut stream, &mut task).await
    }

    /// What the policy of a port says; one that lets anybody in is not this proxy's.
    async fn is_opaque(&self, port: u16) -> Result<bool> {
        let request = PortSpec { workload: self.workload.clone(), port: port.into() };
        let mut client = InboundServerPoliciesClient::new(self.policy.clone());
        let server = client.watch_port(request).await?.into_inner().message().await?.context("no policy")?;
        let closed = |it: &inbound::Authz| {
            matches!(it.authentication.as_ref().and_then(|it| it.permit.as_ref()), Some(Permit::MeshTls(_)))
        };
        ensure!(server.authorizations.iter().all(closed), "port {port} is open to everybody");
        let kind = server.protocol.and_then(|protocol| protocol.kind);
        Ok(matches!(kind, Some(inbound::proxy_protocol::Kind::Opaque(_))))
    }
}

fn of_opaque(opaque: proxy_protocol::Opaque) -> Option<Backend> {
    match opaque.routes.into_iter().next()?.rules.into_iter().next()?.backends?.kind? {
        opaque_route::distribution::Kind::FirstAvailable(first) => first.backends.into_iter().next()?.backend,
        _ => None,
    }
}

fn of_http(http: proxy_protocol::Http1) -> Option<Backend> {
    match http.routes.into_iter().next()?.rules.into_iter().next()?.backends?.kind? {
        http_route::distribution::Kind::FirstAvailable(first) => first.backends.into_iter().next()?.backend,
        _ => None,
    }
}

/// Until both have ended; that one of them breaks off is not this proxy's fault.
async fn carry(
    one: &mut (impl AsyncRead + AsyncWrite + Unpin),
    other: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> Result<()> {
    match copy_bidirectional(one, other).await {
        Err(error) if error.kind() == io::ErrorKind::Other => Err(error).context("cannot carry"),
        _ => Ok(()),
    }
}
