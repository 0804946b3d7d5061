//! Applications that close a connection under a request: what they have not read is sent elsewhere, and nothing else is.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use mesh_tests::{
    mesh::{LIMIT, Mesh, Placed, Service},
    tier::{Tier, require},
    until::{Checks, until},
};

const PORT: u16 = 9100;
const POSTS: usize = 12;

#[test]
fn a_post_is_answered_once_whatever_its_application_leaves_unread() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    // Nothing of a request, a part of its head.
    let servers = [("near-0", 0, "0"), ("far-0", 1, "0"), ("near-9", 0, "9"), ("far-9", 1, "9")];
    let port = PORT.to_string();
    let start = |(family, host, octets): (&str, usize, &str)| -> Result<[Placed; 2]> {
        // Every connection is to be one of the requests'.
        let one = || {
            let spec = mesh.spec(family, &["peer", "leaves", &port, octets]).port(PORT);
            mesh.task(host, spec.label("ecs-mesh.ready", "none"))
        };
        Ok([one()?, one()?])
    };
    let placed = servers.map(start).into_iter().collect::<Result<Vec<_>>>()?;
    let client = mesh.task(0, mesh.idle("client"))?;
    let mut services = Vec::new();
    for ((family, ..), [one, two]) in servers.iter().zip(&placed) {
        services.push(Service::new(family, PORT, PORT, "http").at(one).at(two));
    }
    mesh.services(&services, "")?;
    mesh.start()?;
    for (family, ..) in servers {
        mesh.await_endpoints(0, family, 2)?;
    }
    let mut checks = Checks::default();
    for ((family, _, octets), placed) in servers.into_iter().zip(&placed) {
        checks.run(&format!("of a request {octets} octets are read ({family})"), || {
            let said = mesh.run(&client, &["peer", "post", &format!("{family}:{PORT}"), &POSTS.to_string()])?;
            let answers: Vec<&str> = said.split_whitespace().collect();
            ensure!(answers.len() == POSTS, "{said}");
            let answered: Vec<usize> = (0..POSTS).filter(|turn| answers[*turn] == "200").collect();
            let lost = answers.iter().filter(|answer| **answer == "502").count();
            ensure!(answered.len() + lost == POSTS, "{said}");
            let (took, left) = heard(&mesh, placed, answered.len(), lost)?;
            ensure!(left > 0, "no connection was left: {said}");
            ensure!(lost == if octets == "0" { 0 } else { left }, "{lost} failed, {left} were left: {said}");
            ensure!(took == answered, "{said}: {took:?} were read whole");
            Ok(())
        });
    }
    mesh.down()?;
    checks.done()
}

/// The requests that the servers have read whole, each as often as it was, and how many they have left; once these are
/// as many as the client knows of.
fn heard(mesh: &Mesh, servers: &[Placed], answered: usize, lost: usize) -> Result<(Vec<usize>, usize)> {
    until(LIMIT, "the servers have said all", || {
        let mut said = String::new();
        for server in servers {
            said.push_str(&mesh.said(server)?);
            said.push('\n');
        }
        let mut took: Vec<usize> = said.lines().filter_map(|line| line.strip_prefix("took ")?.parse().ok()).collect();
        took.sort_unstable();
        let left = said.lines().filter(|line| *line == "left").count();
        let known: BTreeSet<_> = took.iter().collect();
        Ok(if known.len() >= answered && left >= lost.max(1) { Ok((took, left)) } else { Err(said) })
    })
}
