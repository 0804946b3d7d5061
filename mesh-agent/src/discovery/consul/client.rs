//! Questions to a Consul agent over HTTP, and why one got no answer.
//!
//! Knows HTTP, TLS, the token and Consul's headers; must not know what is asked for, nor when.

use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

use mesh_core::{
    config::discovery::{Consul, Tls},
    consul::answer::Malformed,
};
use reqwest::{Method, RequestBuilder, Response, StatusCode, header::HeaderValue};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

/// How long a question that does not block may take.
const SOON: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);
/// An answer beyond this is not read: 5,000 instances of one service are about 8 MiB.
const LARGEST: usize = 64 << 20;
/// A server that has not heard from its leader for so long knows no more than we do.
const STALEST: Duration = Duration::from_secs(60);

/// There is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("cannot read the Consul token {}: see that the file exists and that the agent may read it", .path.display())]
    Token { path: PathBuf, source: io::Error },
    #[error("the Consul token in {} is not one line of printable characters: write the token alone", .path.display())]
    BadToken { path: PathBuf },
    #[error("cannot reach Consul at {address}: does its agent run, and is `discovery.consul.address` right?")]
    Unreachable { address: String, source: reqwest::Error },
    #[error(
        "Consul at {address} did not answer {what} within {patience:?}: is it overloaded, or cut off from its servers?"
    )]
    Slow { address: String, what: String, patience: Duration },
    #[error("Consul refuses {what} ({said}): the token needs the ACL rule {rule}")]
    Denied { what: String, said: String, rule: &'static str },
    #[error("Consul hides services from the agent: the token needs the ACL rules {READ}")]
    Hidden,
    #[error("Consul at {address} answers {what} with {status} ({said}): see its own log")]
    Failed { address: String, what: String, status: StatusCode, said: String },
    #[error("Consul's answer to {what} is larger than {LARGEST} octets, so it is not read")]
    TooLarge { what: String },
    #[error("the Consul server that answers has not heard from a leader for {0:?}, so it may know less than is known")]
    Leaderless(Duration),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// What reading needs.
pub const READ: &str = "service_prefix \"\" { policy = \"read\" } and node_prefix \"\" { policy = \"read\" }";
/// What registering needs.
pub const WRITE: &str = "service_prefix \"\" { policy = \"write\" }, or service write for the name of each task here";
/// What it needs to see what is registered.
pub const READ_AGENT: &str = "service_prefix \"\" { policy = \"read\" }";

/// The client cannot be made. It does not depend on whether Consul is there.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    #[error("cannot read {}, which is needed to speak TLS to Consul: see that it exists and is PEM", .path.display())]
    Pem { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("{} holds no certificate", .path.display())]
    NoCertificate { path: PathBuf },
    #[error("{} holds a certificate that cannot be trusted", .path.display())]
    BadCertificate { path: PathBuf, source: rustls::Error },
    #[error("the system has no trusted certificates: install ca-certificates, or set `discovery.consul.tls.ca_file`")]
    NoSystemRoots,
    #[error("cannot use the client certificate {} with its key", .path.display())]
    Client { path: PathBuf, source: rustls::Error },
    #[error("cannot set up TLS for Consul")]
    Tls(#[source] rustls::Error),
    #[error("cannot set up an HTTP client for Consul")]
    Http(#[source] reqwest::Error),
}

/// A question, without its index.
#[derive(Clone, Debug)]
pub struct Question {
    pub path: String,
    /// Further parameters, ready for a URL.
    pub parameters: Vec<(&'static str, String)>,
    /// The ACL rule that it needs.
    pub rule: &'static str,
}

/// An answer with status 200.
#[derive(Debug)]
pub struct Answer {
    pub body: Vec<u8>,
    /// `X-Consul-Index`.
    pub index: Option<u64>,
    /// Whether ACLs kept something back. Consul says so since 1.11.
    pub filtered: bool,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    config: Arc<Consul>,
}

impl Client {
    /// # Errors
    /// A certificate cannot be used.
    pub fn new(config: Arc<Consul>) -> Result<Self, SetUpError> {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls(&config)?)
            .connect_timeout(CONNECT)
            // Consul closes idle connections late; one that has died in silence would cost a whole wait.
            .tcp_keepalive(Duration::from_secs(15))
            .pool_idle_timeout(Duration::from_secs(90))
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("ecs-mesh/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(SetUpError::Http)?;
        Ok(Self { http, config })
    }

    /// Asks. With an index the server waits until there is something newer, for `wait` at most.
    ///
    /// # Errors
    /// There is no answer, or none to be relied on.
    pub async fn get(&self, question: &Question, blocking: Option<(u64, Duration)>) -> Result<Answer, Trouble> {
        let mut parameters = question.parameters.clone();
        let mut patience = SOON;
        if let Some((index, wait)) = blocking {
            patience = mesh_core::consul::cursor::patience(wait);
            parameters.extend([("index", index.to_string()), ("wait", format!("{}ms", wait.as_millis()))]);
        }
        let asked = self.ask(Method::GET, question, &parameters, None);
        let response = self.within(patience, question, asked).await?;
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let last_contact = header("x-consul-lastcontact").and_then(|ms| ms.parse().ok()).map(Duration::from_millis);
        let filtered = header("x-consul-results-filtered-by-acls") == Some("true");
        let index = header("x-consul-index").and_then(|index| index.parse().ok());
        if let Some(silence) = last_contact.filter(|silence| *silence > STALEST) {
            return Err(Trouble::Leaderless(silence));
        }
        let body = self.within(SOON, question, read(response, question, &self.config.address)).await?;
        Ok(Answer { body, index, filtered })
    }

    /// Tells Consul's agent something.
    ///
    /// # Errors
    /// It was not taken.
    pub async fn put(&self, question: &Question, body: String) -> Result<(), Trouble> {
        let asked = self.ask(Method::PUT, question, &question.parameters, Some(body));
        self.within(SOON, question, asked).await.map(drop)
    }

    async fn within<T>(
        &self,
        patience: Duration,
        question: &Question,
        asked: impl Future<Output = Result<T, Trouble>>,
    ) -> Result<T, Trouble> {
        tokio::time::timeout(patience, asked).await.unwrap_or_else(|_elapsed| {
            Err(Trouble::Slow { address: self.config.address.clone(), what: question.path.clone(), patience })
        })
    }

    async fn ask(
        &self,
        method: Method,
        question: &Question,
        parameters: &[(&'static str, String)],
        body: Option<String>,
    ) -> Result<Response, Trouble> {
        let request = self.with_token(self.http.request(method, self.url(question, parameters)))?;
        let request = if let Some(body) = body { request.body(body) } else { request };
        let unreachable = |source| Trouble::Unreachable { address: self.config.address.clone(), source };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response);
        }
        let said = read(response, question, &self.config.address).await.unwrap_or_default();
        let said: String = String::from_utf8_lossy(&said).chars().take(200).flat_map(char::escape_debug).collect();
        let what = question.path.clone();
        if status == StatusCode::FORBIDDEN {
            return Err(Trouble::Denied { what, said, rule: question.rule });
        }
        Err(Trouble::Failed { address: self.config.address.clone(), what, status, said })
    }

    fn url(&self, question: &Question, parameters: &[(&'static str, String)]) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if let Some(namespace) = &self.config.namespace {
            query.append_pair("ns", namespace);
        }
        for (key, value) in parameters {
            if value.is_empty() {
                query.append_key_only(key)
            } else {
                query.append_pair(key, value)
            };
        }
        format!("{}{}?{}", self.config.address, question.path, query.finish())
    }

    /// The token is read each time: questions are rare, and a token that was changed is used at once.
    fn with_token(&self, request: RequestBuilder) -> Result<RequestBuilder, Trouble> {
        let Some(path) = &self.config.token_file else { return Ok(request) };
        let text = fs::read_to_string(path).map_err(|source| Trouble::Token { path: path.clone(), source })?;
        let bad = || Trouble::BadToken { path: path.clone() };
        let mut token = HeaderValue::from_str(text.trim()).map_err(|_unprintable| bad())?;
        if token.is_empty() {
            return Err(bad());
        }
        token.set_sensitive(true);
        Ok(request.header("X-Consul-Token", token))
    }
}

async fn read(mut response: Response, question: &Question, address: &str) -> Result<Vec<u8>, Trouble> {
    let mut body = Vec::new();
    let failed = |source| Trouble::Unreachable { address: address.to_owned(), source };
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if body.len() + chunk.len() > LARGEST {
            return Err(Trouble::TooLarge { what: question.path.clone() });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn tls(config: &Consul) -> Result<ClientConfig, SetUpError> {
    let roots = if config.address.starts_with("https://") { roots(&config.tls)? } else { RootCertStore::empty() };
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(SetUpError::Tls)?
        .with_root_certificates(roots);
    let Some((cert, key)) = &config.tls.client else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(cert)?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|source| SetUpError::Pem { path: key.clone(), source })?;
    builder.with_client_auth_cert(chain, key_der).map_err(|source| SetUpError::Client { path: cert.clone(), source })
}

fn roots(tls: &Tls) -> Result<RootCertStore, SetUpError> {
    let mut roots = RootCertStore::empty();
    match &tls.ca_file {
        Some(path) => {
            for certificate in certificates(path)? {
                let bad = |source| SetUpError::BadCertificate { path: path.clone(), source };
                roots.add(certificate).map_err(bad)?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(SetUpError::NoSystemRoots);
            }
        }
    }
    Ok(roots)
}

fn certificates(path: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, SetUpError> {
    let pem = |source| SetUpError::Pem { path: path.into(), source };
    let found = CertificateDer::pem_file_iter(path).map_err(pem)?.collect::<Result<Vec<_>, _>>().map_err(pem)?;
    if found.is_empty() { Err(SetUpError::NoCertificate { path: path.into() }) } else { Ok(found) }
}
