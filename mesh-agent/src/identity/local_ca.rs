//! The built-in certificate authority: a root certificate and its sealed private key in one file, opened by a join
//! token in another.
//!
//! `ca-bundle.pem` holds the root certificate in clear, so that anybody can verify with it, and the root's private key
//! encrypted with AES-256-GCM. The key for that comes from the join token (256 random bits, text
//! `ecs-mesh-join-1.<base64url>`) by HKDF-SHA256; the additional data binds the certificate, so a key cannot be moved
//! to another one. Further certificates in the file are trusted too, but nothing is issued from them: that is how a
//! root is replaced without a lost connection.
//!
//! **What this protects, and what not.** The bundle alone gives nothing but trust anchors. Whoever has bundle *and*
//! token can issue any identity of the trust domain, on any host, until the root expires; there is no revocation, only
//! a new root. So the token belongs in a secret store, readable by the agent alone, and a host on which root was lost
//! means a new `mesh-agent ca init`. Attested hosts (an issuer that signs only what a host really runs) are another
//! issuer, not this one.
//!
//! Must not know who asks for certificates, nor when they are renewed.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    hkdf, rand,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mesh_core::id::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use time::OffsetDateTime;

use crate::identity::{Leaf, TrustBundle, svid};

/// File names that [`init`] writes.
pub const BUNDLE_FILE: &str = "ca-bundle.pem";
pub const TOKEN_FILE: &str = "join-token";

/// How long a root is valid.
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Certificates begin this long before they are issued, for hosts whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(60);

const CERTIFICATE_TAG: &str = "CERTIFICATE";
const SEALED_TAG: &str = "ECS MESH SEALED CA KEY";
const SEALED_VERSION: u8 = 1;
const TOKEN_PREFIX: &str = "ecs-mesh-join-1.";
const TOKEN_LEN: usize = 32;

/// What can go wrong with the files of the built-in CA.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{} exists already and would be overwritten: certificates issued from it would stop being trusted; \
         choose another directory, or move the old files away first", .0.display()
    )]
    Exists(PathBuf),
    #[error("{} is not a join token: expected one line `{TOKEN_PREFIX}` and 43 characters, as written by `mesh-agent ca init`", .0.display())]
    MalformedToken(PathBuf),
    #[error("{} is not a CA bundle: {problem}; copy the file again from where `mesh-agent ca init` wrote it", path.display())]
    MalformedBundle { path: PathBuf, problem: &'static str },
    #[error(
        "the join token {} does not open the CA bundle {}: it belongs to another bundle, or one of the two files was \
         changed; copy both from the same run of `mesh-agent ca init`", token.display(), bundle.display()
    )]
    WrongToken { bundle: PathBuf, token: PathBuf },
    #[error("cannot {0} (cryptographic library)")]
    Crypto(&'static str),
    #[error("cannot make a certificate for {subject}")]
    Certificate { subject: String, source: rcgen::Error },
}

/// Where [`init`] wrote a new CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    pub bundle: PathBuf,
    pub token: PathBuf,
}

/// Makes a new root for `domain` and writes the bundle (mode 0644) and the join token (mode 0600) into `dir`, which is
/// created (mode 0700) where it is missing.
///
/// # Errors
/// One of the files exists, or cannot be written. Nothing is left behind then.
pub fn init(domain: &TrustDomain, dir: &Path, now: SystemTime) -> Result<Created, CaError> {
    let created = Created { bundle: dir.join(BUNDLE_FILE), token: dir.join(TOKEN_FILE) };
    for path in [&created.bundle, &created.token] {
        if path.symlink_metadata().is_ok() {
            return Err(CaError::Exists(path.clone()));
        }
    }
    let mut secret = [0u8; TOKEN_LEN];
    random(&mut secret)?;
    let bundle = sealed_root(domain, &secret, now)?;
    let token = format!("{TOKEN_PREFIX}{}\n", URL_SAFE_NO_PAD.encode(secret));

    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| CaError::File {
        action: "create directory",
        path: dir.to_owned(),
        source,
    })?;
    write_new(&created.token, 0o600, token.as_bytes())?;
    if let Err(error) = write_new(&created.bundle, 0o644, bundle.as_bytes()) {
        // A token without its bundle opens nothing; the first error is the one to report.
        drop(fs::remove_file(&created.token));
        return Err(error);
    }
    Ok(created)
}

/// An opened CA: issues leaf certificates for one trust domain. The private key exists only in memory.
pub struct LocalCa {
    issuer: Issuer<'static, KeyPair>,
    domain: TrustDomain,
    bundle: Arc<TrustBundle>,
    not_after: SystemTime,
}

impl LocalCa {
    /// Opens the bundle with the token.
    ///
    /// # Errors
    /// A file cannot be read, is malformed, or the token belongs to another bundle.
    pub fn open(bundle_file: &Path, token_file: &Path) -> Result<Self, CaError> {
        let secret = read_token(token_file)?;
        let text = fs::read(bundle_file).map_err(|source| CaError::File {
            action: "read the CA bundle",
            path: bundle_file.to_owned(),
            source,
        })?;
        let malformed = |problem| CaError::MalformedBundle { path: bundle_file.to_owned(), problem };
        let blocks = pem::parse_many(&text).map_err(|_not_pem| malformed("it is not PEM"))?;
        let mut roots: Vec<Arc<[u8]>> = Vec::new();
        let mut sealed = None;
        for block in blocks {
            match block.tag() {
                CERTIFICATE_TAG => roots.push(block.contents().into()),
                SEALED_TAG => sealed = Some(block.into_contents()),
                _ => return Err(malformed("it has a PEM block that does not belong there")),
            }
        }
        let root = roots.first().cloned().ok_or_else(|| malformed("it has no certificate"))?;
        let sealed = sealed.ok_or_else(|| malformed("it has no sealed key"))?;
        let facts =
            svid::root_facts(&root).ok_or_else(|| malformed("its certificate is not a CA of a trust domain"))?;

        let key = unseal(&secret, &root, sealed)
            .ok_or_else(|| CaError::WrongToken { bundle: bundle_file.to_owned(), token: token_file.to_owned() })?;
        let key = KeyPair::try_from(key.as_slice())
            .map_err(|source| CaError::Certificate { subject: facts.domain.to_string(), source })?;
        let issuer = Issuer::from_ca_cert_der(&root.to_vec().into(), key)
            .map_err(|source| CaError::Certificate { subject: facts.domain.to_string(), source })?;
        let bundle = Arc::new(TrustBundle { domain: facts.domain.clone(), roots });
        Ok(Self { issuer, domain: facts.domain, bundle, not_after: facts.not_after })
    }

    /// The trust domain that this CA issues for.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// What to verify peers against.
    pub fn trust_bundle(&self) -> Arc<TrustBundle> {
        self.bundle.clone()
    }

    /// Issues an X.509-SVID (SPIFFE X.509-SVID §3, §4) with a key of its own, valid from [`BACKDATE`] before `now` for
    /// `ttl` after it, never beyond the root.
    ///
    /// # Errors
    /// The cryptographic library fails.
    pub fn issue(&self, id: &SpiffeId, now: SystemTime, ttl: Duration) -> Result<Leaf, CaError> {
        let failed = |source| CaError::Certificate { subject: id.to_string(), source };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        // X.509 knows whole seconds; what we say of the certificate must not be more than what it says of itself.
        let not_after = whole_seconds((now + ttl).min(self.not_after));
        let not_before = now - BACKDATE;
        let mut serial = [0u8; 16];
        random(&mut serial)?;
        // Positive and of full length (RFC 5280 §4.1.2.2).
        serial[0] = serial[0] & 0x7f | 0x40;

        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.not_before = OffsetDateTime::from(not_before);
        params.not_after = OffsetDateTime::from(not_after);
        params.distinguished_name = name("ecs-mesh workload");
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(failed)?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;

        let mut draw = [0u8; 8];
        random(&mut draw)?;
        Ok(Leaf {
            id: id.clone(),
            certificate: certificate.der().as_ref().into(),
            key: key.serialized_der().into(),
            serial: hex(&serial),
            issued: now,
            not_after,
            draw: u64::from_ne_bytes(draw),
        })
    }
}

fn sealed_root(domain: &TrustDomain, secret: &[u8; TOKEN_LEN], now: SystemTime) -> Result<String, CaError> {
    let failed = |source| CaError::Certificate { subject: format!("the root of {domain}"), source };
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut serial = [0u8; 16];
    random(&mut serial)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(now + ROOT_TTL);
    // Two roots of one domain must not share a name: verifiers find an issuer by it.
    params.distinguished_name = name(&format!("ecs-mesh CA {domain} {}", hex(&serial[..4])));
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{domain}").try_into().map_err(failed)?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let root = params.self_signed(&key).map_err(failed)?;

    let sealed = seal(secret, root.der(), key.serialize_der())?;
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    Ok(pem::encode_many_config(
        &[pem::Pem::new(CERTIFICATE_TAG, root.der().to_vec()), pem::Pem::new(SEALED_TAG, sealed)],
        config,
    ))
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "ecs-mesh");
    name.push(DnType::CommonName, common);
    name
}

fn read_token(path: &Path) -> Result<[u8; TOKEN_LEN], CaError> {
    let failed = |source| CaError::File { action: "read the join token", path: path.to_owned(), source };
    let text = fs::read_to_string(path).map_err(failed)?;
    let mode = fs::metadata(path).map_err(failed)?.mode();
    if mode & 0o077 != 0 {
        tracing::warn!(
            path = %path.display(), mode = format!("{:o}", mode & 0o777),
            "join token is readable by others than its owner: run `chmod 600` on it"
        );
    }
    text.trim()
        .strip_prefix(TOKEN_PREFIX)
        .and_then(|encoded| URL_SAFE_NO_PAD.decode(encoded).ok())
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| CaError::MalformedToken(path.to_owned()))
}

/// version (1 octet), nonce (12), ciphertext with its tag (16).
fn seal(secret: &[u8; TOKEN_LEN], root: &[u8], mut key: Vec<u8>) -> Result<Vec<u8>, CaError> {
    let nonce = sealing_key(secret)?
        .seal_in_place_append_tag(Aad::from(bound(root)), &mut key)
        .map_err(|_unspecified| CaError::Crypto("seal the private key"))?;
    let mut sealed = vec![SEALED_VERSION];
    sealed.extend_from_slice(nonce.as_ref());
    sealed.append(&mut key);
    Ok(sealed)
}

fn unseal(secret: &[u8; TOKEN_LEN], root: &[u8], sealed: Vec<u8>) -> Option<Vec<u8>> {
    let (&version, rest) = sealed.split_first()?;
    let (nonce, ciphertext) = rest.split_at_checked(NONCE_LEN)?;
    if version != SEALED_VERSION {
        return None;
    }
    let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
    let mut buffer = ciphertext.to_vec();
    let plain = sealing_key(secret).ok()?.open_in_place(nonce, Aad::from(bound(root)), &mut buffer).ok()?;
    Some(plain.to_vec())
}

fn sealing_key(secret: &[u8; TOKEN_LEN]) -> Result<RandomizedNonceKey, CaError> {
    let failed = |_unspecified| CaError::Crypto("derive the sealing key");
    let mut key = [0u8; 32];
    hkdf::Salt::new(hkdf::HKDF_SHA256, b"ecs-mesh join token 1")
        .extract(secret)
        .expand(&[b"ca private key"], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut key))
        .map_err(failed)?;
    RandomizedNonceKey::new(&AES_256_GCM, &key).map_err(failed)
}

/// The additional authenticated data: which certificate the sealed key belongs to.
fn bound(root: &[u8]) -> Vec<u8> {
    [b"ecs-mesh sealed ca key 1\0".as_slice(), root].concat()
}

fn write_new(path: &Path, mode: u32, content: &[u8]) -> Result<(), CaError> {
    let failed = |source| CaError::File { action: "write", path: path.to_owned(), source };
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(CaError::Exists(path.to_owned())),
        Err(error) => return Err(failed(error)),
    };
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed)
}

fn whole_seconds(at: SystemTime) -> SystemTime {
    at.duration_since(UNIX_EPOCH).map_or(UNIX_EPOCH, |since| UNIX_EPOCH + Duration::from_secs(since.as_secs()))
}

fn random(into: &mut [u8]) -> Result<(), CaError> {
    rand::fill(into).map_err(|_unspecified| CaError::Crypto("draw random bytes"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
