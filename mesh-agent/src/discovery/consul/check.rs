//! One look at Consul before there is an agent: whether it answers, and whether the token is good.
//!
//! Changes nothing there, so a token that may read and not write is found out only when something is registered.

use std::sync::Arc;

use mesh_core::{config::discovery::Consul, consul::answer};

use super::{
    client::{Client, Question, READ, READ_AGENT, SetUpError, Trouble},
    watch::names,
};

/// Why Consul is of no use as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    SetUp(#[from] SetUpError),
    #[error(transparent)]
    Trouble(#[from] Trouble),
    #[error("Consul knows no datacenter {0}: see `discovery.consul.datacenters`")]
    Datacenter(String, #[source] Trouble),
}

/// Asks for everything that the agent will ask for first. Returns what was found, in words.
///
/// # Errors
/// Something gets no good answer.
pub async fn check(config: Arc<Consul>) -> Result<String, CheckError> {
    let client = Client::new(config.clone())?;
    let mut found = Vec::new();
    let home = [None].into_iter().filter(|_| config.datacenters.is_empty());
    for datacenter in home.chain(config.datacenters.iter().map(Some)) {
        let parameters = datacenter.map(|datacenter| ("dc", datacenter.clone())).into_iter().collect();
        let question = Question { path: "/v1/catalog/services".into(), parameters, rule: READ };
        let answer = match (client.get(&question, None).await, datacenter) {
            (Err(trouble @ Trouble::Failed { .. }), Some(datacenter)) => {
                return Err(CheckError::Datacenter(datacenter.clone(), trouble));
            }
            (answer, _) => answer?,
        };
        let names = names(&answer, &config)?;
        let wanted = names.iter().filter(|(name, tags)| config.wants(name, tags)).count();
        let hidden = if answer.filtered { ", others are hidden by an ACL" } else { "" };
        let datacenter = datacenter.map(|datacenter| format!(" of {datacenter}")).unwrap_or_default();
        found.push(format!("{wanted} of {} services{datacenter} are wanted{hidden}", names.len()));
    }
    if config.registration.is_some() {
        let question = Question { path: "/v1/agent/services".into(), parameters: Vec::new(), rule: READ_AGENT };
        let registered = answer::registered(&client.get(&question, None).await?.body).map_err(Trouble::from)?;
        found.push(format!("{} instances are registered with this agent", registered.len()));
    }
    Ok(format!("{} answers: {}", config.address, found.join("; ")))
}
