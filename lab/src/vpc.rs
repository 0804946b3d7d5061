//! The network between the hosts: a namespace with a bridge, a resolver on it, and the place to listen from.
//!
//! All addresses are inside namespaces that the lab made. It must not know Docker or tasks.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cgroup,
    name::Claim,
    process::{Process, run},
};

/// Addresses of the hosts, in order.
pub const HOST_ADDRESSES: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 90, 1, 10),
    Ipv4Addr::new(10, 90, 1, 11),
    Ipv4Addr::new(10, 90, 1, 12),
    Ipv4Addr::new(10, 90, 1, 13),
];
/// The resolver that every task is given, as the VPC's own resolver would be.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 1);
const BRIDGE: &str = "vpc0";
/// A group that nobody has joined: a packet to it passes the bridge and disturbs no one.
pub(crate) const NOBODY: Ipv4Addr = Ipv4Addr::new(239, 90, 0, 1);

/// The network.
#[derive(Debug)]
pub struct Vpc {
    /// Killing it takes the resolver and the namespace along.
    init: Mutex<Process>,
    pid: u32,
    dir: PathBuf,
    cgroup: PathBuf,
    next_eni: AtomicU8,
}

impl Vpc {
    pub(crate) fn up(claim: &Claim) -> Result<Self> {
        let (dir, cgroup) = (claim.dir.clone(), claim.cgroup.join("vpc"));
        cgroup::create(&cgroup)?;
        let mut init = cgroup::join(&cgroup);
        init.args([
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
            "sleep",
            "infinity",
        ]);
        let init = Process::start(&init, true, &dir.join("vpc.log"))?;
        let pid = init.pid()?;
        let vpc = Self { init: Mutex::new(init), pid, dir, cgroup, next_eni: AtomicU8::new(10) };
        vpc.ip("link set lo up")?;
        vpc.ip(&format!("link add {BRIDGE} type bridge"))?;
        vpc.ip(&format!("addr add {GATEWAY}/16 dev {BRIDGE}"))?;
        vpc.ip(&format!("addr add {RESOLVER}/16 dev {BRIDGE}"))?;
        vpc.ip(&format!("link set {BRIDGE} up"))?;
        vpc.ip(&format!("route add {NOBODY} dev {BRIDGE}"))?;
        vpc.start_resolver()?;
        Ok(vpc)
    }

    /// Gives the namespace of `pid` (as this process sees it) an interface on the network.
    pub(crate) fn plug(&self, port: &str, pid: u32, interface: &str) -> Result<()> {
        self.ip(&format!("link add {port} type veth peer name {interface} netns {pid}"))?;
        self.ip(&format!("link set {port} master {BRIDGE} up"))
    }

    pub(crate) fn next_eni(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 90, 2, self.next_eni.fetch_add(1, Ordering::Relaxed))
    }

    /// Prefix length and default gateway of the network.
    pub(crate) fn subnet() -> (u8, Ipv4Addr) {
        (16, GATEWAY)
    }

    pub(crate) fn bridge() -> &'static str {
        BRIDGE
    }

    /// A command that runs in the network's namespace.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = cgroup::join(&self.cgroup);
        command.args(["nsenter", "-t", &self.pid.to_string(), "-n", "-p", "-m", "--", program]);
        command
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Pid of the namespace's first process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn down(&self) {
        self.init.lock().unwrap_or_else(PoisonError::into_inner).kill();
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        // Pids in the arguments are this process's view, so only the network namespace is entered.
        let mut ip = Command::new("nsenter");
        ip.args(["-t", &self.pid.to_string(), "-n", "--", "ip"]).args(arguments.split(' '));
        run(&mut ip).map(drop)
    }

    /// A resolver that knows one name, `elsewhere.example`, and says NXDOMAIN to all others.
    fn start_resolver(&self) -> Result<()> {
        let (pid_file, log) = (self.dir.join("dnsmasq.pid"), self.dir.join("dnsmasq.log"));
        run(self.command("dnsmasq").args(["--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]).args(
            [
                format!("--listen-address={RESOLVER}"),
                "--bind-interfaces".to_owned(),
                "--address=/elsewhere.example/10.90.0.9".to_owned(),
                "--local=/#/".to_owned(),
                format!("--pid-file={}", pid_file.display()),
                format!("--log-facility={}", log.display()),
            ],
        ))
        .context("cannot start the resolver of the network")?;
        // It goes to the background once its sockets are open, and then writes the file.
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::read_to_string(&pid_file).map_or(true, |text| text.is_empty()) {
            if Instant::now() > deadline {
                bail!("the resolver did not start: {}", fs::read_to_string(&log).unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Whether an address is on this network.
    #[must_use]
    pub fn holds(address: IpAddr) -> bool {
        matches!(address, IpAddr::V4(v4) if v4.octets()[..2] == GATEWAY.octets()[..2])
    }
}
