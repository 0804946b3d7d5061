//! What one proxy is told: a file for it, written by who starts both. It must not know how it is told.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Everything that the services know, for one proxy.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct World {
    /// Where the proxy asks. On the loopback it asks in clear, as Linkerd's own components do.
    pub listen: SocketAddr,
    /// Who signs the proxy's certificate, as PEM files.
    pub issuer: Issuer,
    /// The name in that certificate.
    pub identity: String,
    /// Where the proxy's key, its request for a certificate and its token are put.
    pub documents: PathBuf,
    /// The ports that it takes.
    pub inbound: Vec<Port>,
    /// What it calls.
    pub outbound: Vec<Service>,
}

/// A CA.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// A port of the task.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    pub port: u16,
    /// Carried as bytes, whatever they are.
    pub opaque: bool,
}

/// A service with one endpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    pub name: String,
    /// What the task connects to.
    pub address: SocketAddr,
    /// Where that is in truth.
    pub endpoint: SocketAddr,
    /// The name in the certificate there.
    pub identity: String,
    /// Its bytes are carried as such, to this port of the other proxy, which learns from a header where they belong.
    pub opaque_by: Option<u16>,
}

impl World {
    /// Where the key, the request and the token are.
    #[must_use]
    pub fn document(&self, name: &str) -> PathBuf {
        self.documents.join(name)
    }
}

impl Service {
    /// How it is asked for by name.
    #[must_use]
    pub fn authority(&self) -> String {
        format!("{}:{}", self.name, self.address.port())
    }
}
