//! One look at the ECS API before there is an agent: whether it answers, and what the agent's role may do.
//!
//! Changes nothing there.

use mesh_core::{config::ecs::Ecs, id::ClusterName};

use super::{super::aws::Trouble, client::Client};

/// Asks every question that the agent will ask, once for each cluster as far as there is something to ask for. Returns
/// what was found, in words.
///
/// # Errors
/// Something gets no good answer.
pub async fn check(config: &Ecs, clusters: &[ClusterName]) -> Result<String, Trouble> {
    let client = Client::new(config).await?;
    let mut found = Vec::new();
    for cluster in clusters {
        let name = cluster.as_str();
        let (services, more) = client.list_services(name, None).await?;
        if let Some(arn) = services.first() {
            client.services(name, vec![arn.clone()]).await?;
        }
        let (instances, _) = client.list_instances(name, None).await?;
        if let Some(arn) = instances.first() {
            client.instances(name, vec![arn.clone()]).await?;
        }
        let (tasks, _) = client.list_tasks(name, None).await?;
        if let Some(arn) = tasks.first()
            && let Some(task) = client.tasks(name, vec![arn.clone()]).await?.first()
        {
            client.definition(&task.definition).await?;
        }
        let or_more = if more.is_some() { " or more" } else { "" };
        found.push(format!("{}{or_more} services in {cluster}", services.len()));
    }
    Ok(format!("ECS answers: {}", found.join("; ")))
}
