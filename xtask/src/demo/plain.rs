//! Without a mesh: names mean nothing, and the network between the hosts reads along.

use anyhow::{Result, ensure};
use mesh_lab::{Cluster, StreamKind};

use super::{
    play::MARKER,
    show::Show,
    tasks::{HTTP, Tasks},
};

/// Shows it, and that the capture can find what it looks for.
///
/// # Errors
/// The mesh is not off, or the capture holds less than it should.
pub(super) fn show_mesh_off(cluster: &Cluster, tasks: &Tasks, show: &mut Show) -> Result<()> {
    show.step("The mesh is off: no name is known, and requests cross the network in clear");
    let (web, host) = (&tasks.web, tasks.web.on(cluster));
    show.typed("curl http://world/      (in task web)");
    let unknown = host.exec_in(&web.task, &["curl", "-sS", "--max-time", "5", "http://world/"])?;
    show.block(unknown.stderr.trim());
    ensure!(unknown.code == Some(6), "curl should not know the name `world` without a mesh, but ended so: {unknown:?}");

    let capture = cluster.capture("mesh-off")?;
    let remote = &tasks.worlds[1];
    let url = format!("http://{}/", remote.at(HTTP)?);
    show.typed(&format!("curl -H 'X-Secret: {MARKER}' {url}      (in task web)"));
    let header = format!("X-Secret: {MARKER}");
    let said = host.run_in(
        &web.task,
        &["curl", "-sS", "--max-time", "5", "--retry", "20", "--retry-connrefused", "-H", &header, &url],
    )?;
    show.block(&said);
    ensure!(said == remote.answer(), "{} answered {said:?}", remote.label);
    let pcap = capture.stop()?;
    for stream in pcap.streams() {
        show.block(&stream.to_string());
    }
    ensure!(pcap.contains(MARKER.as_bytes()), "the capture should hold the marker text when the mesh is off");
    ensure!(
        pcap.streams().iter().any(|stream| stream.kind == StreamKind::Other),
        "the capture should hold a stream that is not TLS when the mesh is off"
    );
    show.proved(&format!("the capture between the hosts holds {MARKER:?} in clear"));
    Ok(())
}
