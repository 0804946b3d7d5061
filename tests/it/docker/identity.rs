//! Who is refused: other trust roots, certificates out of date, other identities, denied and plaintext callers. Each has
//! its number, in the HTTP answer and in the access log.

use std::{fs, process::Command};

use anyhow::{Result, ensure};
use mesh_lab::Host;
use mesh_tests::{
    mesh::{LIMIT, Mesh, Placed, Service, make_ca},
    tier::{Tier, require},
    until::{Checks, until},
};
use nix::sys::signal::Signal;

const DENY: &str = "[policy]\ndefault = \"allow\"\n[[policy.rule]]\nname = \"no-client\"\neffect = \"deny\"\n\
    from = [\"spiffe://demo.mesh/ns/demo/sa/client\"]\nto = [\"world\"]\n";

#[test]
fn whoever_is_not_who_they_should_be_is_refused() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let client = mesh.task(0, mesh.idle("client"))?;
    let world = mesh.task(1, mesh.nginx("world", "world", 8080))?;
    let service = || Service::new("world", 80, 8080, "http");
    mesh.services(&[service().at(&world)], "")?;
    mesh.start()?;
    mesh.await_endpoints(0, "world", 1)?;

    let mut checks = Checks::default();
    checks.run("the right identities are served", || served(&mesh, &client));
    checks.run("plaintext at the tunnel port closes that connection only", || {
        let at = format!("{}:15008", mesh.host(1).address());
        let said = mesh.host(0).exec(&["curl", "-sS", "--max-time", "5", &format!("http://{at}/")])?;
        ensure!(!said.ok() && said.code != Some(28), "{said:?}");
        let script =
            format!("head -c 100000 /dev/urandom | timeout 5 busybox nc -w 5 {} 15008; true", mesh.host(1).address());
        mesh.host(0).run(&["sh", "-c", &script])?;
        served(&mesh, &client)?;
        let metrics = mesh.host(1).run(&["curl", "-sS", "http://127.0.0.1:15020/metrics"])?;
        ensure!(
            metrics.contains("handshake_failed") || metrics.contains("bad_protocol"),
            "it is not counted: {metrics}"
        );
        Ok(())
    });
    checks.run("another identity than the expected one is refused with 12", || {
        let other = "identity = \"spiffe://demo.mesh/ns/demo/sa/other\"";
        mesh.services(&[service().at_with(&world, other)], "")?;
        refused(&mesh, &client, 12, "unexpected_identity")?;
        mesh.services(&[service().at(&world)], "")?;
        until_served(&mesh, &client)
    });
    checks.run("a denied caller is refused with 6, and the rule is named", || {
        mesh.services(&[service().at(&world)], DENY)?;
        refused(&mesh, &client, 6, "denied")?;
        let said = mesh.ctl(0, &["explain", "--from", "client", "world"])?;
        ensure!(said.code == Some(1) && said.stdout.contains("no-client"), "{said:?}");
        Ok(())
    });
    checks.run("the called side denies too, whatever the caller's agent thinks", || {
        let text = mesh.services_of(0, &[service().at(&world)])?;
        mesh.write_services(0, &text)?;
        let seen = mesh.access(1)?.len();
        let (number, _) = until(LIMIT, "the called side refuses", || {
            let said = answer(&mesh, &client)?;
            Ok(if mesh.access(1)?.len() > seen { Ok(said) } else { Err(format!("{said:?}")) })
        })?;
        ensure!(number != "200", "it was served");
        mesh.await_access(1, "the denial", |line| line["refusal"] == 6 && line["direction"] == "inbound").map(drop)
    });
    checks.run("where mTLS is required, a destination without an agent is refused with 7", || {
        mesh.services(&[service().with("tls = \"strict\"").at_with(&world, "agent = \"\"")], "")?;
        refused(&mesh, &client, 7, "plaintext_forbidden")?;
        mesh.services(&[service().with("tls = \"permissive\"").at_with(&world, "agent = \"\"")], "")?;
        until_served(&mesh, &client)
    });
    mesh.services(&[service().at(&world)], "")?;
    checks.run("another trust root is refused with 10 by both sides", || {
        mesh.end(1, Signal::SIGTERM)?;
        remove_ca(mesh.host(1))?;
        make_ca(mesh.host(1))?;
        mesh.launch(1)?;
        mesh.await_ready(1)?;
        refused(&mesh, &client, 10, "untrusted_peer")?;
        until(LIMIT, "the called side counts it", || {
            let metrics = mesh.host(1).run(&["curl", "-sS", "http://127.0.0.1:15020/metrics"])?;
            Ok(if metrics.contains("untrusted_peer") { Ok(()) } else { Err(metrics) })
        })
    });
    checks.run("an expired certificate is refused with 11", || {
        // A CA of three days ago, and an agent two days behind: what it issues for a day is a day old here.
        for host in [0, 1] {
            mesh.end(host, Signal::SIGTERM)?;
            remove_ca(mesh.host(host))?;
        }
        let init = [
            "env",
            &preload(),
            "FAKETIME=-3d",
            "mesh-agent",
            "ca",
            "init",
            "--trust-domain",
            "demo.mesh",
            "--out",
            "/etc/ecs-mesh",
        ];
        mesh.host(0).run(&init)?;
        for file in ["ca-bundle.pem", "join-token"] {
            let file = format!("etc/ecs-mesh/{file}");
            let (from, to) = (mesh.host(0).dir().join(&file), mesh.host(1).dir().join(&file));
            mesh_lab::run(Command::new("cp").arg("-a").arg(from).arg(to))?;
        }
        mesh.launch_as(1, &["env", &preload(), "FAKETIME=-2d", "FAKETIME_DONT_FAKE_MONOTONIC=1"])?;
        mesh.launch(0)?;
        mesh.await_ready(0)?;
        mesh.await_ready(1)?;
        refused(&mesh, &client, 11, "expired_peer")
    });
    mesh.down()?;
    checks.done()
}

/// The library that gives a program another time of day.
fn preload() -> String {
    let found = ["x86_64", "aarch64"].map(|machine| format!("/usr/lib/{machine}-linux-gnu/faketime/libfaketime.so.1"));
    let path = found.into_iter().find(|path| fs::exists(path).unwrap_or(false)).unwrap_or_default();
    format!("LD_PRELOAD={path}")
}

fn remove_ca(host: &Host) -> Result<()> {
    host.run(&["rm", "/etc/ecs-mesh/ca-bundle.pem", "/etc/ecs-mesh/join-token"]).map(drop)
}

/// Status and refusal header of one request.
fn answer(mesh: &Mesh, client: &Placed) -> Result<(String, String)> {
    let format = "%{http_code} %header{ecs-mesh-refusal}";
    let said =
        mesh.run(client, &["curl", "-sS", "-o", "/dev/null", "--max-time", "10", "-w", format, "http://world/"])?;
    let (status, refusal) = said.split_once(' ').unwrap_or((&said, ""));
    Ok((status.to_owned(), refusal.to_owned()))
}

fn served(mesh: &Mesh, client: &Placed) -> Result<()> {
    let said = answer(mesh, client)?;
    ensure!(said.0 == "200", "{said:?}");
    Ok(())
}

fn until_served(mesh: &Mesh, client: &Placed) -> Result<()> {
    until(LIMIT, "it is served", || {
        let said = answer(mesh, client)?;
        Ok(if said.0 == "200" { Ok(()) } else { Err(format!("{said:?}")) })
    })
}

/// Until the agent knows what was written, and then in the log too.
fn refused(mesh: &Mesh, client: &Placed, number: u32, label: &str) -> Result<()> {
    let wanted = format!("{number} {label}");
    let status = until(LIMIT, &format!("refused with {wanted}"), || {
        let (status, refusal) = answer(mesh, client)?;
        Ok(if refusal == wanted { Ok(status) } else { Err(format!("{status} {refusal:?}; {}", mesh.last_words(0))) })
    })?;
    ensure!(status.starts_with(['4', '5']), "{status}");
    let line = mesh.await_access(0, &wanted, |line| line["refusal"] == number)?;
    ensure!(line["refusal.label"] == label && line["src.service"] == "client", "{line}");
    Ok(())
}
