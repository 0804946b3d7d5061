//! What certificates say about identity: the only place where X.509 is read.
//!
//! Reads names and times of a certificate; must not decide whether its chain is trusted (that is TLS's own path
//! validation, done before).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_core::id::{SpiffeId, TrustDomain};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, parse_x509_certificate, time::ASN1Time};

/// What a leaf certificate says, once its chain was found good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafFacts {
    pub id: SpiffeId,
    pub not_after: SystemTime,
}

/// Why a certificate is not an X.509-SVID of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSvid {
    #[error("the certificate cannot be parsed")]
    Malformed,
    #[error("the certificate has no URI name, or more than one (SPIFFE X.509-SVID §2)")]
    UriNames,
    #[error("the certificate's URI name is not a SPIFFE ID of a workload")]
    NotSpiffe,
    #[error("the certificate is a CA's, or may sign certificates or revocation lists (SPIFFE X.509-SVID §4)")]
    MaySign,
}

/// The identity in a leaf, and when it ends.
///
/// # Errors
/// The certificate breaks a rule of SPIFFE X.509-SVID §2 or §4.
pub fn leaf_facts(der: &[u8]) -> Result<LeafFacts, NotSvid> {
    let (_rest, certificate) = parse_x509_certificate(der).map_err(|_malformed| NotSvid::Malformed)?;
    let constraints = certificate.basic_constraints().map_err(|_malformed| NotSvid::Malformed)?;
    let usage = certificate.key_usage().map_err(|_malformed| NotSvid::Malformed)?;
    if constraints.is_some_and(|it| it.value.ca)
        || usage.is_some_and(|it| it.value.key_cert_sign() || it.value.crl_sign())
    {
        return Err(NotSvid::MaySign);
    }
    let id: SpiffeId = only_uri(&certificate)?.parse().map_err(|_invalid| NotSvid::NotSpiffe)?;
    if id.path().is_empty() {
        return Err(NotSvid::NotSpiffe);
    }
    Ok(LeafFacts { id, not_after: system_time(certificate.validity().not_after) })
}

/// What a root says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootFacts {
    pub domain: TrustDomain,
    pub not_after: SystemTime,
}

/// The trust domain of a root and when it ends; `None` where the certificate is no CA of a trust domain.
pub fn root_facts(der: &[u8]) -> Option<RootFacts> {
    let (_rest, certificate) = parse_x509_certificate(der).ok()?;
    if !certificate.is_ca() {
        return None;
    }
    let domain = only_uri(&certificate).ok()?.strip_prefix("spiffe://")?.parse().ok()?;
    Some(RootFacts { domain, not_after: system_time(certificate.validity().not_after) })
}

fn only_uri<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, NotSvid> {
    let names = certificate.subject_alternative_name().map_err(|_malformed| NotSvid::Malformed)?;
    let mut uris = names.iter().flat_map(|it| &it.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        GeneralName::OtherName(..)
        | GeneralName::RFC822Name(_)
        | GeneralName::DNSName(_)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_)
        | GeneralName::Invalid(..) => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => Ok(uri),
        _ => Err(NotSvid::UriNames),
    }
}

fn system_time(at: ASN1Time) -> SystemTime {
    u64::try_from(at.timestamp()).map_or(UNIX_EPOCH, |seconds| UNIX_EPOCH + Duration::from_secs(seconds))
}
