//! What the AWS backends have in common: how the SDK is set up, and why a question got no answer.
//!
//! The SDK's own retries are off: how often may be asked is decided in one place, the pace of each backend. Must not
//! know what is asked for.

pub mod gate;

use std::{error::Error, time::Duration};

use aws_config::{
    AppName, BehaviorVersion, Region, SdkConfig, retry::RetryConfig,
    stalled_stream_protection::StalledStreamProtectionConfig, timeout::TimeoutConfig,
};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_servicediscovery::{
    config::{
        ConfigBag, Intercept, RuntimeComponents, http::HttpResponse, interceptors::BeforeTransmitInterceptorContextMut,
    },
    error::{BoxError, ConnectorError, ProvideErrorMetadata, SdkError},
};
use mesh_core::config::aws::Aws;

/// How long a question may take, with everything.
const SOON: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);

/// There is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error(
        "no AWS region is known: set `region`, or AWS_REGION, or let the agent reach the instance metadata (IMDSv2)"
    )]
    NoRegion,
    #[error(
        "the agent has no AWS credentials: give the instance a role, and let the agent reach the instance metadata"
    )]
    NoCredentials(#[source] BoxError),
    #[error(
        "cannot reach the AWS API for {action}: is there a route to its endpoint, and are `endpoint`, `data_endpoint` or \
         AWS_ENDPOINT_URL right where they are set?"
    )]
    Unreachable { action: &'static str, source: BoxError },
    #[error("the AWS API did not answer {action} within {SOON:?}: is it overloaded, or the network lossy?")]
    Slow { action: &'static str },
    #[error(
        "AWS says that it is asked too often ({code} for {action}): the agent asks less; with many hosts, raise the \
         intervals or the account's quota"
    )]
    Throttled { action: &'static str, code: String },
    #[error("AWS refuses {action} ({said}): the agent's role needs the IAM action {needed}")]
    Denied {
        action: &'static str,
        said: String,
        /// The action that is lacking: not always the one that was called.
        needed: String,
    },
    #[error("AWS does not take the agent's credentials for {action} ({said}): see the instance's role")]
    Credentials { action: &'static str, said: String },
    #[error(
        "AWS takes the request for {action} for too old or too new ({said}): set this host's clock, chronyd does it"
    )]
    Clock { action: &'static str, said: String },
    #[error("AWS does not know what {action} asked for ({said})")]
    Gone { action: &'static str, said: String },
    #[error("there is no Cloud Map namespace {0} in this account and region: see `discovery.cloud_map.namespaces`")]
    NoNamespace(String),
    #[error("AWS answers {action} with {said}")]
    Failed { action: &'static str, said: String },
    #[error("the answer to {action} is not what AWS gives: is another program answering at this address?")]
    Malformed { action: &'static str, source: Option<BoxError> },
}

impl Trouble {
    /// Whether it concerns every question, not this one only.
    pub fn is_general(&self) -> bool {
        match self {
            Self::NoRegion
            | Self::NoCredentials(_)
            | Self::Unreachable { .. }
            | Self::Slow { .. }
            | Self::Throttled { .. }
            | Self::Credentials { .. }
            | Self::Clock { .. } => true,
            Self::Denied { .. }
            | Self::Gone { .. }
            | Self::NoNamespace(_)
            | Self::Failed { .. }
            | Self::Malformed { .. } => false,
        }
    }

    pub fn is_throttled(&self) -> bool {
        matches!(self, Self::Throttled { .. })
    }

    /// Whether a request may have been carried out although there is no good answer.
    pub fn may_be_heard(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Slow { .. } | Self::Failed { .. } | Self::Malformed { .. })
    }

    /// A thing asked about is not there.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }

    /// What the SDK says about `action`, in our words.
    pub(super) fn of<E>(action: &'static str, error: SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        if let Some(failure) = credentials(&error) {
            return Self::NoCredentials(failure);
        }
        match error {
            SdkError::TimeoutError(_) => Self::Slow { action },
            SdkError::DispatchFailure(failure) => {
                Self::Unreachable { action, source: source(failure.as_connector_error()) }
            }
            SdkError::ConstructionFailure(_) => {
                Self::Failed { action, said: "nothing: the request could not be formed".into() }
            }
            SdkError::ServiceError(said) => {
                let status = said.raw().status().as_u16();
                let meta = said.err().meta();
                Self::said(action, status, meta.code(), meta.message())
            }
            SdkError::ResponseError(odd) if !odd.raw().status().is_success() => {
                // Not in the API's own words: a proxy, or something else on the way.
                let status = odd.raw().status().as_u16();
                let body = String::from_utf8_lossy(odd.raw().body().bytes().unwrap_or_default());
                let body: String = body.chars().take(200).flat_map(char::escape_debug).collect();
                let said = format!("status {status}: {body}");
                if status == 403 { Self::denied(action, said) } else { Self::Failed { action, said } }
            }
            other @ (SdkError::ResponseError(_) | _) => Self::Malformed { action, source: other.into_source().ok() },
        }
    }

    /// From an error that the API itself has given.
    fn said(action: &'static str, status: u16, code: Option<&str>, message: Option<&str>) -> Self {
        let clean = |text: &str| text.chars().take(300).flat_map(char::escape_debug).collect::<String>();
        let Some(code) = code.map(clean) else {
            let said = format!("status {status}");
            return if (200..300).contains(&status) {
                Self::Malformed { action, source: None }
            } else {
                Self::Failed { action, said }
            };
        };
        let message = message.map(clean).unwrap_or_default();
        let said = if message.is_empty() { code.clone() } else { format!("{code}: {message}") };
        let is_late = ["Signature expired", "Signature not yet current"].iter().any(|start| message.starts_with(start));
        match code.as_str() {
            "ThrottlingException"
            | "Throttling"
            | "RequestLimitExceeded"
            | "TooManyRequestsException"
            | "RequestThrottled"
            | "RequestThrottledException"
            | "SlowDown" => Self::Throttled { action, code },
            "RequestTimeTooSkewed" | "RequestExpired" | "RequestInTheFuture" => Self::Clock { action, said },
            "InvalidSignatureException" | "SignatureDoesNotMatch" if is_late => Self::Clock { action, said },
            "AccessDeniedException" | "AccessDenied" | "UnauthorizedOperation" => Self::denied(action, said),
            "UnrecognizedClientException"
            | "InvalidClientTokenId"
            | "ExpiredToken"
            | "ExpiredTokenException"
            | "InvalidSignatureException"
            | "SignatureDoesNotMatch"
            | "IncompleteSignature"
            | "MissingAuthenticationToken"
            | "MissingAuthenticationTokenException"
            | "InvalidAccessKeyId" => Self::Credentials { action, said },
            "ServiceNotFound"
            | "NamespaceNotFound"
            | "InstanceNotFound"
            | "ServiceNotFoundException"
            | "ClusterNotFoundException"
            | "TargetNotFoundException" => Self::Gone { action, said },
            _ if status == 429 => Self::Throttled { action, code },
            _ => Self::Failed { action, said },
        }
    }

    /// A request is refused. Cloud Map does some things in the caller's name, such as what Route 53 is asked: then the words
    /// name another action than the one that was called.
    fn denied(action: &'static str, said: String) -> Self {
        let named = said.split_once("to perform: ").map(|(_, rest)| rest.trim_start());
        // With the end of the words, the name may have been cut off as well.
        let named = named.and_then(|rest| {
            rest.split_once(|c: char| !(c.is_ascii_alphanumeric() || ":-_*".contains(c))).map(|(name, _)| name)
        });
        let named =
            named.filter(|name| name.split_once(':').is_some_and(|(api, verb)| !api.is_empty() && !verb.is_empty()));
        let needed = named.unwrap_or(action).to_owned();
        Self::Denied { action, said, needed }
    }
}

/// The reason below the SDK's own words, which say less.
fn source(connector: Option<&ConnectorError>) -> BoxError {
    let text = connector.map_or_else(|| "no reason is given".to_owned(), |error| super::chain(error));
    text.into()
}

/// Why no credentials were found, if that is what failed.
fn credentials(error: &(dyn Error + 'static)) -> Option<BoxError> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(failure) = error.downcast_ref::<CredentialsError>() {
            return Some(super::chain(failure).into());
        }
        cause = error.source();
    }
    None
}

/// Everything that a client of any API needs.
///
/// # Errors
/// No region is known. The next attempt may find one: the instance metadata may not be there yet when a host boots.
pub async fn load(aws: &Aws) -> Result<SdkConfig, Trouble> {
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT).operation_timeout(SOON).build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts)
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    if let Ok(name) = AppName::new("ecs-mesh") {
        loader = loader.app_name(name);
    }
    if let Some(region) = &aws.region {
        loader = loader.region(Region::new(region.clone()));
    }
    if let Some(endpoint) = &aws.endpoint {
        loader = loader.endpoint_url(endpoint);
    }
    let config = loader.load().await;
    if config.region().is_none() { Err(Trouble::NoRegion) } else { Ok(config) }
}

/// Cloud Map's data plane has a host of its own, whose name is `data-` and that of the control plane: so the SDK puts
/// `data-` before any endpoint that it is told. That makes a name that nobody has of an address, of the name of a VPC
/// endpoint, and of a server that stands in for AWS.
#[derive(Debug)]
pub(super) struct DataPlane {
    /// The configuration names an endpoint.
    pub(super) is_configured: bool,
}

impl Intercept for DataPlane {
    fn name(&self) -> &'static str {
        "DataPlane"
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request_mut();
        if let Some(uri) = self.without_prefix(request.uri()) {
            request.set_uri(uri)?;
        }
        Ok(())
    }
}

impl DataPlane {
    /// The endpoint itself, where the SDK has made something of it that is not there.
    fn without_prefix(&self, uri: &str) -> Option<String> {
        let (scheme, rest) = uri.split_once("://data-")?;
        let host = rest.split('/').next()?;
        let addr = host.parse::<std::net::SocketAddr>().is_ok() || host.parse::<std::net::IpAddr>().is_ok();
        let local = host.split(':').next() == Some("localhost");
        // AWS's own name of the control plane, which has a twin.
        let has_twin = host.starts_with("servicediscovery");
        (addr || local || self.is_configured && !has_twin).then(|| format!("{scheme}://{rest}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_apart() {
        let action = "servicediscovery:DiscoverInstances";
        let shown = |status, code, message| {
            let trouble = Trouble::said(action, status, code, message);
            (trouble.is_general(), trouble.to_string())
        };
        for (code, message, general, expected) in [
            ("RequestLimitExceeded", None, true, "AWS says that it is asked too often (RequestLimitExceeded for"),
            ("ThrottlingException", Some("Rate exceeded"), true, "AWS says that it is asked too often"),
            (
                "AccessDeniedException",
                Some("User: a is not"),
                false,
                "AWS refuses servicediscovery:DiscoverInstances (",
            ),
            (
                "AccessDeniedException",
                Some("User: a is not authorized to perform: route53:ChangeResourceRecordSets on resource: b because"),
                false,
                "AWS refuses servicediscovery:DiscoverInstances (AccessDeniedException: User: a is not authorized to \
                 perform: route53:ChangeResourceRecordSets on resource: b because): the agent's role needs the IAM action \
                 route53:ChangeResourceRecordSets",
            ),
            (
                "AccessDeniedException",
                Some("User: a is not authorized to perform: servicediscovery:DiscoverInst"),
                false,
                "AWS refuses servicediscovery:DiscoverInstances (AccessDeniedException: User: a is not authorized to \
                 perform: servicediscovery:DiscoverInst): the agent's role needs the IAM action \
                 servicediscovery:DiscoverInstances",
            ),
            (
                "RequestTimeTooSkewed",
                None,
                true,
                "AWS takes the request for servicediscovery:DiscoverInstances for too",
            ),
            ("InvalidSignatureException", Some("Signature expired: 2026 is"), true, "AWS takes the request for"),
            ("InvalidSignatureException", Some("The request signature we"), true, "AWS does not take the agent's cred"),
            ("ExpiredTokenException", None, true, "AWS does not take the agent's credentials"),
            ("ServiceNotFound", None, false, "AWS does not know what"),
            (
                "InvalidInput",
                Some("a\nb"),
                false,
                "AWS answers servicediscovery:DiscoverInstances with InvalidInput: a\\nb",
            ),
        ] {
            let (is_general, text) = shown(400, Some(code), message);
            assert!(is_general == general && text.starts_with(expected), "{code}: {text}");
        }
        assert!(shown(429, Some("X"), None).1.contains("too often"));
        assert!(shown(503, None, None).1.ends_with("with status 503"));
        assert!(shown(200, None, None).1.contains("is not what AWS gives"));
        assert!(
            shown(400, Some("AccessDenied"), None).1.contains("needs the IAM action servicediscovery:DiscoverInst")
        );
    }

    #[test]
    fn the_data_plane_is_where_the_configuration_says() {
        let vpc = "https://data-vpce-1.data-servicediscovery.eu-central-1.vpce.amazonaws.com/";
        for (uri, otherwise, configured) in [
            ("http://data-127.0.0.1:5000/", Some("http://127.0.0.1:5000/"), Some("http://127.0.0.1:5000/")),
            ("http://data-[::1]:5000/", Some("http://[::1]:5000/"), Some("http://[::1]:5000/")),
            ("http://data-localhost:5000/x", Some("http://localhost:5000/x"), Some("http://localhost:5000/x")),
            ("http://data-moto:5000/", None, Some("http://moto:5000/")),
            (vpc, None, Some("https://vpce-1.data-servicediscovery.eu-central-1.vpce.amazonaws.com/")),
            ("https://data-data-servicediscovery.x.api.aws/", None, Some("https://data-servicediscovery.x.api.aws/")),
            ("https://data-servicediscovery.eu-central-1.amazonaws.com/", None, None),
            ("https://data-servicediscovery-fips.us-east-1.api.aws/", None, None),
        ] {
            for (is_configured, expected) in [(false, otherwise), (true, configured)] {
                let found = DataPlane { is_configured }.without_prefix(uri);
                assert_eq!(found.as_deref(), expected, "{uri} {is_configured}");
            }
        }
    }
}
