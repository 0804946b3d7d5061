//! Byte streams across two agents are what they are without them: half-close, resets, upgrades, slow readers, sizes.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    mesh::{LIMIT, Mesh, Placed, Service},
    tier::{Tier, figure, require},
    until::{Checks, until},
};

const MIB: u64 = 1 << 20;
/// What an agent may grow by while it carries a stream, whatever the stream's length.
const BOUND: u64 = 64 * MIB;

#[test]
fn streams_pass_as_they_are() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut set = Set::up()?;
    let mut checks = Checks::default();
    for place in ["near", "far"] {
        checks.run(&format!("a half-closed connection is answered after its end ({place})"), || {
            let said = set.client(&["sh", "-c", &format!("printf hello | nc -w 10 {place}-count 9000")])?;
            ensure!(said.trim() == "5", "{said:?}");
            Ok(())
        });
        checks.run(&format!("a server's reset is a reset ({place})"), || {
            let said = set.client(&["peer", "await-reset", &format!("{place}-resets:9001")])?;
            ensure!(said == "reset", "{said:?}");
            Ok(())
        });
        checks.run(&format!("a client's reset is a reset ({place})"), || {
            let server = if place == "near" { &set.near[2] } else { &set.far[2] };
            set.client(&["peer", "reset", &format!("{place}-witness:9002")])?;
            let said = until(LIMIT, "the server sees it", || {
                let said = set.mesh.said(server)?;
                Ok(if said.trim().is_empty() { Err("nothing yet") } else { Ok(said) })
            })?;
            ensure!(said.trim() == "reset", "{said:?}");
            Ok(())
        });
        checks.run(&format!("a WebSocket is upgraded and carries frames ({place})"), || {
            let said = set.client(&["peer", "talk", &format!("{place}-chat:9003"), "500"])?;
            ensure!(said == "500 frames", "{said:?}");
            Ok(())
        });
    }
    checks.run("an upgrade is logged as what it was", || {
        let line = set.mesh.await_access(0, "the upgrade", |line| line["http.path"] == "/chat")?;
        ensure!(
            line["http.status"] == 101 && line["dst.service"].as_str().is_some_and(|s| s.ends_with("-chat")),
            "{line}"
        );
        Ok(())
    });
    checks.run("a reader that stops stops the writer, not the agents", || set.slow_reader());
    checks.run("ten gigabytes take no memory", || set.large(10_000_000_000, "stream_10g"));
    set.mesh.down()?;
    checks.done()
}

const ROLES: [(&str, u16, &str); 5] = [
    ("count", 9000, "tcp"),
    ("resets", 9001, "tcp"),
    ("witness", 9002, "auto"),
    ("websocket", 9003, "http"),
    ("flood", 9004, "tcp"),
];

/// One server of each role on both hosts, called `near-…` and `far-…`, and a client.
struct Set {
    mesh: Mesh,
    client: Placed,
    near: Vec<Placed>,
    far: Vec<Placed>,
}

impl Set {
    fn up() -> Result<Self> {
        let mut mesh = Mesh::up()?;
        let name = |place: &str, role: &str| format!("{place}-{}", role.replace("websocket", "chat"));
        let servers = |place: &str, host| -> Result<Vec<Placed>> {
            // The witness tells of every connection, so no probe may be one of them.
            let start = |(role, port, _): &(&str, u16, &str)| {
                mesh.task(host, mesh.peer(&name(place, role), role, *port).label("ecs-mesh.ready", "none"))
            };
            ROLES.iter().map(start).collect()
        };
        let (near, far) = (servers("near", 0)?, servers("far", 1)?);
        let client = mesh.task(0, mesh.idle("client"))?;
        let names: Vec<_> = ROLES.iter().map(|(role, ..)| [name("near", role), name("far", role)]).collect();
        let mut services = Vec::new();
        for (((_, port, protocol), [near_name, far_name]), (near, far)) in
            ROLES.iter().zip(&names).zip(near.iter().zip(&far))
        {
            services.push(Service::new(near_name, *port, *port, protocol).at(near));
            services.push(Service::new(far_name, *port, *port, protocol).at(far));
        }
        mesh.services(&services, "")?;
        mesh.start()?;
        mesh.await_endpoints(0, "far-count", 1)?;
        Ok(Self { mesh, client, near, far })
    }

    fn client(&self, argv: &[&str]) -> Result<String> {
        self.mesh.run(&self.client, argv)
    }

    /// The server floods, the client reads nothing for three seconds and then a little; nobody may have buffered more.
    fn slow_reader(&mut self) -> Result<()> {
        let before = [self.mesh.memory(0)?.0, self.mesh.memory(1)?.0];
        let readers = "for n in 1 2 3 4 5 6 7 8; do peer pause far-flood:9004 3000 & done; wait";
        let said = self.client(&["sh", "-c", readers])?;
        ensure!(said.lines().filter(|line| *line == "read").count() == 8, "{said:?}");
        for (host, before) in before.into_iter().enumerate() {
            let grown = self.mesh.memory(host)?.1.saturating_sub(before);
            figure(&format!("slow_readers_agent_{}_growth", host + 1), grown as f64 / MIB as f64, "MiB");
            ensure!(grown < BOUND, "the agent of host {host} grew by {} MiB", grown / MIB);
        }
        Ok(())
    }

    fn large(&mut self, bytes: u64, name: &str) -> Result<()> {
        let before = [self.mesh.memory(0)?.0, self.mesh.memory(1)?.0];
        let said = self.client(&["peer", "send", "far-count:9000", &bytes.to_string()])?;
        let (arrived, millis) = said.split_once(' ').with_context(|| said.clone())?;
        ensure!(arrived == bytes.to_string(), "{arrived} of {bytes} bytes arrived");
        let seconds = Duration::from_millis(millis.parse()?).as_secs_f64();
        figure(&format!("{name}_speed"), bytes as f64 / 1e6 / seconds, "MB/s");
        for (host, before) in before.into_iter().enumerate() {
            let grown = self.mesh.memory(host)?.1.saturating_sub(before);
            figure(&format!("{name}_agent_{}_growth", host + 1), grown as f64 / MIB as f64, "MiB");
            ensure!(grown < BOUND, "the agent of host {host} grew by {} MiB", grown / MIB);
        }
        Ok(())
    }
}
