//! What the AWS backends have in common: `region` and `endpoint`, where the SDK's own search is not to be used.
//!
//! Must not know any API.

use crate::document::Section;

/// Where an AWS API is. What is `None`, the SDK finds by itself: environment, shared files, instance metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aws {
    pub region: Option<String>,
    /// Base address of the API.
    pub endpoint: Option<String>,
}

pub(super) fn aws(s: &mut Section<'_>) -> Aws {
    let region = s.text("region");
    if let Some(region) = region.as_ref().filter(|region| !is_region(region)) {
        let problem = format!("`{}` is no region", region.escape_debug());
        s.fault("region", problem, "write it like `eu-central-1`, or leave it out");
    }
    let endpoint = endpoint(s, "endpoint");
    Aws { region, endpoint }
}

/// The base address of an API.
pub(super) fn endpoint(s: &mut Section<'_>, key: &'static str) -> Option<String> {
    let endpoint = s.text(key);
    if let Some(endpoint) = endpoint.as_ref().filter(|endpoint| !is_endpoint(endpoint)) {
        let problem = format!("`{}` is no address of an API", endpoint.escape_debug());
        s.fault(key, problem, "write it like `https://vpce-1a2b3c.ecs.eu-central-1.vpce.amazonaws.com`");
    }
    endpoint
}

fn is_region(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_endpoint(text: &str) -> bool {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    rest.is_some_and(|rest| {
        !rest.starts_with(['/', ':']) && !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_graphic())
    })
}
