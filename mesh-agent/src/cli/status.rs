//! `status`: how the running agent is.
//!
//! Must not know where the agent takes its facts from.

use super::{Out, Outcome, Socket, client, table::table};
use crate::api::{Status, Task};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    socket: Socket,
    /// Print the agent's document as it is.
    #[arg(long)]
    json: bool,
}

/// Prints the status. [`Outcome::Bad`] while the agent is not ready.
///
/// # Errors
/// No agent answers.
pub fn run(args: &Args, out: &mut Out) -> anyhow::Result<Outcome> {
    let text = client::get(&args.socket.socket, "/v1/status")?;
    let status: Status = client::document(&text)?;
    if args.json {
        out.raw(&text)?;
    } else {
        out.line(describe(&status))?;
    }
    Ok(if status.ready { Outcome::Good } else { Outcome::Bad })
}

fn describe(status: &Status) -> String {
    let mut parts = vec![summary(status)];
    let or_none = |text: &Option<String>| text.clone().unwrap_or_default();
    let tasks = status.tasks.iter().map(|task| {
        let armed = if task.armed { "yes" } else { "no" };
        let ready = match task.ports.iter().filter(|port| port.ready).count() {
            _ if task.ports.is_empty() => String::new(),
            all if all == task.ports.len() => "yes".into(),
            0 => "no".into(),
            some => format!("{some} of {}", task.ports.len()),
        };
        [
            task.id.clone(),
            task.family.clone(),
            task.service.clone(),
            task.mode.clone(),
            armed.into(),
            ready,
            task.identity.clone(),
        ]
    });
    parts.push(section(
        "no task of this host is in the mesh",
        ["TASK", "FAMILY", "SERVICE", "MODE", "ARMED", "READY", "IDENTITY"],
        tasks.collect(),
    ));
    let unready: Vec<_> = status.tasks.iter().flat_map(unready).collect();
    if !unready.is_empty() {
        parts.push(table(["NOT READY", "SERVICE", "PORT", "FOR", "BECAUSE"], unready));
    }
    let certificates =
        status.certificates.iter().map(|it| [it.identity.clone(), or_none(&it.not_after), or_none(&it.last_error)]);
    parts.push(section("no certificate", ["CERTIFICATE OF", "NOT AFTER", "LAST ERROR"], certificates.collect()));
    let sources = status
        .sources
        .iter()
        .map(|it| [it.name.clone(), or_none(&it.state), or_none(&it.last_load), or_none(&it.last_error)]);
    parts.push(section("no source of services", ["SOURCE", "STATE", "LAST LOAD", "LAST ERROR"], sources.collect()));
    parts.join("\n\n")
}

fn summary(status: &Status) -> String {
    let ready = if status.ready { "ready".to_owned() } else { format!("NOT READY: {}", status.waiting_for.join("; ")) };
    let agent = &status.agent;
    let age = agent.heartbeat_age_ms.map_or("no heartbeat yet".into(), |age| format!("heartbeat {age} ms ago"));
    let trust = if agent.alive { "alive" } else { "DEAD OR HUNG" };
    let kernel = &status.kernel;
    let host = status.host.map_or_else(|| "unknown address".into(), |host| host.to_string());
    [
        format!("agent     {ready}"),
        format!(
            "version   {} (ABI {}), pid {}, up {}",
            status.version,
            status.abi,
            status.pid,
            duration(status.uptime_seconds)
        ),
        format!("host      {host}, cluster {}, trust domain {}", status.cluster, status.trust_domain),
        format!("snapshot  generation {}", status.generation),
        format!("hooks     take the agent for {trust} ({age}, limit {} ms)", agent.heartbeat_limit_ms),
        format!(
            "          {} to the proxy, {} direct, {} failed open, {} refused, {} DNS, {} left alone",
            kernel.redirected, kernel.direct, kernel.failed_open, kernel.refused, kernel.dns, kernel.passed
        ),
        format!("          {} refused for a full map, {} events lost", kernel.map_full, kernel.event_lost),
    ]
    .join("\n")
}

/// Its ports that nobody is sent to.
fn unready(task: &Task) -> impl Iterator<Item = [String; 5]> {
    task.ports.iter().filter(|port| !port.ready).map(|port| {
        let reason = port.reason.clone().unwrap_or_default();
        [task.id.clone(), task.service.clone(), port.port.to_string(), duration(port.seconds), reason]
    })
}

fn section<const N: usize>(none: &str, heading: [&str; N], rows: Vec<[String; N]>) -> String {
    if rows.is_empty() { none.to_owned() } else { table(heading, rows) }
}

/// Seconds in the two largest units that are not zero.
fn duration(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api;

    fn status() -> Status {
        Status {
            version: "0.1.0".into(),
            abi: 1,
            pid: 4242,
            uptime_seconds: 3725,
            host: Some([10, 90, 1, 11].into()),
            cluster: "demo".into(),
            trust_domain: "demo.mesh".into(),
            generation: 7,
            ready: true,
            waiting_for: vec![],
            agent: api::AgentHealth { alive: true, heartbeat_age_ms: Some(120), heartbeat_limit_ms: 3000 },
            tasks: vec![Task {
                id: "web-1".into(),
                family: "web".into(),
                service: "web".into(),
                mode: "bridge".into(),
                identity: "spiffe://demo.mesh/ns/demo/sa/web".into(),
                armed: true,
                ports: vec![
                    api::LocalPort { port: 80, ready: true, seconds: 600, reason: None },
                    api::LocalPort { port: 81, ready: false, seconds: 75, reason: Some("it was ready: gone".into()) },
                ],
            }],
            kernel: api::Kernel { redirected: 3, ..Default::default() },
            certificates: vec![],
            sources: vec![api::Source {
                name: "docker".into(),
                state: None,
                last_load: None,
                last_error: Some("gone".into()),
            }],
        }
    }

    #[test]
    fn a_status_is_readable() {
        let expected = "\
agent     ready
version   0.1.0 (ABI 1), pid 4242, up 1h 2m
host      10.90.1.11, cluster demo, trust domain demo.mesh
snapshot  generation 7
hooks     take the agent for alive (heartbeat 120 ms ago, limit 3000 ms)
          3 to the proxy, 0 direct, 0 failed open, 0 refused, 0 DNS, 0 left alone
          0 refused for a full map, 0 events lost

TASK   FAMILY  SERVICE  MODE    ARMED  READY   IDENTITY
web-1  web     web      bridge  yes    1 of 2  spiffe://demo.mesh/ns/demo/sa/web

NOT READY  SERVICE  PORT  FOR     BECAUSE
web-1      web      81    1m 15s  it was ready: gone

no certificate

SOURCE  STATE  LAST LOAD  LAST ERROR
docker  -      -          gone";
        assert_eq!(describe(&status()), expected);
    }

    #[test]
    fn what_is_missing_is_said_first() {
        let text = describe(&Status { ready: false, waiting_for: vec!["docker".into()], tasks: vec![], ..status() });
        assert!(text.starts_with("agent     NOT READY: docker\n"), "{text}");
        assert!(text.contains("no task of this host is in the mesh"), "{text}");
    }

    #[test]
    fn durations() {
        let check = |seconds, expected| assert_eq!(duration(seconds), expected);
        check(0, "0s");
        check(61, "1m 1s");
        check(3600, "1h 0m");
        check(90_061, "1d 1h");
    }
}
