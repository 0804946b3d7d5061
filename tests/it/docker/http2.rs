//! HTTP/2 and gRPC between two agents with programs that know nothing of us: nghttpd, nghttp, curl, h2load.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    mesh::{LIMIT, Mesh, Placed, Service},
    tier::{Tier, figure, require},
    until::{Checks, until},
};
use serde_json::Value;

/// Says its host's name in a body, and a gRPC status in trailers.
const SERVER: &str = "mkdir -p /www && echo $0 >/www/who && head -c 3000000 /dev/zero >/www/large && \
    exec nghttpd --no-tls -d /www --trailer 'grpc-status: 0' --early-response 8080";
const CALLS: u64 = 4000;

#[test]
fn calls_are_balanced_one_by_one() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let server = |mesh: &Mesh, name: &str| mesh.spec(name, &["sh", "-c", SERVER, name]).port(8080);
    let near = mesh.task(0, server(&mesh, "near"))?;
    let far = mesh.task(1, server(&mesh, "far"))?;
    let client = mesh.task(0, mesh.idle("client"))?;
    mesh.services(
        &[
            Service::new("both", 80, 8080, "grpc").with("families = [\"near\", \"far\"]").at(&near).at(&far),
            Service::new("nobody", 80, 8080, "auto"),
        ],
        "",
    )?;
    mesh.start()?;
    mesh.await_endpoints(0, "both", 2)?;

    let mut checks = Checks::default();
    checks.run("requests on one connection reach both hosts", || {
        until(LIMIT, "both servers answer", || {
            let said = asked(&mesh, &client, &[])?;
            let of = |name: &str| said.lines().filter(|line| *line == name).count();
            Ok(if of("near") > 0 && of("far") > 0 && of("near") + of("far") == 20 { Ok(()) } else { Err(said) })
        })
    });
    checks.run("trailers arrive", || {
        let said = asked(&mesh, &client, &["-nv"])?;
        let trailers = said.matches("grpc-status: 0").count();
        ensure!(trailers == 20, "{trailers}: {said}");
        Ok(())
    });
    checks.run("large bodies are whole", || {
        let count = "nghttp http://both/large http://both/large?2 http://both/large?3 | wc -c";
        let said = mesh.run(&client, &["sh", "-c", count])?;
        ensure!(said.trim() == "9000000", "{said}");
        Ok(())
    });
    checks.run("calls of a few busy connections are spread and none is lost", || load(&mesh, &client));
    checks.run("a refused gRPC call is told by a status", || {
        let call = ["-i", "-X", "POST", "-H", "content-type: application/grpc", "-H", "te: trailers", "-d", ""];
        let curl = ["curl", "-sS", "--http2-prior-knowledge"];
        let said = mesh.run(&client, &[&curl[..], &call, &["http://nobody/pkg.World/Say"]].concat())?;
        ensure!(said.starts_with("HTTP/2 200") && said.contains("grpc-status: 14"), "{said}");
        let line = mesh.await_access(0, "the refusal", |line| line["http.path"] == "/pkg.World/Say")?;
        let number = line["refusal"].as_u64().with_context(|| line.to_string())?;
        ensure!(said.contains(&format!("reason {number} (")), "{said} is not {line}");
        Ok(())
    });
    checks.run("a server that stops costs no later call", || {
        mesh.host(1).docker(&["kill", &far.task.container])?;
        until(LIMIT, "all calls are answered by the other", || {
            let said = asked(&mesh, &client, &[])?;
            Ok(if said.lines().filter(|line| *line == "near").count() == 20 { Ok(()) } else { Err(said) })
        })
    });
    mesh.down()?;
    checks.done()
}

/// Twenty requests on one connection. curl would do too, but 7.88 fails to use such a connection twice.
fn asked(mesh: &Mesh, client: &Placed, options: &[&str]) -> Result<String> {
    let urls: Vec<String> = (0..20).map(|number| format!("http://both/who?{number}")).collect();
    let urls = urls.iter().map(String::as_str);
    mesh.run(client, &["nghttp"].into_iter().chain(options.iter().copied()).chain(urls).collect::<Vec<_>>())
}

fn load(mesh: &Mesh, client: &Placed) -> Result<()> {
    let calls = CALLS.to_string();
    let said = mesh.run(
        client,
        &[
            "h2load",
            "-c4",
            "-m8",
            "-n",
            &calls,
            "-H",
            "content-type: application/grpc",
            "-H",
            "te: trailers",
            "http://both/who",
        ],
    )?;
    ensure!(said.contains(&format!("{CALLS} succeeded, 0 failed")), "{said}");
    let rate = said.lines().find_map(|line| line.strip_prefix("finished in ")?.split(' ').nth(1)?.parse::<f64>().ok());
    figure("h2load_4x8", rate.with_context(|| said.clone())?, "req/s");
    let of_grpc = |line: &&Value| line["protocol"] == "grpc" && line["http.path"] == "/who";
    until(LIMIT, "every call is in the log", || {
        let lines = mesh.access(0)?;
        let mut ends = BTreeMap::<String, u64>::new();
        for line in lines.iter().filter(of_grpc) {
            *ends.entry(line["dst.endpoint"].to_string()).or_default() += 1;
            ensure!(line["outcome"] == "ok" && line["grpc.status"] == 0, "{line}");
        }
        let all = ends.values().sum::<u64>() == CALLS && ends.len() == 2;
        Ok(if all { Ok(()) } else { Err(format!("{ends:?}")) })
    })
}
