//! The Docker daemon of a host, and its client.
//!
//! It must not know tasks.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    engine::{ContainerSpec, Engine, Network},
    host::Host,
    image::Image,
    process::{self, Output, output, run},
    vpc::RESOLVER,
};

const RUNC: &str = include_str!("runc.sh");

impl Host {
    /// Starts the host's dockerd; [`Host::await_dockerd`] waits for it.
    pub(crate) fn start_dockerd(&mut self) -> Result<()> {
        process::write_program(&self.dir().join("run/lab/bin/runc-ecs"), RUNC)?;
        let dns = RESOLVER.to_string();
        let daemon = self.spawn(
            "dockerd",
            &[
                "dockerd",
                "--host=unix:///run/docker.sock",
                "--exec-opt=native.cgroupdriver=cgroupfs",
                "--add-runtime=ecs=/run/lab/bin/runc-ecs",
                "--default-runtime=ecs",
                "--dns",
                &dns,
            ],
        )?;
        self.engine = Engine::Docker(daemon);
        Ok(())
    }

    pub(crate) fn await_dockerd(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let socket = self.dir().join("run/docker.sock");
        while !answers(&socket) {
            let Engine::Docker(daemon) = &mut self.engine else { bail!("dockerd was not started") };
            if !daemon.is_alive() || Instant::now() > deadline {
                bail!("dockerd does not run here: {}", daemon.last_words());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// A command of the Docker client for this host's daemon.
    #[must_use]
    pub fn docker_command(&self, arguments: &[&str]) -> Command {
        // The client of the same version as the daemon comes from the same package.
        let client = ["/usr/bin/docker"].into_iter().find(|path| Path::new(path).exists()).unwrap_or("docker");
        let mut command = Command::new(client);
        command
            .env("DOCKER_HOST", format!("unix://{}", self.dir().join("run/docker.sock").display()))
            // A user's own settings may add proxies to every container.
            .env("DOCKER_CONFIG", self.dir().join("docker-config"))
            .env_remove("DOCKER_CONTEXT")
            .args(arguments);
        command
    }

    /// Runs `docker …` for this host, which must succeed, and returns its standard output.
    ///
    /// # Errors
    /// It ends with another code than 0.
    pub fn docker(&self, arguments: &[&str]) -> Result<String> {
        run(&mut self.docker_command(arguments)).with_context(|| format!("on host {}", self.name()))
    }

    /// Runs `docker …` for this host and returns all that it says.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn docker_output(&self, arguments: &[&str]) -> Result<Output> {
        output(&mut self.docker_command(arguments))
    }

    pub(crate) fn docker_import(&self, image: &Image) -> Result<()> {
        let path = image.tar().to_str().context("the temporary directory's name is not UTF-8")?;
        self.docker(&["import", path, image.name()]).map(drop)
    }

    pub(crate) fn docker_run(&self, spec: &ContainerSpec) -> Result<String> {
        let mut arguments = vec!["run".to_owned(), "--detach".to_owned(), format!("--name={}", spec.name)];
        arguments.push(format!("--cgroup-parent={}", spec.cgroup_parent));
        match &spec.network {
            Network::Bridge => arguments.extend(spec.ports.iter().map(|port| format!("--publish=0:{port}"))),
            Network::None => arguments.push("--network=none".to_owned()),
            Network::Host => {
                arguments.push("--network=host".to_owned());
                arguments.extend(spec.ports.iter().map(|port| format!("--expose={port}")));
            }
            Network::Of(other) => arguments.push(format!("--network=container:{other}")),
        }
        arguments.extend(spec.labels.iter().map(|(key, value)| format!("--label={key}={value}")));
        arguments.extend(spec.stop_signal.iter().map(|signal| format!("--stop-signal={signal}")));
        arguments.push(spec.image.clone());
        arguments.extend_from_slice(&spec.command);
        let said = self.docker(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        let id = said.lines().last().unwrap_or_default();
        ensure!(id.len() == 64, "docker run answered {said:?} instead of a container id");
        Ok(id.to_owned())
    }

    pub(crate) fn docker_ports(&self, id: &str, ports: &[u16]) -> Result<Vec<(u16, u16)>> {
        let text = self.docker(&["inspect", "--format={{json .NetworkSettings.Ports}}", id])?;
        let known: serde_json::Value = serde_json::from_str(&text).context("docker inspect gives the ports as JSON")?;
        let find = |&port: &u16| {
            // Docker publishes for both families, not always on the same port, and in any order.
            let all = known[format!("{port}/tcp")].as_array().into_iter().flatten();
            let v4 = all.clone().find(|it| it["HostIp"].as_str().is_some_and(|ip| ip.contains('.')));
            let host = v4.or(all.last()).and_then(|it| it["HostPort"].as_str()?.parse().ok());
            host.map(|host| (port, host)).with_context(|| format!("port {port} of {id} is not published: {text}"))
        };
        ports.iter().map(find).collect()
    }
}

/// Whether the daemon answers a ping.
fn answers(socket: &Path) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /_ping HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    fs::exists(socket).unwrap_or(false) && ask().is_ok_and(|answer| answer.ends_with("OK"))
}
