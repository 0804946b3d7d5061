//! TLS peers for tests that are what our own code never is: gullible, without certificate, without ALPN, with an
//! expired certificate.
//!
//! Must not use the verifiers under test.

use std::{io, net::SocketAddr, sync::Arc};

use rustls::{
    ClientConfig, ConnectionCommon, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::WebPkiClientVerifier,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::identity::{Leaf, TrustBundle};

/// Connects, trusting anybody, as `leaf` or without a certificate; `alpn` empty sends none, `sni` none likewise.
pub(in crate::transport) async fn connect(
    to: SocketAddr,
    leaf: Option<&Leaf>,
    alpn: &[u8],
    sni: Option<&str>,
) -> io::Result<client::TlsStream<TcpStream>> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let mut config = match leaf {
        Some(leaf) => config.with_client_auth_cert(vec![chain(leaf)], key(leaf).into()).unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = offered(alpn);
    config.enable_sni = sni.is_some();
    let name = ServerName::try_from(sni.unwrap_or("unsent.invalid").to_owned()).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, TcpStream::connect(to).await?).await
}

/// Accepts as `leaf` from anybody whose chain leads to `trust`.
pub(in crate::transport) async fn accept(
    tcp: TcpStream,
    trust: &TrustBundle,
    leaf: &Leaf,
    alpn: &[u8],
) -> io::Result<server::TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    for root in &trust.roots {
        roots.add(CertificateDer::from(root.to_vec())).unwrap();
    }
    let callers = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build().unwrap();
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(callers)
        .with_single_cert(vec![chain(leaf)], key(leaf).into())
        .unwrap();
    config.alpn_protocols = offered(alpn);
    TlsAcceptor::from(Arc::new(config)).accept(tcp).await
}

/// The key exchange that was agreed on.
pub(in crate::transport) fn group<S>(
    connection: &impl std::ops::Deref<Target = ConnectionCommon<S>>,
) -> Option<&'static str> {
    connection.negotiated_key_exchange_group()?.name().as_str()
}

fn offered(alpn: &[u8]) -> Vec<Vec<u8>> {
    if alpn.is_empty() { Vec::new() } else { vec![alpn.to_vec()] }
}

fn chain(leaf: &Leaf) -> CertificateDer<'static> {
    leaf.certificate.to_vec().into()
}

fn key(leaf: &Leaf) -> PrivatePkcs8KeyDer<'static> {
    leaf.key.to_vec().into()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Trusts anybody.
#[derive(Debug)]
pub(super) struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
