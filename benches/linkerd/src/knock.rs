//! What a proxy's own port says to a certificate: the part of the proofs that no common client can do, as it speaks a
//! header of Linkerd's. It must not know whether it should be let in.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs::default_provider, version::TLS13};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::header;

/// Whom to ask, and as whom.
#[derive(Clone, Debug)]
pub struct Knock {
    pub at: SocketAddr,
    /// The name in the certificate there.
    pub name: String,
    /// Who may have issued that.
    pub root: PathBuf,
    /// The port behind it.
    pub port: u16,
    /// A certificate and its key.
    pub own: Option<(PathBuf, PathBuf)>,
}

impl Knock {
    /// Asks for `/marker` over HTTP/1.1; returns the body of what is answered.
    ///
    /// # Errors
    /// It was not let in, or a file cannot be read.
    pub async fn ask(&self) -> Result<String> {
        let mut roots = RootCertStore::empty();
        for root in certificates(&self.root)? {
            roots.add(root).with_context(|| format!("{} holds no CA's certificate", self.root.display()))?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13])
            .context("TLS 1.3 is not to be had")?
            .with_root_certificates(roots);
        let mut configuration = match &self.own {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let private = PrivateKeyDer::from_pem_file(key)
                    .with_context(|| format!("cannot read a key from {}", key.display()))?;
                builder
                    .with_client_auth_cert(certificates(certificate)?, private)
                    .with_context(|| format!("{} and {} do not fit", certificate.display(), key.display()))?
            }
        };
        configuration.alpn_protocols = vec![header::PROTOCOL.to_vec()];
        let name = ServerName::try_from(self.name.clone()).with_context(|| format!("{} is no name", self.name))?;
        let stream = TcpStream::connect(self.at).await.with_context(|| format!("cannot connect to {}", self.at))?;
        let mut stream = TlsConnector::from(Arc::new(configuration))
            .connect(name, stream)
            .await
            .with_context(|| format!("the handshake with {} failed", self.at))?;
        let mut answer = String::new();
        let asked = async {
            header::write(&mut stream, self.port).await?;
            let request = format!("GET /marker HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.name);
            stream.write_all(request.as_bytes()).await?;
            stream.read_to_string(&mut answer).await
        };
        asked.await.with_context(|| format!("{} ended the connection", self.at))?;
        let (_, body) = answer.split_once("\r\n\r\n").with_context(|| format!("{answer:?} is no answer"))?;
        Ok(body.to_owned())
    }
}

fn certificates(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    read.with_context(|| format!("cannot read certificates from {}", path.display()))
}
