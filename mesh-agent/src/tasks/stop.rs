//! Stops containers that somebody has found ill, as `docker stop` does; ECS then replaces their tasks.
//!
//! Must not know why.

use std::path::PathBuf;

use bollard::{API_DEFAULT_VERSION, Docker, errors::Error, query_parameters::StopContainerOptions};
use mesh_core::readiness::replace::Stop;
use tokio::sync::mpsc;

/// ECS's stopTimeout is at most two minutes.
const LIMIT: u64 = 150;

/// Stops whatever is ordered, one after the other, until nobody orders.
pub async fn run(socket: PathBuf, mut orders: mpsc::Receiver<Stop>) {
    while let Some(Stop { task, container }) = orders.recv().await {
        match stop(&socket, &container).await {
            Ok(()) => tracing::info!(task = task.as_str(), container, "stopped"),
            // It has ended by itself.
            Err(Error::DockerResponseServerError { status_code: 304 | 404, .. }) => {}
            Err(error) => tracing::warn!(
                task = task.as_str(), container, %error,
                "docker does not stop an unhealthy container; it is tried again while it is unhealthy"
            ),
        }
    }
}

async fn stop(socket: &std::path::Path, container: &str) -> Result<(), Error> {
    let docker = Docker::connect_with_unix(&socket.to_string_lossy(), LIMIT, API_DEFAULT_VERSION)?;
    let docker = docker.negotiate_version().await?;
    docker.stop_container(container, None::<StopContainerOptions>).await
}
