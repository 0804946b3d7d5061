//! What runs a host's containers: its own dockerd, or the stand-in where dockerd cannot run.
//!
//! It must not know tasks.

use std::{process::Command, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};

use crate::{host::Host, image::Image, process::Process, standin::StandIn};

/// What runs a host's containers.
#[derive(Debug)]
pub(crate) enum Engine {
    None,
    /// The daemon's process, so that it dies with the host.
    Docker(Process),
    StandIn(Arc<StandIn>),
}

/// A container, in the words of the Docker API.
#[derive(Clone, Debug)]
pub(crate) struct ContainerSpec {
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) network: Network,
    pub(crate) cgroup_parent: String,
    /// Container ports: published on dynamic host ports where the network is a bridge, exposed on the host's own.
    pub(crate) ports: Vec<u16>,
    pub(crate) image: String,
    pub(crate) command: Vec<String>,
    /// What `docker stop` sends first; the stand-in knows SIGTERM only.
    pub(crate) stop_signal: Option<String>,
}

/// `HostConfig.NetworkMode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Bridge,
    None,
    Host,
    /// The namespace of another container, by id.
    Of(String),
}

impl Network {
    /// Whether the container has a namespace of its own.
    pub(crate) fn is_own(&self) -> bool {
        matches!(self, Self::Bridge | Self::None)
    }
}

impl Host {
    /// Whether a real dockerd runs the containers.
    #[must_use]
    pub fn has_docker(&self) -> bool {
        matches!(self.engine, Engine::Docker(_))
    }

    /// Loads an image.
    ///
    /// # Errors
    /// The daemon refuses it.
    pub fn import(&self, image: &Image) -> Result<()> {
        match &self.engine {
            Engine::None => self.no_engine(),
            Engine::Docker(_) => self.docker_import(image),
            Engine::StandIn(standin) => {
                standin.import(image);
                Ok(())
            }
        }
    }

    /// Starts a container and returns its id.
    pub(crate) fn start_container(&self, spec: &ContainerSpec) -> Result<String> {
        match &self.engine {
            Engine::None => self.no_engine(),
            Engine::Docker(_) => self.docker_run(spec),
            Engine::StandIn(standin) => standin.start(self, spec),
        }
        .with_context(|| format!("cannot start {}", spec.name))
    }

    /// Asks a container to end, makes it end after `grace`, and removes it.
    pub(crate) fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        match &self.engine {
            Engine::None => self.no_engine(),
            Engine::Docker(_) => {
                self.docker(&["stop", "--time", &grace.as_secs().to_string(), id])?;
                self.docker(&["rm", "--force", id]).map(drop)
            }
            Engine::StandIn(standin) => standin.stop(self, id, grace),
        }
    }

    /// Pid of a container's first process, as the host's own processes see it.
    pub(crate) fn container_pid(&self, id: &str) -> Result<String> {
        match &self.engine {
            Engine::None => self.no_engine(),
            Engine::Docker(_) => self.docker(&["inspect", "--format={{.State.Pid}}", id]),
            Engine::StandIn(standin) => standin.pid(id).map(|pid| pid.to_string()),
        }
    }

    /// Container ports and the host ports that they are published on.
    pub(crate) fn published(&self, id: &str, ports: &[u16]) -> Result<Vec<(u16, u16)>> {
        match &self.engine {
            Engine::None => self.no_engine(),
            Engine::Docker(_) => self.docker_ports(id, ports),
            Engine::StandIn(standin) => standin.published(id),
        }
    }

    /// A command inside a container.
    pub(crate) fn container_command(&self, id: &str, argv: &[&str]) -> Result<Command> {
        match &self.engine {
            Engine::None => self.no_engine(),
            Engine::Docker(_) => Ok(self.docker_command(&[&["exec", id], argv].concat())),
            Engine::StandIn(standin) => standin.command(self, id, argv),
        }
    }

    fn no_engine<T>(&self) -> Result<T> {
        bail!("host {} runs no containers: it was made bare", self.name())
    }
}
