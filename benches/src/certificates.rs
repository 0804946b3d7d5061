//! Certificates for the proxies of others: a CA, a leaf for each side, and the same from a CA that nobody trusts.
//!
//! P-256 throughout, as the mesh's own. It must not know who uses them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// The names in the certificates of the side that is called, and of the one that calls.
pub const CALLED: &str = "called.bench.mesh";
pub const CALLER: &str = "caller.bench.mesh";

/// A CA and what it has issued, as files.
#[derive(Clone, Debug)]
pub struct Authority {
    pub root: PathBuf,
    /// Its own certificate and key, for proxies that get their certificates from an issuer.
    pub issuer: Leaf,
    pub caller: Leaf,
    pub called: Leaf,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct Leaf {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Both in one file, as haproxy wants them.
    pub both: PathBuf,
}

impl Authority {
    /// Makes a CA and its leaves in a new folder.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn make(dir: &Path, name: &str) -> Result<Self> {
        let dir = dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let key = KeyPair::generate().context("cannot make a CA key")?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(&format!("bench {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).context("cannot sign the CA certificate")?;
        let own = Leaf::write(&dir, "ca", &root.pem(), &key.serialize_pem())?;
        let issuer = Issuer::new(params, key);
        Ok(Self {
            root: own.certificate.clone(),
            issuer: own,
            caller: leaf(&dir, &issuer, CALLER, ExtendedKeyUsagePurpose::ClientAuth)?,
            called: leaf(&dir, &issuer, CALLED, ExtendedKeyUsagePurpose::ServerAuth)?,
        })
    }
}

impl Leaf {
    fn write(dir: &Path, name: &str, certificate: &str, key: &str) -> Result<Self> {
        let write = |ending: &str, text: &str| -> Result<PathBuf> {
            let path = dir.join(format!("{name}.{ending}"));
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            Ok(path)
        };
        Ok(Self {
            both: write("both.pem", &format!("{certificate}{key}"))?,
            certificate: write("crt.pem", certificate)?,
            key: write("key.pem", key)?,
        })
    }
}

fn leaf(dir: &Path, issuer: &Issuer<'_, KeyPair>, name: &str, usage: ExtendedKeyUsagePurpose) -> Result<Leaf> {
    let key = KeyPair::generate().context("cannot make a key")?;
    let mut params = CertificateParams::new([name.to_owned()]).context("cannot name a certificate")?;
    params.distinguished_name = named(name);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    let certificate = params.signed_by(&key, issuer).context("cannot sign a certificate")?;
    Leaf::write(dir, name, &certificate.pem(), &key.serialize_pem())
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}
