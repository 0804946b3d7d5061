//! `check`: the preflight doctor. Looks at this host, and at the configuration when one is given.
//!
//! Must not know how a finding is come by (that is `sys::probe`).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_core::{
    config::{Config, discovery, ecs::Ecs},
    id::ClusterName,
};

use super::{Out, Outcome, config, table::table};
use crate::{
    api,
    discovery::{cloud_map, consul, ecs},
    sys::probe::{self, Finding, Settings},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration file to look at as well; without it the defaults are taken.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Prints all findings. [`Outcome::Bad`] where one fails.
///
/// # Errors
/// The configuration has faults: nothing else is looked at then.
pub fn run(args: &Args, out: &mut Out) -> anyhow::Result<Outcome> {
    let mut findings = Vec::new();
    let settings = match &args.config {
        Some(file) => {
            let config = config::load(file)?;
            findings.push(Finding::ok("configuration", file.display().to_string()));
            findings.extend(config.services_file.as_deref().map(services_file));
            findings.extend(config.discovery.consul.clone().map(consul));
            findings.extend(config.discovery.ecs.as_ref().map(|it| {
                let clusters = clusters(&config, it);
                asked("ECS", ecs::check::check(it, &clusters))
            }));
            findings
                .extend(config.discovery.cloud_map.as_ref().map(|it| asked("Cloud Map", cloud_map::check::check(it))));
            settings(&config)
        }
        None => defaults()?,
    };
    findings.extend(probe::all(&settings));
    let passed = probe::passed(&findings);
    if args.json {
        out.json(&document(passed, &findings))?;
    } else {
        out.line(describe(passed, &findings))?;
    }
    Ok(if passed { Outcome::Good } else { Outcome::Bad })
}

/// Where to look, from a configuration.
pub fn settings(config: &Config) -> Settings {
    Settings {
        cgroup_root: config.kernel.cgroup_root.clone(),
        pin_dir: config.kernel.pin_dir.clone(),
        docker_socket: config.docker.socket.clone(),
        ecs_agent: config.host.ecs_agent,
        outbound_port: config.proxy.outbound_port,
        dns_port: config.dns.port,
        tunnel_listen: config.proxy.tunnel_listen,
        metrics: config.admin.metrics,
        admin_socket: config.admin.socket.clone(),
        ca_bundle: Some(config.identity.ca_bundle.clone()),
        join_token: Some(config.identity.join_token_file.clone()),
    }
}

/// Where to look without a configuration: the example names secrets that nobody has.
fn defaults() -> anyhow::Result<Settings> {
    Ok(Settings { ca_bundle: None, join_token: None, ..settings(&config::defaults()?) })
}

/// Reads the static file as the agent would.
fn services_file(file: &Path) -> Finding {
    let name = "services file";
    match fs::read_to_string(file).map(|text| mesh_core::services::parse(&text)) {
        Ok(Ok(set)) => Finding::ok(name, format!("{}, {} services", file.display(), set.services.len())),
        Ok(Err(faults)) => Finding::fail(name, config::describe(file, &faults), "correct the file"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::warn(
            name,
            format!("{} does not exist", file.display()),
            "the mesh knows only this host's tasks until it is there",
        ),
        Err(error) => Finding::fail(name, format!("cannot read {}: {error}", file.display()), "correct its mode"),
    }
}

/// The clusters that the agent would ask for, as far as the configuration tells.
fn clusters(config: &Config, ecs: &Ecs) -> Vec<ClusterName> {
    let own = config.host.cluster.clone().or_else(|| "default".parse().ok());
    if ecs.clusters.is_empty() { own.into_iter().collect() } else { ecs.clusters.clone() }
}

/// Asks Consul as the agent would.
fn consul(config: discovery::Consul) -> Finding {
    asked("Consul", consul::check::check(Arc::new(config)))
}

/// Asks a registry as the agent would. An agent starts without it too.
fn asked<E: std::error::Error + Send + Sync + 'static>(
    name: &'static str,
    check: impl Future<Output = Result<String, E>>,
) -> Finding {
    let answered =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map(|runtime| runtime.block_on(check));
    match answered {
        Ok(Ok(found)) => Finding::ok(name, found),
        Ok(Err(error)) => {
            let error = anyhow::Error::new(error);
            let remedy = "until it answers, the mesh knows only what other sources say";
            Finding::warn(name, format!("{error:#}"), remedy)
        }
        Err(error) => Finding::warn(name, format!("it is not asked: {error}"), "try again"),
    }
}

fn describe(passed: bool, findings: &[Finding]) -> String {
    let row = |finding: &Finding| {
        let verdict = match finding.verdict {
            probe::Verdict::Ok => "ok",
            probe::Verdict::Warn => "WARN",
            probe::Verdict::Fail => "FAIL",
        };
        [verdict.to_owned(), finding.name.clone(), finding.found.lines().next().unwrap_or_default().to_owned()]
    };
    let mut text = table(["VERDICT", "LOOKED AT", "FOUND"], findings.iter().map(row).collect());
    for finding in findings {
        if let Some(remedy) = &finding.remedy {
            text += &format!("\n\n{}: {}\n  remedy: {remedy}", finding.name, finding.found);
        }
    }
    text + if passed { "\n\nthis host can run the agent" } else { "\n\nthis host cannot run the agent yet" }
}

fn document(passed: bool, findings: &[Finding]) -> api::Check {
    let finding = |it: &Finding| api::Finding {
        name: it.name.clone(),
        verdict: it.verdict.label().into(),
        found: it.found.clone(),
        remedy: it.remedy.clone(),
    };
    api::Check { passed, findings: findings.iter().map(finding).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_follow_the_table() {
        let findings =
            [Finding::ok("kernel", "Linux 6.1"), Finding::fail("bpffs", "not mounted", "mount -t bpf bpf /sys/fs/bpf")];
        let expected = "\
VERDICT  LOOKED AT  FOUND
ok       kernel     Linux 6.1
FAIL     bpffs      not mounted

bpffs: not mounted
  remedy: mount -t bpf bpf /sys/fs/bpf

this host cannot run the agent yet";
        assert_eq!(describe(false, &findings), expected);
    }

    #[test]
    fn the_defaults_are_the_example() {
        let settings = defaults().expect("the built-in example parses");
        assert_eq!(settings.tunnel_listen.port(), 15008);
        assert_eq!(settings.join_token, None);
    }

    #[test]
    fn consul_is_asked_and_not_needed() {
        let text = "[identity]\ntrust_domain = \"t\"\nca_bundle = \"/x\"\njoin_token_file = \"/x\"\n\
                    [discovery.consul]\naddress = \"http://127.0.0.1:9\"\n";
        let config = mesh_core::config::parse(text).expect("parses");
        let found = consul(config.discovery.consul.expect("configured"));
        assert_eq!(found.verdict, probe::Verdict::Warn, "{found}");
        assert!(found.found.starts_with("cannot reach Consul at http://127.0.0.1:9"), "{found}");
    }

    #[test]
    fn a_services_file_is_judged() {
        let missing = services_file(Path::new("/nonexistent/services.toml"));
        assert_eq!(missing.verdict, probe::Verdict::Warn, "{missing}");
        let garbage = services_file(Path::new("/proc/self/status"));
        assert_eq!(garbage.verdict, probe::Verdict::Fail, "{garbage}");
    }
}
