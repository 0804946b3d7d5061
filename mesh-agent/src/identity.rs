//! Who the workloads of this host are: a key and a certificate for each, issued on demand, kept in memory, renewed in
//! the background, forgotten when their task is gone.
//!
//! Hands out bytes (DER), not TLS objects; must not know how certificates are shown to a peer.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, SystemTime},
};

use mesh_core::{
    config,
    id::{SpiffeId, TrustDomain},
};
use tokio::sync::Notify;

pub mod local_ca;
pub mod renew;
pub mod svid;

use local_ca::{CaError, LocalCa};

/// A workload's certificate and key. Replaced as a whole by renewal; whoever holds one may go on using it.
pub struct Leaf {
    pub id: SpiffeId,
    /// X.509-SVID, DER.
    pub certificate: Arc<[u8]>,
    /// Private key, PKCS#8 DER. Never leaves the process.
    pub key: Arc<[u8]>,
    /// Hexadecimal, as `openssl x509 -serial` shows it in lower case.
    pub serial: String,
    pub issued: SystemTime,
    pub not_after: SystemTime,
    /// Uniformly drawn at issuance; spreads the renewals of many workloads.
    pub draw: u64,
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaf").field("id", &self.id.as_str()).field("serial", &self.serial).finish_non_exhaustive()
    }
}

/// What a peer's certificate is verified against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    pub domain: TrustDomain,
    /// Root certificates, DER.
    pub roots: Vec<Arc<[u8]>>,
}

/// No certificate can be had.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(
        "the CA bundle is for trust domain {bundle}, but `identity.trust_domain` is {configured}: correct the one or \
         use the bundle of the other"
    )]
    OtherDomain { configured: TrustDomain, bundle: TrustDomain },
    #[error("cannot issue a certificate for {id}: this host's CA issues for trust domain {domain} only")]
    ForeignDomain { id: SpiffeId, domain: TrustDomain },
}

/// One workload's certificate, for `mesh-agent status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafStatus {
    pub id: SpiffeId,
    /// `None`: never issued.
    pub serial: Option<String>,
    pub not_after: Option<SystemTime>,
    /// Attempts that failed since the last success.
    pub failures: u32,
    pub last_error: Option<String>,
}

/// The certificates of this host's workloads. Cheap to clone; all clones share one set.
#[derive(Clone)]
pub struct Identities {
    inner: Arc<Inner>,
}

struct Inner {
    ca: LocalCa,
    ttl: Duration,
    held: RwLock<HashMap<SpiffeId, Held>>,
    /// Rung when an identity is added: the renewal task may have to wake earlier.
    added: Notify,
}

#[derive(Default)]
struct Held {
    leaf: Option<Arc<Leaf>>,
    failures: u32,
    last_error: Option<String>,
    /// When to renew; `None` until the renewal task has asked `mesh_core::rotate` about the present state.
    due: Option<SystemTime>,
}

impl Identities {
    /// Opens the CA that the configuration names.
    ///
    /// # Errors
    /// Its files cannot be opened, or belong to another trust domain.
    pub fn open(config: &config::Identity) -> Result<Self, IdentityError> {
        let ca = LocalCa::open(&config.ca_bundle, &config.join_token_file)?;
        if *ca.domain() != config.trust_domain {
            return Err(IdentityError::OtherDomain {
                configured: config.trust_domain.clone(),
                bundle: ca.domain().clone(),
            });
        }
        Ok(Self::new(ca, config.leaf_ttl))
    }

    /// Certificates from `ca`, each valid for `ttl`.
    pub fn new(ca: LocalCa, ttl: Duration) -> Self {
        Self { inner: Arc::new(Inner { ca, ttl, held: RwLock::default(), added: Notify::new() }) }
    }

    /// The current certificate of `id`; issued now where there is none or it has expired.
    ///
    /// # Errors
    /// `id` is of another trust domain, or the CA fails.
    pub fn leaf(&self, id: &SpiffeId) -> Result<Arc<Leaf>, IdentityError> {
        let now = SystemTime::now();
        let current = self.read().get(id).and_then(|held| held.leaf.clone());
        if let Some(leaf) = current.filter(|leaf| now < leaf.not_after) {
            return Ok(leaf);
        }
        if id.domain() != self.inner.ca.domain().as_str() {
            return Err(IdentityError::ForeignDomain { id: id.clone(), domain: self.inner.ca.domain().clone() });
        }
        let mut held = self.write();
        let entry = held.entry(id.clone()).or_default();
        if let Some(leaf) = entry.leaf.as_ref().filter(|leaf| now < leaf.not_after) {
            return Ok(leaf.clone());
        }
        let issued = self.inner.ca.issue(id, now, self.inner.ttl);
        let leaf = entry.record(issued)?;
        drop(held);
        self.inner.added.notify_one();
        Ok(leaf)
    }

    /// Forgets every identity that is not in `wanted`. Connections that use one go on.
    pub fn retain(&self, wanted: &HashSet<SpiffeId>) {
        self.write().retain(|id, _| wanted.contains(id));
    }

    /// What peers are verified against.
    pub fn trust_bundle(&self) -> Arc<TrustBundle> {
        self.inner.ca.trust_bundle()
    }

    /// Every identity held, ordered by name.
    pub fn status(&self) -> Vec<LeafStatus> {
        let held = self.read();
        let ordered: BTreeMap<_, _> = held.iter().collect();
        ordered.into_iter().map(|(id, held)| held.status(id)).collect()
    }

    /// Issues a new certificate for `id` now, whatever the age of the present one.
    ///
    /// # Errors
    /// The CA fails; the present certificate stays.
    pub fn renew(&self, id: &SpiffeId) -> Result<Arc<Leaf>, IdentityError> {
        let now = SystemTime::now();
        // Issued outside the lock: readers go on with the present certificate.
        let issued = self.inner.ca.issue(id, now, self.inner.ttl);
        Ok(self.write().entry(id.clone()).or_default().record(issued)?)
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<SpiffeId, Held>> {
        // Nothing panics while it is locked, and every state in between is a valid one.
        self.inner.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<SpiffeId, Held>> {
        self.inner.held.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn record(&mut self, issued: Result<Leaf, CaError>) -> Result<Arc<Leaf>, CaError> {
        match issued {
            Ok(leaf) => {
                let leaf = Arc::new(leaf);
                *self = Self { leaf: Some(leaf.clone()), ..Self::default() };
                Ok(leaf)
            }
            Err(error) => {
                self.failures += 1;
                self.last_error = Some(error.to_string());
                self.due = None;
                Err(error)
            }
        }
    }

    fn status(&self, id: &SpiffeId) -> LeafStatus {
        LeafStatus {
            id: id.clone(),
            serial: self.leaf.as_ref().map(|leaf| leaf.serial.clone()),
            not_after: self.leaf.as_ref().map(|leaf| leaf.not_after),
            failures: self.failures,
            last_error: self.last_error.clone(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
