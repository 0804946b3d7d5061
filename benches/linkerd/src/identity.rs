//! Who the proxy is: its key and token in files, and a certificate for whoever shows both.
//!
//! In a cluster a program beside the proxy makes the key, and Kubernetes the token. It must not know who trusts the CA.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use linkerd2_proxy_api::identity::{CertifyRequest, CertifyResponse};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateSigningRequestDer;
use tonic::Status;

use crate::World;

/// The names that the proxy looks for in its folder.
pub const KEY: &str = "key.p8";
pub const CSR: &str = "csr.der";
/// What it shows.
pub const TOKEN: &str = "token";

/// As Linkerd's own issuer: a day, and some time back for clocks that go wrong.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
const LEEWAY: Duration = Duration::from_secs(10);

/// Signs for one proxy.
pub(crate) struct Signer {
    issuer: Issuer<'static, KeyPair>,
    identity: String,
    token: String,
}

impl Signer {
    /// Reads the CA, and makes the proxy's documents.
    pub(crate) fn make(world: &World) -> Result<Self> {
        let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        let (certificate, key) = (&world.issuer.certificate, &world.issuer.key);
        let signing = KeyPair::from_pem(&read(key)?).with_context(|| format!("{} holds no key", key.display()))?;
        let issuer = Issuer::from_ca_cert_pem(&read(certificate)?, signing)
            .with_context(|| format!("{} holds no certificate of a CA", certificate.display()))?;
        Ok(Self { issuer, identity: world.identity.clone(), token: documents(world)? })
    }

    /// A certificate for the key of the request.
    pub(crate) fn certify(&self, asked: &CertifyRequest) -> Result<CertifyResponse, Status> {
        if asked.token != self.token.as_bytes() {
            return Err(Status::failed_precondition(format!(
                "the token is not the one that was made for {}; is {TOKEN} of another run in use?",
                self.identity
            )));
        }
        let request = CertificateSigningRequestDer::from(asked.certificate_signing_request.as_slice());
        let request = CertificateSigningRequestParams::from_der(&request).map_err(|fault| {
            Status::invalid_argument(format!("this is no request for a certificate that is signed by its key: {fault}"))
        })?;
        let own = [dns(&self.identity)?];
        if asked.identity != self.identity || request.params.subject_alt_names != own {
            return Err(Status::failed_precondition(format!(
                "{} and {:?} are asked for, and the token is of {}",
                asked.identity, request.params.subject_alt_names, self.identity
            )));
        }
        let now = SystemTime::now();
        let until = now + LIFETIME;
        let mut params = CertificateParams::default();
        params.subject_alt_names = own.to_vec();
        params.distinguished_name = named(&self.identity);
        params.not_before = (now - LEEWAY).into();
        params.not_after = until.into();
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params
            .signed_by(&request.public_key, &self.issuer)
            .map_err(|fault| Status::internal(format!("cannot sign a certificate of {}: {fault}", self.identity)))?;
        // DER, though the interface's comments say PEM: the proxy and Linkerd's own issuer both take it so.
        Ok(CertifyResponse {
            leaf_certificate: leaf.der().to_vec(),
            intermediate_certificates: Vec::new(),
            valid_until: Some(until.into()),
        })
    }
}

/// Puts key, request and token into the proxy's folder; returns the token.
fn documents(world: &World) -> Result<String> {
    ensure!(world.documents.is_dir(), "there is no folder {} for the proxy's key", world.documents.display());
    let key = KeyPair::generate().context("cannot make a key for the proxy")?;
    let mut params = CertificateParams::new([world.identity.clone()])
        .with_context(|| format!("{} cannot be the name in a certificate", world.identity))?;
    params.distinguished_name = named(&world.identity);
    let request = params.serialize_request(&key).context("cannot make a request for a certificate")?;
    let mut random = [0; 16];
    aws_lc_rs::rand::fill(&mut random).ok().context("cannot draw random bytes for a token")?;
    let token = format!("{:032x}", u128::from_ne_bytes(random));
    let documents: [(&str, &[u8]); 3] = [(KEY, key.serialized_der()), (CSR, request.der()), (TOKEN, token.as_bytes())];
    for (name, bytes) in documents {
        let path = world.document(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(token)
}

fn dns(name: &str) -> Result<SanType, Status> {
    let name = name.try_into().map_err(|fault| Status::internal(format!("{name} is no DNS name: {fault}")))?;
    Ok(SanType::DnsName(name))
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}
