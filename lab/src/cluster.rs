//! The cluster: network and hosts together, made and removed as one.
//!
//! It must not know what runs on the hosts.

use std::{fs, path::Path, process::Command, sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    capture::Capture,
    cgroup,
    engine::Engine,
    host::Host,
    image::Image,
    name::{Claim, sweep},
    process::run,
    remains::Traces,
    standin::StandIn,
    vpc::{HOST_ADDRESSES, Vpc},
};

const DOCKERD_LIMIT: Duration = Duration::from_secs(60);

/// A network and its hosts. Dropping it removes both and all that runs on them.
#[derive(Debug)]
pub struct Cluster {
    claim: Claim,
    vpc: Arc<Vpc>,
    hosts: Vec<Host>,
}

impl Cluster {
    /// Makes a network with `count` hosts (at most four), each with a dockerd that answers.
    ///
    /// # Errors
    /// Not root, a package of [`crate::PACKAGES`] is missing, or dockerd cannot run here; nothing is left then.
    pub fn up(count: usize) -> Result<Self> {
        let mut cluster = Self::bare(count)?;
        for host in &mut cluster.hosts {
            host.start_dockerd()?;
        }
        for host in &mut cluster.hosts {
            host.await_dockerd(DOCKERD_LIMIT)?;
        }
        Ok(cluster)
    }

    /// The same, with the stand-in for Docker: plain namespaces in ECS-shaped cgroups, Docker's API in front of them.
    ///
    /// # Errors
    /// As for [`Cluster::bare`], or the kernel cannot translate addresses.
    pub fn without_docker(count: usize) -> Result<Self> {
        let mut cluster = Self::bare(count)?;
        for host in &mut cluster.hosts {
            host.engine = Engine::StandIn(StandIn::up(host)?);
        }
        Ok(cluster)
    }

    /// The same without containers.
    ///
    /// # Errors
    /// Not root, or a package of [`crate::PACKAGES`] is missing; nothing is left then.
    pub fn bare(count: usize) -> Result<Self> {
        sweep().context("cannot remove what an earlier run left")?;
        let claim = Claim::take()?;
        let made = Vpc::up(&claim).map(Arc::new);
        let vpc = match made {
            Ok(vpc) => vpc,
            Err(error) => {
                claim.release()?;
                return Err(error);
            }
        };
        let mut cluster = Self { claim, vpc, hosts: Vec::new() };
        for (name, address) in ["a", "b", "c", "d"].iter().zip(HOST_ADDRESSES).take(count) {
            let host = Host::up(&cluster.claim, &cluster.vpc, name, address)?;
            cluster.hosts.push(host);
        }
        Ok(cluster)
    }

    /// The hosts, in order.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The hosts, to end one of them.
    pub fn hosts_mut(&mut self) -> &mut [Host] {
        &mut self.hosts
    }

    #[must_use]
    pub fn vpc(&self) -> &Vpc {
        &self.vpc
    }

    /// The cluster's temporary directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.claim.dir
    }

    /// Name of the cluster, and of its cgroup and directory.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.claim.name
    }

    /// Loads an image on all hosts.
    ///
    /// # Errors
    /// A daemon refuses it.
    pub fn import(&self, image: &Image) -> Result<()> {
        thread::scope(|scope| {
            let all: Vec<_> = self.hosts.iter().map(|host| scope.spawn(|| host.import(image))).collect();
            all.into_iter().try_for_each(|each| each.join().unwrap_or_else(|_| anyhow::bail!("the import panicked")))
        })
    }

    /// Records everything that passes between the hosts from now on.
    ///
    /// # Errors
    /// tcpdump cannot be started.
    pub fn capture(&self, name: &str) -> Result<Capture> {
        Capture::start(&self.vpc, name)
    }

    /// Everything that the cluster has on the machine at this moment.
    #[must_use]
    pub fn traces(&self) -> Traces {
        Traces::of(std::slice::from_ref(&self.claim))
    }

    /// Removes everything.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn down(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        for host in &mut self.hosts {
            host.terminate();
        }
        self.hosts.clear();
        self.vpc.down();
        self.claim.release()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Twice is harmless: after `down` there is nothing to find. A panic may be under way: nothing better to do.
        self.remove().ok();
    }
}

/// Whether this machine can be a cluster at all: root, cgroup2 and the programs. Docker is looked for later.
///
/// # Errors
/// The first thing that is missing.
pub fn preflight() -> Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "namespaces and cgroups need root");
    cgroup::root()?;
    for program in ["dnsmasq", "tcpdump", "ip", "nsenter", "unshare", "setpriv", "iptables"] {
        run(Command::new("sh").args(["-c", "command -v \"$0\"", program]))
            .with_context(|| format!("{program} is not installed"))?;
    }
    fs::metadata("/sys/kernel/btf/vmlinux").map(drop).context("the kernel has no BTF")
}
