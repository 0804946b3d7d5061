//! What the hooks cost a connection.

use std::{io, net::SocketAddr, time::Instant};

use anyhow::{Context as _, Result};
use mesh_common::maps::{Service, counter, namespace, service};
use mesh_tests::tier;
use socket2::{Domain, Socket, Type};

use super::Scene;

const ROUNDS: usize = 5;
const CONNECTS: u32 = 1000;
/// Far above what any machine takes: the test is for the figure.
const GENEROUS_NS: f64 = 200_000.0;

/// Connects `count` times to a port on which nobody listens; says the median time in nanoseconds.
pub(super) fn time(to: SocketAddr, count: u32) -> io::Result<String> {
    let one = |_| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        let began = Instant::now();
        let refused = socket.connect(&to.into());
        let took = began.elapsed();
        match refused {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(took.as_nanos()),
            other => Err(io::Error::other(format!("not refused: {other:?}"))),
        }
    };
    let mut took = (0..count).map(one).collect::<io::Result<Vec<_>>>()?;
    took.sort_unstable();
    Ok(took[took.len() / 2].to_string())
}

#[test]
fn the_cost_of_a_connect() -> Result<()> {
    let Some(mut scene) = Scene::new(namespace::DIRECT)? else { return Ok(()) };
    let stranger = scene.stage.space()?;
    let opaque = Service { id: 3, flags: service::OPAQUE, local: 1, total: 1 };
    scene.service("240.240.0.3:9", opaque, &["127.0.0.2:9"])?;
    let (plain, virt) = (format!("time 127.0.0.2:9 {CONNECTS}"), format!("time 240.240.0.3:9 {CONNECTS}"));
    let mut medians: [Vec<f64>; 4] = Default::default();
    // In turn, so that what else the machine does falls on all alike.
    for _ in 0..ROUNDS {
        let clients = [
            scene.stage.outsider(&stranger, "kernel::client", &plain)?,
            scene.stage.client(Some(&stranger), None, "kernel::client", &plain)?,
            scene.stage.client(Some(&scene.space), None, "kernel::client", &plain)?,
            scene.stage.client(Some(&scene.space), None, "kernel::client", &virt)?,
        ];
        for (client, medians) in clients.into_iter().zip(&mut medians) {
            let said = client.go()?;
            medians.push(said.parse().with_context(|| said.clone())?);
        }
        // Room for the reports of the next round.
        scene.events();
    }
    let [unattached, unenrolled, loopback, direct] = medians.map(|mut medians| {
        medians.sort_unstable_by(f64::total_cmp);
        medians[medians.len() / 2]
    });
    assert_eq!(scene.counter(counter::DIRECT)?, u64::from(CONNECTS) * ROUNDS as u64, "what is measured");
    for (name, value) in [
        ("connect_unattached", unattached),
        ("connect_attached_unenrolled", unenrolled),
        ("connect_enrolled_loopback", loopback),
        ("connect_enrolled_direct", direct),
    ] {
        tier::figure(name, value, "ns");
    }
    tier::figure("hook_cost_unenrolled", unenrolled - unattached, "ns");
    tier::figure("hook_cost_direct", direct - unattached, "ns");
    assert!(direct - unattached < GENEROUS_NS, "{direct} - {unattached}");
    Ok(())
}
