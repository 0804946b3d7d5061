//! What an agent learns from Consul: names, health, tags, weights, and what it keeps while Consul is away.

use std::{
    ops::Deref,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::discovery::Backend;
use mesh_core::{config, services::EndpointEntry};
use mesh_tests::{
    consul::{Server, certificates, free_port},
    tier::{Tier, figure, require},
    until::until,
};
use serde_json::json;

use crate::following::Following;

const LIMIT: Duration = Duration::from_secs(20);

/// What an agent learns from one server; endpoints are `port address weight`.
pub(super) struct Running(Following);

impl Running {
    pub(super) fn start(address: &str, more: &str) -> Result<Self> {
        let consul = configured(&format!("address = \"{address}\"\n{more}"))?;
        let show = |e: &EndpointEntry| {
            format!(
                "{} {} {}",
                e.port.map_or("*".into(), |port| port.to_string()),
                e.endpoint.addr(),
                e.endpoint.weight
            )
        };
        Following::start(Backend::Consul(consul), LIMIT, show).map(Self)
    }
}

/// A section `[discovery.consul]` of these lines.
pub(super) fn configured(lines: &str) -> Result<Arc<config::discovery::Consul>> {
    let text = format!(
        "[identity]\ntrust_domain = \"t\"\nca_bundle = \"/x\"\njoin_token_file = \"/x\"\n\
         [discovery.consul]\n{lines}\n"
    );
    let config = config::parse(&text).map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
    Ok(Arc::new(config.discovery.consul.context("configured")?))
}

impl Deref for Running {
    type Target = Following;

    fn deref(&self) -> &Following {
        &self.0
    }
}

#[test]
fn health_tags_weights_and_removal_arrive() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let server = Server::start()?;
    let weighed = json!({ "Tags": ["v1"], "Weights": { "Passing": 3, "Warning": 1 } });
    server.register("world", "w1", "10.1.1.1", 32768, "passing", &weighed)?;
    let running = Running::start(&server.address(), "")?;
    let one = "* 10.1.1.1:32768 300";
    running.await_seen(&[("world", &[one]), ("world--tag-v1", &[one])])?;

    server.register("world", "w2", "", 8080, "passing", &json!({ "Meta": { "zone": "b", "x": "y" } }))?;
    let other = ["8080 10.1.1.9:8080 100", "* 10.1.1.9:8080 100"];
    running.await_seen(&[("world", &[one, other[0], other[1]]), ("world--tag-v1", &[one])])?;
    let set = running.set();
    let endpoint = &set.services["world"].endpoints.last().context("there are three")?.endpoint;
    ensure!(endpoint.zone.as_deref() == Some("b") && endpoint.attributes.meta["x"] == "y", "{endpoint:?}");

    let mut flips = Vec::new();
    for _ in 0..5 {
        let began = Instant::now();
        server.set_health("w1", "critical")?;
        running.await_seen(&[("world", &other), ("world--tag-v1", &[])])?;
        flips.push(began.elapsed());
        server.set_health("w1", "passing")?;
        running.await_seen(&[("world", &[one, other[0], other[1]]), ("world--tag-v1", &[one])])?;
    }
    flips.sort();
    figure("consul_health_flip_p50", flips[2].as_secs_f64() * 1e3, "ms");

    server.set_health("w1", "warning")?;
    running.await_seen(&[("world", &other), ("world--tag-v1", &[])])?;
    let lenient = Running::start(&server.address(), "health = \"warning\"\ntag_names = []")?;
    lenient.await_seen(&[("world", &["* 10.1.1.1:32768 100", other[0], other[1]])])?;

    server.deregister("w1")?;
    running.await_seen(&[("world", &other)])?;
    server.deregister("w2")?;
    running.await_seen(&[])
}

#[test]
fn nothing_is_lost_while_consul_is_away_or_begins_anew() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let mut server = Server::start()?;
    server.register("world", "w1", "10.1.1.1", 80, "passing", &json!({}))?;
    server.register("other", "o1", "10.1.1.2", 80, "passing", &json!({}))?;
    let running = Running::start(&server.address(), "")?;
    let (world, other): (&[&str], &[&str]) = (&["80 10.1.1.1:80 100"], &["80 10.1.1.2:80 100"]);
    running.await_seen(&[("world", world), ("other", other)])?;
    server.kill()?;
    running.await_error("cannot reach Consul at http://127.0.0.1")?;
    running.await_seen(&[("world", world), ("other", other)])?;

    // Back, and empty: who registers there has not been back yet.
    server.up()?;
    server.register("world", "w1", "10.1.1.1", 80, "passing", &json!({}))?;
    server.register("new", "n1", "10.1.1.3", 80, "passing", &json!({}))?;
    let began = Instant::now();
    running.await_seen(&[("world", world), ("other", other), ("new", &["80 10.1.1.3:80 100"])])?;
    figure("consul_back", began.elapsed().as_secs_f64(), "s");
    until(LIMIT, "no error is left", || Ok(running.error().map_or(Ok(()), Err)))
}

pub(super) const ACL: &str =
    r#"{ "acl": { "enabled": true, "default_policy": "deny", "tokens": { "master": "root-token" } } }"#;
const READ: &str = r#"service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }"#;

#[test]
fn a_token_that_may_not_read_is_named_with_the_rule_that_it_lacks() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let mut server = Server::start_with(ACL, &[])?;
    server.token = Some("root-token".into());
    until(LIMIT, "the ACL system is ready", || {
        let (status, said) = server.ask("PUT", "/v1/acl/policy", Some(&json!({ "Name": "read", "Rules": READ })))?;
        Ok(if status == 200 { Ok(()) } else { Err(said.to_string()) })
    })?;
    server.register("world", "w1", "10.1.1.1", 80, "passing", &json!({}))?;
    let (_, made) = server.ask("PUT", "/v1/acl/token", Some(&json!({ "Policies": [{ "Name": "read" }] })))?;
    let token = made["SecretID"].as_str().context("a token has a secret")?.to_owned();

    let anonymous = Running::start(&server.address(), "")?;
    anonymous.await_error("node_prefix \"\" { policy = \"read\" }")?;

    let file = server.folder().join("token");
    let running = Running::start(&server.address(), &format!("token_file = \"{}\"", file.display()))?;
    running.await_error("cannot read the Consul token")?;
    std::fs::write(&file, "no-such-token\n")?;
    running.await_error("ACL not found): the token needs the ACL rule service_prefix")?;
    std::fs::write(&file, format!("{token}\n"))?;
    running.await_seen(&[("world", &["80 10.1.1.1:80 100"])])?;
    // Taken away again: what was learnt stays.
    let (status, _) =
        server.ask("DELETE", &format!("/v1/acl/token/{}", made["AccessorID"].as_str().context("id")?), None)?;
    ensure!(status == 200, "{status}");
    server.register("world", "w2", "10.1.1.2", 80, "passing", &json!({}))?;
    running.await_error("ACL not found")?;
    running.await_seen(&[("world", &["80 10.1.1.1:80 100"])])
}

#[test]
fn many_services_take_few_connections() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let server = Server::start()?;
    let names: Vec<String> = (0..12).map(|n| format!("s{n:02}")).collect();
    for name in &names {
        server.register(name, name, "10.1.1.1", 80, "passing", &json!({}))?;
    }
    let running = Running::start(&server.address(), "watches = 3")?;
    let count = |of: usize| {
        until(LIMIT, &format!("{of} services with an endpoint"), || {
            let seen = running.seen().values().filter(|endpoints| !endpoints.is_empty()).count();
            Ok(if seen == of { Ok(()) } else { Err(format!("{seen}; {:?}", running.error())) })
        })
    };
    count(12)?;
    let figures = running.figures()?;
    let watches = figures.watches.load(std::sync::atomic::Ordering::Relaxed);
    // The services', the list, and the two that tell whose health has changed.
    ensure!(watches == 3 + 1 + 2, "{watches}");
    // Nobody follows the last one, and yet its health arrives.
    let began = Instant::now();
    server.set_health("s11", "critical")?;
    count(11)?;
    figure("consul_health_flip_swept", began.elapsed().as_secs_f64() * 1e3, "ms");
    server.set_health("s11", "passing")?;
    count(12)?;
    // One that tasks ask for is followed, in the place of one that nobody asks for.
    running.uses.note(&"s09".parse()?);
    let followed = || -> Result<u64> {
        let answers = figures.answers.load(std::sync::atomic::Ordering::Relaxed);
        Ok(answers)
    };
    let before = followed()?;
    until(LIMIT, "it is asked for", || Ok(if followed()? > before { Ok(()) } else { Err("") }))?;
    ensure!(figures.watches.load(std::sync::atomic::Ordering::Relaxed) == 3 + 1 + 2);
    // Nor is it missed that an instance of another has come or gone.
    server.register("s10", "more", "10.1.1.2", 80, "passing", &json!({}))?;
    until(LIMIT, "another endpoint of s10", || {
        let seen = running.seen()["s10"].clone();
        Ok(if seen.len() == 2 { Ok(()) } else { Err(format!("{seen:?}")) })
    })?;
    for name in &names[..10] {
        server.deregister(name)?;
    }
    count(2)?;
    until(LIMIT, "no sweeping when all can be followed", || {
        let watches = figures.watches.load(std::sync::atomic::Ordering::Relaxed);
        Ok(if watches == 2 + 1 { Ok(()) } else { Err(watches.to_string()) })
    })
}

#[test]
fn another_datacenter_has_names_of_its_own() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let home = Server::start()?;
    let wan = format!("-retry-join-wan=127.0.0.1:{}", home.wan());
    let away = Server::start_with("", &["-datacenter=dc2", &wan])?;
    home.register("world", "w1", "10.1.1.1", 80, "passing", &json!({}))?;
    away.register("world", "w1", "10.2.1.1", 80, "passing", &json!({ "Tags": ["v2"] }))?;
    let running = Running::start(&home.address(), "datacenters = [\"dc1\", \"dc2\"]\nprefixes = [\"wor\"]")?;
    let there: &[&str] = &["80 10.2.1.1:80 100"];
    running.await_seen(&[
        ("world", &["80 10.1.1.1:80 100"]),
        ("world--dc-dc2", there),
        ("world--tag-v2--dc-dc2", there),
    ])
}

#[test]
fn consul_is_asked_over_tls_and_shown_a_certificate() -> Result<()> {
    if !require(Tier::Consul) {
        return Ok(());
    }
    let folder = std::env::temp_dir().join(format!("mesh-test-{}-consul-tls", std::process::id()));
    certificates(&folder)?;
    let file = |name: &str| folder.join(name).display().to_string();
    let port = free_port()?;
    let tls = json!({
        "ports": { "https": port },
        "verify_incoming_https": true,
        "ca_file": file("consul-agent-ca.pem"),
        "cert_file": file("dc1-server-consul-0.pem"),
        "key_file": file("dc1-server-consul-0-key.pem"),
    });
    let server = Server::start_with(&tls.to_string(), &[])?;
    server.register("world", "w1", "10.1.1.1", 80, "passing", &json!({}))?;
    let address = format!("https://127.0.0.1:{port}");
    let ca = format!("[discovery.consul.tls]\nca_file = \"{}\"\n", file("consul-agent-ca.pem"));
    let (cert, key) = (file("dc1-client-consul-0.pem"), file("dc1-client-consul-0-key.pem"));

    let stranger = Running::start(&address, "")?;
    stranger.await_error("invalid peer certificate: UnknownIssuer")?;
    let nobody = Running::start(&address, &ca)?;
    nobody.await_error("cannot reach Consul at https://")?;
    let both = Running::start(&address, &format!("{ca}cert_file = \"{cert}\"\nkey_file = \"{key}\""))?;
    both.await_seen(&[("world", &["80 10.1.1.1:80 100"])])?;
    ensure!(nobody.seen().is_empty() && stranger.seen().is_empty());
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
