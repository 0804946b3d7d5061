//! Real containers by real daemons: the two-host lab itself, in both its forms.
//!
//! Needs root, Docker and the programs that `cargo xtask test` installs.

mod faults;
mod http2;
mod identity;
mod leaving;
mod lifecycle;
mod names;
mod readiness;
mod server_first;
mod streams;

use mesh_lab::{Cluster, Image, Mode, TaskSpec};
use mesh_tests::{
    stage,
    tier::{Tier, require},
};

const SERVE: &str = "mkdir /www && echo \"from $(hostname)\" >/www/index.html && exec busybox httpd -f -p 8080 -h /www";

#[test]
fn tasks_of_all_modes_run_under_docker() -> anyhow::Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let _turn = stage::turn();
    tasks_of_all_modes_are_reached_and_nothing_is_left(Cluster::up(2)?)
}

#[test]
fn tasks_of_all_modes_run_under_the_stand_in() -> anyhow::Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let _turn = stage::turn();
    tasks_of_all_modes_are_reached_and_nothing_is_left(Cluster::without_docker(2)?)
}

fn tasks_of_all_modes_are_reached_and_nothing_is_left(cluster: Cluster) -> anyhow::Result<()> {
    let image = Image::tools(cluster.dir())?;
    cluster.import(&image)?;
    let [one, two] = cluster.hosts() else { anyhow::bail!("two hosts") };

    let client = one.run_task(&TaskSpec::new("client", image.name(), &["sleep", "1000"]))?;
    let capture = cluster.capture("plain")?;
    for (mode, marker) in [(Mode::Bridge, "marker-b"), (Mode::Awsvpc, "marker-a"), (Mode::Host, "marker-h")] {
        let spec = TaskSpec::new("world", image.name(), &["sh", "-c", SERVE]).mode(mode).port(8080);
        let task = two.run_task(&spec)?;
        let at = task.published(8080).expect("the port was asked for");
        let cgroup =
            two.run(&["sh", "-c", "cat /sys/fs/cgroup/ecstasks.slice/*/docker-*.scope/cgroup.procs | wc -l"])?;
        assert_ne!(cgroup, "0");
        let url = format!("http://{at}/?{marker}");
        let got = one.run_in(
            &client,
            &["curl", "-sS", "--retry", "20", "--retry-delay", "1", "--retry-connrefused", "--max-time", "5", &url],
        )?;
        assert!(got.starts_with("from "), "{got}");
        two.stop_task(&task)?;
    }
    let pcap = capture.stop()?;
    assert!(pcap.contains(b"marker-b") && pcap.contains(b"marker-a") && pcap.contains(b"marker-h"));
    assert!(!pcap.contains(b"marker-x"));
    let name = one.exec_in(&client, &["nslookup", "elsewhere.example"])?;
    assert!(name.stdout.contains("10.90.0.9"), "{name:?}");
    let unknown = one.exec_in(&client, &["curl", "-sS", "http://world/"])?;
    assert!(unknown.stderr.contains("resolve host"), "{unknown:?}");

    let traces = cluster.traces();
    assert!(!traces.left().is_empty());
    cluster.down()?;
    assert_eq!(traces.left(), Vec::<String>::new());
    Ok(())
}
