//! One look at Cloud Map before there is an agent: whether it answers, and what the agent's role may do.
//!
//! Changes nothing there.

use mesh_core::{aws::pace::Pace, config::cloud_map::CloudMap};

use super::{
    super::aws::{Trouble, gate::Gate},
    client::{Answer, Asked, Client},
};

/// Asks for everything that the agent will ask for first, and for the instances of one service. Returns what was found,
/// in words.
///
/// # Errors
/// Something gets no good answer.
pub async fn check(config: &CloudMap) -> Result<String, Trouble> {
    let client = Client::new(config).await?;
    let gate = Gate::new(Pace::new(config.rate, config.rate));
    let mut found = Vec::new();
    for (place, namespace) in config.namespaces.iter().enumerate() {
        gate.turn().await;
        let Answer::Names(names) = client.ask(config, &Asked::Names(place), &gate).await? else { continue };
        let wanted: Vec<&String> = names.iter().filter(|name| config.wants(name)).collect();
        found.push(format!("{} of {} services of {namespace} are wanted", wanted.len(), names.len()));
        if let Some(name) = wanted.first() {
            client.ask(config, &Asked::Service((place, name.as_str().into())), &gate).await?;
        }
    }
    Ok(format!("Cloud Map answers: {}", found.join("; ")))
}
