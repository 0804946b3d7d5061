//! Names and balancing: unmodified clients of every network mode say a service's name, and every endpoint answers.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use mesh_lab::{Mode, RESOLVER};
use mesh_tests::{
    mesh::{Mesh, Placed, Service},
    tier::{Tier, require},
    until::Checks,
};

const ANSWERS: [&str; 3] = ["world bridge one", "world bridge two", "world awsvpc two"];

#[test]
fn names_are_known_in_tasks_and_requests_are_balanced() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    for host in [0, 1] {
        mesh.configure(host, "[dns]\nipv6 = true\n")?;
    }
    // Docker gives the search domain to the tasks.
    mesh.host(0).write_etc("resolv.conf", &format!("nameserver {RESOLVER}\nsearch corp.test\n"))?;
    let bridge = mesh.task(0, mesh.idle("client-bridge"))?;
    let awsvpc = mesh.task(0, mesh.idle("client-awsvpc").mode(Mode::Awsvpc))?;
    let host = mesh.task(0, mesh.idle("client-host").mode(Mode::Host))?;
    let worlds = [
        mesh.task(0, mesh.nginx("world", ANSWERS[0], 8080))?,
        mesh.task(1, mesh.nginx("world", ANSWERS[1], 8080))?,
        mesh.task(1, mesh.nginx("world", ANSWERS[2], 8080).mode(Mode::Awsvpc))?,
    ];
    let world = worlds.iter().fold(Service::new("world", 80, 8080, "http"), Service::at);
    mesh.services(&[world], "")?;
    mesh.start()?;
    mesh.await_endpoints(0, "world", 3)?;

    let mut checks = Checks::default();
    for (mode, client) in [("bridge", &bridge), ("awsvpc", &awsvpc), ("host", &host)] {
        checks.run(&format!("a {mode} task's one connection is balanced request by request"), || {
            balanced(&mesh, client, "http://world/")
        });
    }
    for name in ["world.mesh", "world.service.consul", "world.demo", "WORLD.Mesh."] {
        checks.run(&format!("{name} is the same service"), || balanced(&mesh, &bridge, &format!("http://{name}/")));
    }
    checks.run("one connection of the client serves them all", || {
        let said = mesh.run(
            &bridge,
            &[
                "curl",
                "-sS",
                "-o",
                "/dev/null",
                "-w",
                "%{num_connects} ",
                "http://world/",
                "http://world/",
                "http://world/",
            ],
        )?;
        // The format is for the last transfer of the option group; without -o for the others their bodies come before.
        ensure!(said.trim_end().ends_with('0'), "the later requests opened connections: {said:?}");
        Ok(())
    });
    checks.run("the address of IPv6 is answered for, and reaches it", || {
        let address = mesh.run(&bridge, &["dig", "+short", "AAAA", "world"])?;
        ensure!(address.starts_with("fd65:6373:6d65:7368:"), "AAAA of world is {address:?}");
        let answer = mesh.run(&bridge, &["curl", "-sS", "--max-time", "5", &format!("http://[{address}]/")])?;
        ensure!(ANSWERS.contains(&answer.trim()), "{answer:?}");
        balanced(&mesh, &bridge, "-6 http://world/")
    });
    checks.run("a socket of IPv6 reaches the mapped address of IPv4", || {
        let address = mesh.run(&bridge, &["dig", "+short", "A", "world"])?;
        let answer = mesh.run(&bridge, &["peer", "get-mapped", &address, "80"])?;
        ensure!(ANSWERS.contains(&answer.as_str()), "{answer:?}");
        Ok(())
    });
    for (how, transport) in [("UDP", "+notcp"), ("TCP", "+tcp")] {
        checks.run(&format!("other names go to the resolver that the task was given, by {how}"), || {
            let arguments = ["dig", transport, "+tries=1", "+time=4", "elsewhere.example"];
            let said = mesh.run(&bridge, &arguments)?;
            ensure!(said.contains("10.90.0.9") && said.contains("NOERROR"), "{said}");
            ensure!(said.contains(&format!("SERVER: {RESOLVER}#53")), "the answer came from elsewhere: {said}");
            let unknown = mesh.run(&bridge, &["dig", transport, "+tries=1", "+time=4", "unknown.example"])?;
            ensure!(unknown.contains("NXDOMAIN"), "{unknown}");
            let own = mesh.run(&bridge, &["dig", transport, "+short", "world.mesh"])?;
            ensure!(own.starts_with("240.240."), "{own}");
            Ok(())
        });
    }
    checks.run("the agent knows the tasks' search domain, and does not let a dead resolver end their search", || {
        let said = mesh.run(&bridge, &["grep", "search", "/etc/resolv.conf"])?;
        ensure!(said.contains("corp.test"), "{said:?}");
        // Nobody is there, and the hook sees port 53.
        let dig = ["dig", "@127.0.0.9", "+tries=1", "+time=4"];
        for (name, code) in [("world.corp.test", "NXDOMAIN"), ("nobody.corp.test", "SERVFAIL")] {
            let said = mesh.run(&bridge, &[&dig[..], &[name]].concat())?;
            ensure!(said.contains(code), "{said}");
        }
        let said = mesh.run(&bridge, &[&dig[..], &["+search", "+short", "world"]].concat())?;
        ensure!(said.starts_with("240.240."), "{said:?}");
        Ok(())
    });
    checks.run("the host's own programs see no difference", || {
        let said = mesh.host(0).exec(&["dig", "+tries=1", "+time=4", "world"])?;
        ensure!(said.stdout.contains("NXDOMAIN"), "{said:?}");
        let vip = mesh.service(0, "world")?["vip4"].as_str().context("world has an address")?.to_owned();
        let said = mesh.host(0).exec(&["curl", "-sS", "--max-time", "1", &format!("http://{vip}/")])?;
        ensure!(!said.ok(), "the host reached a virtual address: {said:?}");
        let direct = worlds[1].task.published(8080).context("published")?;
        let said = mesh.host(0).run(&["curl", "-sS", "--max-time", "5", &format!("http://{direct}/")])?;
        ensure!(said.trim() == ANSWERS[1], "{said:?}");
        Ok(())
    });
    checks.run("the metrics name both services and both tasks", || metrics(&mesh, &bridge, &worlds));
    checks.run("each request has a line in the access logs of both hosts", || access(&mesh, &bridge, &worlds));
    mesh.down()?;
    checks.done()
}

/// Thirty requests on one connection reach several; all three when asked again, because the balancer stays away for a
/// moment from one that was slow.
fn balanced(mesh: &Mesh, client: &Placed, url: &str) -> Result<()> {
    let mut seen = BTreeSet::new();
    let mut several = false;
    for _round in 0..10 {
        let answers = on_one_connection(mesh, client, url, 30)?;
        several |= answers.len() > 1;
        seen.extend(answers.into_keys());
        if several && seen.len() == ANSWERS.len() {
            return Ok(());
        }
    }
    ensure!(several, "each connection is served by one endpoint");
    anyhow::bail!("not all answered: {seen:?}")
}

/// How often each endpoint answered.
fn on_one_connection(mesh: &Mesh, client: &Placed, url: &str, requests: usize) -> Result<BTreeMap<String, usize>> {
    let mut argv = vec!["curl", "-sS", "--max-time", "10", "-w", "%{num_connects}\n"];
    for _ in 0..requests {
        argv.extend(url.split(' '));
    }
    let said = mesh.run(client, &argv)?;
    let mut answers = BTreeMap::new();
    let mut connections = 0;
    for line in said.lines() {
        match line.parse::<usize>() {
            Ok(count) => connections += count,
            Err(_) => *answers.entry(line.to_owned()).or_insert(0) += 1,
        }
    }
    ensure!(connections == 1, "{connections} connections for {requests} requests: {answers:?}");
    ensure!(answers.values().sum::<usize>() == requests, "{answers:?}");
    ensure!(answers.keys().all(|answer| ANSWERS.contains(&answer.as_str())), "{answers:?}");
    Ok(answers)
}

fn metrics(mesh: &Mesh, client: &Placed, worlds: &[Placed]) -> Result<()> {
    let text = mesh.host(0).run(&["curl", "-sS", "http://127.0.0.1:15020/metrics"])?;
    let line = text.lines().find(|line| {
        line.starts_with("mesh_requests_total{")
            && line.contains(&format!("src_task=\"{}\"", client.task.id))
            && line.contains(&format!("dst_task=\"{}\"", worlds[0].task.id))
    });
    let line = line.with_context(|| format!("no such count in {text}"))?;
    for label in ["src_service=\"client-bridge\"", "dst_service=\"world\"", "status=\"2xx\"", "direction=\"outbound\""]
    {
        ensure!(line.contains(label), "{label} is not in {line}");
    }
    let healthy = mesh.host(0).run(&[
        "curl",
        "-sS",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "http://127.0.0.1:15020/healthz",
    ])?;
    ensure!(healthy == "200", "health says {healthy}");
    Ok(())
}

fn access(mesh: &Mesh, client: &Placed, worlds: &[Placed]) -> Result<()> {
    let said = mesh.run(client, &["sh", "-c", "for n in $(seq 12); do curl -sS http://world/here/$n; done"])?;
    let identity = |service: &str| format!("spiffe://demo.mesh/ns/demo/sa/{service}");
    let away = said.lines().filter(|line| line.ends_with("two")).count();
    ensure!(away > 0, "no request left the host: {said}");
    for number in 1..=12 {
        let path = format!("/here/{number}");
        let line = mesh.await_access(0, &path, |line| line["http.path"] == path.as_str())?;
        ensure!(line["src.task"] == client.task.id.as_str() && line["src.service"] == "client-bridge", "{line}");
        ensure!(line["dst.service"] == "world" && line["http.status"] == 200, "{line}");
        ensure!(line["src.id"] == identity("client-bridge") && line["dst.id"] == identity("world"), "{line}");
    }
    let lines = mesh
        .access(0)?
        .iter()
        .filter(|line| line["http.path"].as_str().is_some_and(|p| p.starts_with("/here/")))
        .count();
    ensure!(lines == 12, "{lines} lines for 12 requests");
    let line = mesh.await_access(1, "an inbound line", |line| {
        line["direction"] == "inbound" && line["src.id"] == identity("client-bridge")
    })?;
    let tasks: Vec<_> = worlds[1..].iter().map(|world| world.task.id.as_str()).collect();
    ensure!(tasks.iter().any(|task| line["dst.task"] == *task), "no task of {tasks:?} in {line}");
    Ok(())
}
