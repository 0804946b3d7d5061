//! A packet capture on the network between the hosts.
//!
//! It must not know what is looked for in it.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    pcap::Pcap,
    process::{Process, run},
    vpc::{NOBODY, Vpc},
};

const LIMIT: Duration = Duration::from_secs(10);

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    path: PathBuf,
    vpc: Arc<Vpc>,
}

impl Capture {
    pub(crate) fn start(vpc: &Arc<Vpc>, name: &str) -> Result<Self> {
        let path = vpc.dir().join(format!("{name}.pcap"));
        let mut tcpdump = vpc.command("tcpdump");
        // Immediate and unbuffered: a packet is in the file once it has passed.
        tcpdump
            .args(["-i", Vpc::bridge(), "--immediate-mode", "-U", "-s", "0", "-B", "16384", "-Z", "root", "-w"])
            .arg(&path);
        let process = Process::start(&tcpdump, true, &vpc.dir().join(format!("{name}.tcpdump.log")))?;
        let mut capture = Self { process, path, vpc: Arc::clone(vpc) };
        let deadline = Instant::now() + LIMIT;
        while !fs::read_to_string(capture.process.log()).unwrap_or_default().contains("listening on") {
            if !capture.process.is_alive() || Instant::now() > deadline {
                bail!("tcpdump did not start: {}", capture.process.last_words());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(capture)
    }

    /// Waits until all that has passed is in the file, stops, and returns it.
    ///
    /// # Errors
    /// tcpdump has ended before, or the file cannot be read.
    pub fn stop(mut self) -> Result<Pcap> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // Packets are recorded in order, so when this one is there all earlier ones are.
        let fence = format!("fence-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let send = format!("echo {fence} >/dev/udp/{}/9", NOBODY);
        let deadline = Instant::now() + LIMIT;
        loop {
            run(self.vpc.command("bash").args(["-c", &send])).context("cannot send a packet on the network")?;
            if Pcap::read(&self.path)?.contains(fence.as_bytes()) {
                break;
            }
            if !self.process.is_alive() || Instant::now() > deadline {
                bail!("tcpdump records nothing: {}", self.process.last_words());
            }
            thread::sleep(Duration::from_millis(10));
        }
        self.process.kill();
        Pcap::read(&self.path)
    }

    /// A command that shows the capture's text, for people who keep the cluster.
    #[must_use]
    pub fn reader(&self) -> Command {
        let mut command = Command::new("tcpdump");
        command.args(["-A", "-r"]).arg(&self.path);
        command
    }
}
