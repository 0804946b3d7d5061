//! What the hooks cost a connection.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Instant,
};

use anyhow::{Context as _, Result};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};
use mesh_common::maps::{Service, counter, namespace, service};
use mesh_tests::{stage::Space, tier};
use socket2::{Domain, Socket, Type};

use super::Scene;

const ROUNDS: usize = 5;
const CONNECTS: u32 = 1000;
/// Short, because a hook that is interrupted counts what interrupts it: most of them are not.
const SHORT_ROUNDS: usize = 100;
const FEW: u32 = 20;
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

/// How often the socket operation hook ran so far, and how many nanoseconds that took. Of every agent of this machine.
fn socket_operations() -> (f64, f64) {
    let ours = loaded_programs().flatten().filter(|program| program.name_as_str() == Some("mesh_sock_ops"));
    ours.fold((0.0, 0.0), |(runs, time), it| (runs + it.run_count() as f64, time + it.run_time().as_nanos() as f64))
}

/// Connections to `at` in `space`, of each of which the application reads so much of five octets.
fn converse(space: &Space, at: &str, reads: usize, count: u32) -> Result<()> {
    let at: SocketAddr = at.parse()?;
    let listener: TcpListener = space.netns.run(|| TcpListener::bind(at))??;
    let to = listener.local_addr()?;
    for _ in 0..count {
        let mut client: TcpStream = space.netns.run(|| TcpStream::connect(to))??;
        let mut app = listener.accept()?.0;
        client.write_all(b"first")?;
        while app.peek(&mut [0; 5])? < 5 {}
        app.read_exact(&mut vec![0; reads])?;
        drop(app);
        // An end, or a reset.
        drop(client.read(&mut [0; 1]));
    }
    Ok(())
}

#[test]
fn the_cost_of_telling_what_is_unread() -> Result<()> {
    let Some(scene) = Scene::new(0)? else { return Ok(()) };
    let stranger = scene.stage.space()?;
    let counting = enable_stats(Stats::RunTime)?;
    // From another address than its own, a server is called by nobody whom the hook looks at.
    let kinds = [
        ("other_addresses", &scene.space, "127.0.0.2:0", 5),
        ("unenrolled", &stranger, "127.0.0.1:0", 5),
        ("all_read", &scene.space, "127.0.0.1:0", 5),
        ("unread", &scene.space, "127.0.0.1:0", 4),
    ];
    let mut medians: [Vec<f64>; 4] = Default::default();
    let mut ran = [0.0; 4];
    for _ in 0..SHORT_ROUNDS {
        for (((_, space, at, reads), medians), ran) in kinds.iter().zip(&mut medians).zip(&mut ran) {
            let (runs, time) = socket_operations();
            converse(space, at, *reads, FEW)?;
            let after = socket_operations();
            medians.push((after.1 - time) / f64::from(FEW));
            *ran = (after.0 - runs) / f64::from(FEW);
        }
    }
    drop(counting);
    for (((name, ..), mut medians), ran) in kinds.iter().zip(medians).zip(ran) {
        tier::figure(&format!("sock_ops_runs_per_connection_{name}"), ran, "x");
        medians.sort_unstable_by(f64::total_cmp);
        let median = medians[medians.len() / 2];
        tier::figure(&format!("sock_ops_per_connection_{name}"), median, "ns");
        assert!(median < GENEROUS_NS, "{name}: {median}");
    }
    Ok(())
}
