//! Protocols in which the server speaks first are never held up by the detection of protocols.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    mesh::{Mesh, Placed, Service, timed},
    tier::{Tier, figure, require},
    until::{Checks, until},
};

/// In no list of known ports.
const PORT: u16 = 13306;
const MARIADB: &str = "mkdir -p /tmp/data && exec mariadbd --no-defaults --datadir=/tmp/data --socket=/tmp/socket \
    --user=root --skip-grant-tables --bind-address=0.0.0.0 --port=13306 --innodb-buffer-pool-size=8M \
    --innodb-log-file-size=4M --lc-messages-dir=/none --character-sets-dir=/none --plugin-dir=/none --server-id=$0";

#[test]
fn a_server_that_speaks_first_is_heard_at_once() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let database = |family: &str, id: &str| mesh.spec(family, &["sh", "-c", MARIADB, id]).port(PORT);
    let near = mesh.task(0, database("near", "1"))?;
    let far = mesh.task(1, database("far", "2"))?;
    let greeter = mesh.task(1, mesh.peer("mail", "greets", 2525))?;
    let client = mesh.task(0, mesh.idle("client"))?;
    mesh.services(
        &[
            Service::new("near", PORT, PORT, "auto").at(&near),
            Service::new("far", PORT, PORT, "auto").at(&far),
            Service::new("mail", 2525, 2525, "auto").at(&greeter),
        ],
        "",
    )?;
    mesh.start()?;
    mesh.await_endpoints(0, "far", 1)?;

    let mut checks = Checks::default();
    for (name, id, place) in [("near", "1", "of this host"), ("far", "2", "of the other host")] {
        checks.run(&format!("MariaDB {place} greets and answers"), || mariadb(&mesh, &client, name, id));
    }
    checks.run("a greeting as of SMTP arrives, and the talk goes on", || {
        greeted(&mesh, &client, "mail:2525", "220 ready")?;
        let said = mesh.run(&client, &["sh", "-c", "echo EHLO | nc -w 5 mail 2525"])?;
        ensure!(said.contains("220 ready") && said.contains("250 EHLO"), "{said:?}");
        Ok(())
    });
    mesh.down()?;
    checks.done()
}

fn mariadb(mesh: &Mesh, client: &Placed, name: &str, id: &str) -> Result<()> {
    let ask = [
        "mariadb",
        "--no-defaults",
        "--character-sets-dir=/none",
        "-h",
        name,
        "-P",
        "13306",
        "-N",
        "-e",
        "SELECT @@server_id, 6 * 7",
    ];
    // Making the first data files takes a second.
    until(Duration::from_secs(30), "MariaDB has started", || {
        let said = mesh.exec(client, &ask)?;
        Ok(if said.ok() { Ok(()) } else { Err(said.stderr) })
    })?;
    let (said, took) = timed(|| mesh.run(client, &ask));
    let said = said?;
    ensure!(said.trim() == format!("{id}\t42"), "{said:?}");
    figure(&format!("mariadb_{name}_session"), took.as_secs_f64() * 1000.0, "ms");
    greeted(mesh, client, &format!("{name}:{PORT}"), "MariaDB")
}

/// The first bytes of the server, to a client that says nothing.
fn greeted(mesh: &Mesh, client: &Placed, to: &str, with: &str) -> Result<()> {
    let said = mesh.run(client, &["peer", "greeting", to])?;
    let (millis, first) = said.split_once(' ').with_context(|| said.clone())?;
    ensure!(first.contains(with), "the first bytes of {to} are {first:?}");
    let millis: u64 = millis.parse()?;
    figure(&format!("greeting_{}", to.split(':').next().unwrap_or(to)), millis as f64, "ms");
    ensure!(millis < 1000, "the greeting took {millis} ms");
    Ok(())
}
