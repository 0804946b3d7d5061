//! How the SDK finds what it needs by itself: endpoint, region, credentials and the role of the instance. The agent runs
//! in a process of its own here, with an environment of its own.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    process::Command,
    thread,
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    aws::{Api, Moto, REGION},
    tier::{Tier, require},
};
use serde_json::json;

use super::running::REQUIRED;

/// What `mesh-agent check` says about Cloud Map, with nothing in the configuration but the namespace.
fn check(moto: &Moto, environment: &[(&str, &str)]) -> Result<String> {
    let file = moto.folder().join("agent.toml");
    fs::write(&file, format!("{REQUIRED}[discovery.cloud_map]\nnamespaces = [\"my.demo\"]\n"))?;
    let agent = env::var_os("MESH_AGENT").context("`cargo xtask test` says where the agent is")?;
    let mut command = Command::new(agent);
    command.args(["check", "--json", "--config"]).arg(&file).env_clear();
    let output = command.envs(environment.iter().copied()).output()?;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    let finding = said["findings"].as_array().into_iter().flatten().find(|it| it["name"] == "Cloud Map");
    Ok(finding.with_context(|| said.to_string())?["found"].as_str().unwrap_or_default().to_owned())
}

const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "testing"), ("AWS_SECRET_ACCESS_KEY", "testing")];

fn with_server(moto: &Moto) -> Result<()> {
    let namespace = moto.namespace("my.demo", false)?;
    let server = moto.service(&namespace, "server")?;
    moto.register(&server, "a", "10.1.1.1", 80, &json!({}))
}

#[test]
fn environment_names_endpoint_region_and_credentials() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let moto = Moto::start()?;
    with_server(&moto)?;
    let (address, none) = (moto.address(), ("AWS_EC2_METADATA_DISABLED", "true"));
    let (endpoint, region) = (("AWS_ENDPOINT_URL", address.as_str()), ("AWS_REGION", REGION));
    let found = check(&moto, &[KEYS[0], KEYS[1], endpoint, region, none])?;
    ensure!(found == "Cloud Map answers: 1 of 1 services of my.demo are wanted", "{found}");
    let own = ("AWS_ENDPOINT_URL_SERVICEDISCOVERY", address.as_str());
    let found = check(&moto, &[KEYS[0], KEYS[1], own, region, none])?;
    ensure!(found.starts_with("Cloud Map answers"), "{found}");
    let found = check(&moto, &[KEYS[0], KEYS[1], endpoint, none])?;
    ensure!(found.starts_with("no AWS region is known: set `region`"), "{found}");
    let found = check(&moto, &[endpoint, region, none])?;
    ensure!(found.starts_with("the agent has no AWS credentials: give the instance a role"), "{found}");
    Ok(())
}

#[test]
fn the_instance_has_a_role_and_a_region() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let moto = Moto::start()?;
    with_server(&moto)?;
    let (metadata, asked) = metadata()?;
    let address = moto.address();
    let environment =
        [("AWS_ENDPOINT_URL", address.as_str()), ("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.as_str())];
    let found = check(&moto, &environment)?;
    ensure!(found.starts_with("Cloud Map answers"), "{found}");
    let asked: Vec<String> = asked.try_iter().collect();
    ensure!(
        asked.iter().all(|it| it.starts_with("PUT /latest/api/token") || it.ends_with("with a token")),
        "{asked:?}"
    );
    ensure!(asked.iter().any(|it| it.contains("/placement/region")), "{asked:?}");
    Ok(())
}

/// Instance metadata, version 2: without a token nothing is told.
fn metadata() -> Result<(String, std::sync::mpsc::Receiver<String>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("http://{}", listener.local_addr()?);
    let (tell, told) = std::sync::mpsc::channel();
    // It ends with the test's process.
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Ok(input) = stream.try_clone() else { continue };
            let head: Vec<String> =
                BufReader::new(input).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            let request = head.first().cloned().unwrap_or_default();
            let token = head.iter().any(|line| line.eq_ignore_ascii_case("x-aws-ec2-metadata-token: t0k3n"));
            tell.send(format!("{request} {}", if token { "with a token" } else { "without" })).ok();
            let path = request.split(' ').nth(1).unwrap_or_default();
            let keys = json!({
                "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIATESTING", "SecretAccessKey": "s",
                "Token": "t", "LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z",
            });
            let (status, body) = match path {
                "/latest/api/token" => (200, "t0k3n".to_owned()),
                _ if !token => (401, String::new()),
                "/latest/meta-data/placement/region" => (200, REGION.to_owned()),
                path if path.trim_end_matches('/').ends_with("/security-credentials") => (200, "agent".to_owned()),
                path if path.contains("/security-credentials") && path.ends_with("/agent") => (200, keys.to_string()),
                _ => (404, String::new()),
            };
            let ttl = "x-aws-ec2-metadata-token-ttl-seconds: 21600\r\n";
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 {status} Said\r\n{ttl}Connection: close\r\nContent-Length: {length}\r\n\r\n{body}"
            )
            .ok();
        }
    });
    Ok((address, told))
}

#[test]
fn a_policy_that_lacks_an_action_is_told_by_name() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let moto = Moto::start_as(true)?;
    with_server(&moto)?;
    let query = |text: &str| moto.query(Api::Iam, &format!("{text}&Version=2010-05-08"));
    query("Action=CreateUser&UserName=agent")?;
    let made = query("Action=CreateAccessKey&UserName=agent")?;
    let part = |name: &str| {
        let rest = made.split_once(&format!("<{name}>"))?.1;
        Some(rest.split_once('<')?.0.to_owned())
    };
    let (id, secret) = (part("AccessKeyId").context("an id")?, part("SecretAccessKey").context("a secret")?);
    let allow = |actions: &[&str]| {
        let actions: Vec<String> = actions.iter().map(|action| format!("servicediscovery:{action}")).collect();
        let policy = json!({ "Version": "2012-10-17", "Statement": [{ "Effect": "Allow", "Action": actions, "Resource": "*" }] });
        let encoded: String = policy.to_string().bytes().map(|b| format!("%{b:02X}")).collect();
        query(&format!("Action=PutUserPolicy&UserName=agent&PolicyName=p&PolicyDocument={encoded}"))
    };
    let address = moto.address();
    let environment = [
        ("AWS_ACCESS_KEY_ID", id.as_str()),
        ("AWS_SECRET_ACCESS_KEY", secret.as_str()),
        ("AWS_ENDPOINT_URL", address.as_str()),
        ("AWS_REGION", REGION),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    let actions = ["ListNamespaces", "ListServices", "DiscoverInstances"];
    // Each must be asked for while everybody may still write policies.
    for count in 0..=actions.len() {
        moto.open()?;
        allow(&[&["GetNamespace"], &actions[..count]].concat())?;
        moto.authorize()?;
        let found = check(&moto, &environment)?;
        match actions.get(count) {
            Some(lacking) => {
                let expected = format!("needs the IAM action servicediscovery:{lacking}");
                ensure!(found.contains(&expected), "{count}: {found}");
            }
            None => ensure!(found.starts_with("Cloud Map answers"), "{found}"),
        }
    }
    Ok(())
}
