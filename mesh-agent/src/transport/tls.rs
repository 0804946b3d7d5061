//! TLS 1.3 with a certificate on both sides: the only module that names the TLS library.
//!
//! A peer is good when its chain leads to a root of the trust bundle (the library's own path validation), its leaf is
//! an X.509-SVID of our trust domain, and, on the dialling side, it names the expected identity. Host names mean
//! nothing here. Key exchange offers the post-quantum hybrid X25519MLKEM768 first. No session is ever resumed: each
//! connection proves both identities anew.
//!
//! Must not know HTTP/2 or what is sent.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest;
use bytes::BytesMut;
use mesh_common::refusal::Refusal;
use mesh_core::id::{SpiffeId, TrustDomain};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
    client::{
        Resumption, UnbufferedClientConnection,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{self, CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs::kx_group},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage, ParsedCertificate, UnbufferedServerConnection, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::identity::{
    Identities, IdentityError, Leaf,
    svid::{self, LeafFacts},
};

use handshake::Handshake;

/// What two agents speak inside TLS; each has a name in ALPN (RFC 7301).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// Our own.
    Mesh,
    /// HTTP/2 CONNECT, as Istio's ztunnel speaks it.
    Hbone,
}

impl Framing {
    /// What the accepting side takes, the first that the peer offers too.
    const ALL: [Self; 2] = [Self::Mesh, Self::Hbone];

    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Mesh => b"ecs-mesh/1",
            Self::Hbone => b"h2",
        }
    }

    fn agreed(alpn: Option<&[u8]>) -> Option<Self> {
        Self::ALL.into_iter().find(|framing| Some(framing.alpn()) == alpn)
    }
}

/// How long a peer that we rejected may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// Which certificate to show for a connection to this local address with this server name; `None`: none fits.
///
/// Our own agents name the workload they want by [`sni_of`]; an Istio ztunnel sends no name, so the address has to
/// tell.
pub type Presents = dyn Fn(SocketAddr, Option<&str>) -> Option<SpiffeId> + Send + Sync;

/// The opaque server name by which a dialling agent says which workload of a host it wants: the first 16 octets of
/// SHA-256 over the SPIFFE ID in hexadecimal, below `.mesh.internal`. It is sent in clear, so it does not spell the
/// service out. The dialling side compares the identity itself; the name only helps the other side to choose.
pub fn sni_of(id: &SpiffeId) -> String {
    use std::fmt::Write as _;
    let hash = digest::digest(&digest::SHA256, id.as_str().as_bytes());
    let mut name = String::with_capacity(46);
    for byte in hash.as_ref().iter().take(16) {
        // Writing to a String cannot fail.
        write!(name, "{byte:02x}").unwrap_or_default();
    }
    name.push_str(".mesh.internal");
    name
}

/// Why no secured connection came about.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("no certificate of our own to show")]
    Identity(#[from] IdentityError),
    #[error("no workload here fits the server name {sni:?} on {local}")]
    NothingToPresent { local: SocketAddr, sni: Option<String> },
    #[error("the peer is {seen}, expected was {expected}")]
    UnexpectedPeer { seen: SpiffeId, expected: SpiffeId },
    #[error("the TLS handshake failed: {}", refusal.cause())]
    Handshake { refusal: Refusal, source: io::Error },
    #[error("the peer agreed to speak neither `ecs-mesh/1` nor HBONE (ALPN `h2`)")]
    Alpn,
    #[error("the peer did not finish the TLS handshake within {0:?}")]
    TimedOut(Duration),
    #[error("our own certificate or trust bundle cannot be used for TLS")]
    Own(#[source] Error),
}

impl TlsError {
    /// The number by which this is reported.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Identity(_) | Self::NothingToPresent { .. } | Self::Own(_) => Refusal::NoIdentity,
            Self::UnexpectedPeer { .. } => Refusal::UnexpectedIdentity,
            Self::Handshake { refusal, .. } => *refusal,
            Self::Alpn | Self::TimedOut(_) => Refusal::HandshakeFailed,
        }
    }

    fn handshake(source: io::Error) -> Self {
        Self::Handshake { refusal: refusal_of(&source), source }
    }
}

/// A connection on which both sides have shown who they are.
pub(super) struct Secured {
    pub io: SecuredIo,
    pub framing: Framing,
    pub peer: LeafFacts,
    pub ours: Arc<Leaf>,
}

/// Makes connections secure, dialled and accepted ones.
pub(super) struct Tls {
    identities: Identities,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    callers: Arc<SvidCallers>,
}

impl Tls {
    /// Verifies with the trust bundle of `identities` and shows certificates from there.
    ///
    /// # Errors
    /// The trust bundle has no usable root.
    pub(super) fn new(identities: Identities) -> Result<Self, TlsError> {
        let mut provider = crypto::aws_lc_rs::default_provider();
        provider.kx_groups = vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1];
        provider.cipher_suites = suites::fastest();
        let provider = Arc::new(provider);
        let bundle = identities.trust_bundle();
        let mut roots = RootCertStore::empty();
        for root in &bundle.roots {
            roots.add(root.to_vec().into()).map_err(TlsError::Own)?;
        }
        let roots = Arc::new(roots);
        let chain = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| TlsError::Own(Error::General(error.to_string())))?;
        let callers = Arc::new(SvidCallers { chain, domain: bundle.domain.clone() });
        Ok(Self { identities, provider, roots, callers })
    }

    /// The handshake of the dialling side: shows `ours`, and accepts nobody but `expect`.
    ///
    /// # Errors
    /// The peer is not who it must be, or does not speak TLS 1.3 with one of `framings`. Whether the peer accepts *us* shows
    /// only later, when it first sends something: see [`SecuredIo::failure`].
    pub(super) async fn connect(
        &self,
        ours: Arc<Leaf>,
        expect: &SpiffeId,
        framings: &[Framing],
        mut tcp: TcpStream,
    ) -> Result<Secured, TlsError> {
        let verifier = Arc::new(Expected {
            roots: self.roots.clone(),
            algorithms: self.provider.signature_verification_algorithms,
            expect: expect.clone(),
            seen: OnceLock::new(),
        });
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Own)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_auth_cert(chain(&ours), key(&ours).into())
            .map_err(TlsError::Own)?;
        config.alpn_protocols = framings.iter().map(|framing| framing.alpn().to_vec()).collect();
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        let name = ServerName::try_from(sni_of(expect))
            .map_err(|invalid| TlsError::Own(Error::General(invalid.to_string())))?;

        let side = UnbufferedClientConnection::new(Arc::new(config), name).map_err(TlsError::Own)?;
        let mut handshake = Handshake::new(side, BytesMut::new());
        match (handshake::run(&mut handshake, &mut tcp).await, verifier.seen.get()) {
            (Ok(()), _) => {}
            (Err(_), Some(seen)) if seen.id != *expect => {
                return Err(TlsError::UnexpectedPeer { seen: seen.id.clone(), expected: expect.clone() });
            }
            (Err(error), _) => return Err(TlsError::handshake(error)),
        }
        let framing = Framing::agreed(handshake.state().alpn_protocol()).ok_or(TlsError::Alpn)?;
        // The verifier has run, or the handshake would have failed.
        let peer = verifier.seen.get().cloned().ok_or(TlsError::Alpn)?;
        Ok(Secured { io: secured(handshake, tcp)?, framing, peer, ours })
    }

    /// The handshake of the accepting side: shows what `presents` chooses, accepts every workload of our trust domain.
    ///
    /// # Errors
    /// The peer is not of our trust domain, or does not speak TLS 1.3 with a client certificate and a framing of ours,
    /// or rejects us.
    pub(super) async fn accept(&self, mut tcp: TcpStream, presents: &Presents) -> Result<Secured, TlsError> {
        let local = tcp.local_addr().map_err(TlsError::handshake)?;
        // Which certificate to show depends on the first message, which the handshake proper then begins with.
        let mut received = BytesMut::new();
        let sni = match handshake::hello(&mut tcp, &mut received).await {
            Ok(sni) => sni,
            Err(error) => {
                if error.kind() == io::ErrorKind::InvalidData {
                    linger(tcp).await;
                }
                return Err(TlsError::handshake(error));
            }
        };
        let Some(id) = presents(local, sni.as_deref()) else {
            return Err(TlsError::NothingToPresent { local, sni });
        };
        let ours = self.identities.leaf(&id)?;
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Own)?
            .with_client_cert_verifier(self.callers.clone())
            .with_single_cert(chain(&ours), key(&ours).into())
            .map_err(TlsError::Own)?;
        config.alpn_protocols = Framing::ALL.map(|framing| framing.alpn().to_vec()).into();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;

        let side = UnbufferedServerConnection::new(Arc::new(config)).map_err(TlsError::Own)?;
        let mut handshake = Handshake::new(side, received);
        if let Err(error) = handshake::run(&mut handshake, &mut tcp).await {
            linger(tcp).await;
            return Err(TlsError::handshake(error));
        }
        let Some(framing) = Framing::agreed(handshake.state().alpn_protocol()) else {
            // The peer believes the handshake done: tell it before going.
            let mut io = secured(handshake, tcp)?;
            drop(io.shutdown().await);
            linger(io.into_tcp()).await;
            return Err(TlsError::Alpn);
        };
        let certificates = handshake.state().peer_certificates();
        let peer = certificates
            .and_then(|chain| chain.first())
            .and_then(|leaf| svid::leaf_facts(leaf).ok())
            .ok_or_else(|| TlsError::handshake(io::Error::other(Error::NoCertificatesPresented)))?;
        Ok(Secured { io: secured(handshake, tcp)?, framing, peer, ours })
    }
}

/// The stream behind a handshake that is done.
fn secured(handshake: Handshake<impl handshake::Side>, tcp: TcpStream) -> Result<SecuredIo, TlsError> {
    let (records, received) = handshake.finish().map_err(TlsError::Own)?;
    Ok(SecuredIo::new(tcp, records, received))
}

/// Closes so that the peer gets to read our last words: closing with unread input would send a reset, which may
/// overtake the alert.
async fn linger(mut tcp: TcpStream) {
    let finish = async {
        tcp.shutdown().await?;
        let mut rest = [0u8; 4096];
        while tcp.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    drop(tokio::time::timeout(LINGER, finish).await);
}

fn chain(leaf: &Leaf) -> Vec<CertificateDer<'static>> {
    vec![leaf.certificate.to_vec().into()]
}

fn key(leaf: &Leaf) -> PrivatePkcs8KeyDer<'static> {
    leaf.key.to_vec().into()
}

/// Accepts one identity. Made anew for each connection, and remembers whom it saw.
#[derive(Debug)]
struct Expected {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    expect: SpiffeId,
    seen: OnceLock<LeafFacts>,
}

impl ServerCertVerifier for Expected {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, self.algorithms.all)
            .map_err(unknown_signer)?;
        let facts = svid::leaf_facts(end_entity).map_err(not_svid)?;
        let fits = facts.id == self.expect;
        // Set once: a verifier serves one handshake, in which it is asked once.
        drop(self.seen.set(facts));
        if fits {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Accepts every workload of our trust domain.
#[derive(Debug)]
struct SvidCallers {
    chain: Arc<dyn ClientCertVerifier>,
    domain: TrustDomain,
}

impl ClientCertVerifier for SvidCallers {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now).map_err(unknown_signer)?;
        let facts = svid::leaf_facts(end_entity).map_err(not_svid)?;
        if facts.id.domain() == self.domain.as_str() {
            Ok(verified)
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// A root of the same name but with another key is another root: the peer has to hear so.
fn unknown_signer(error: Error) -> Error {
    if matches!(error, Error::InvalidCertificate(CertificateError::BadSignature)) {
        CertificateError::UnknownIssuer.into()
    } else {
        error
    }
}

fn not_svid(why: svid::NotSvid) -> Error {
    CertificateError::Other(rustls::OtherError(Arc::new(why))).into()
}

/// The refusal that an I/O error of a TLS stream stands for: our own verdict, or the alert by which the peer told its.
fn refusal_of(error: &io::Error) -> Refusal {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidCertificate(verdict)) => refusal_of_verdict(verdict),
        Some(Error::AlertReceived(AlertDescription::UnknownCA)) => Refusal::UntrustedPeer,
        Some(Error::AlertReceived(AlertDescription::CertificateExpired)) => Refusal::ExpiredPeer,
        Some(Error::AlertReceived(AlertDescription::AccessDenied)) => Refusal::UnexpectedIdentity,
        Some(_) | None => Refusal::HandshakeFailed,
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the library adds variants in minor releases")]
fn refusal_of_verdict(verdict: &CertificateError) -> Refusal {
    match verdict {
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => Refusal::ExpiredPeer,
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Refusal::UntrustedPeer,
        CertificateError::ApplicationVerificationFailure => Refusal::UnexpectedIdentity,
        _ => Refusal::HandshakeFailed,
    }
}

/// Until when a connection may take new streams: both certificates must be good.
pub(super) fn good_until(secured: &Secured) -> SystemTime {
    secured.peer.not_after.min(secured.ours.not_after)
}

#[cfg(test)]
pub(super) mod foreign;
mod handshake;
mod records;
mod stream;
mod suites;

pub(super) use stream::{Failure, SecuredIo};
