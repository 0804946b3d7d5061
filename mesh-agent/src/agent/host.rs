//! Facts about this host that the configuration leaves open.
//!
//! Asks the kernel and the ECS agent; must not know what the facts are for.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::PathBuf,
};

use mesh_core::{cloud_map::known::namespace_label, config::Config, ecs::entries::cluster_label, id::ClusterName};

use crate::{
    sys::cgroup::{self, CgroupError},
    tasks::ecs_agent,
};

/// What is known about the host before anything is started.
#[derive(Clone, Debug)]
pub(super) struct HostFacts {
    /// The address that other hosts reach this one by.
    pub address: IpAddr,
    pub cluster: ClusterName,
    /// Mount point of the cgroup2 hierarchy.
    pub cgroup_root: PathBuf,
    /// The agent's own cgroup, by the kernel's number.
    pub own_cgroup: u64,
    /// The host's resolvers.
    pub resolvers: Vec<SocketAddr>,
    /// The host's search domains.
    pub search: Vec<String>,
}

/// A fact could not be found.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("cannot tell this host's address: there is no default route; set `host.address`")]
    Address { source: io::Error },
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Any address outside of this host and its networks (RFC 5737); nothing is sent to it.
const SOMEWHERE: &str = "192.0.2.1:9";

/// Every suffix that follows from where services are learnt.
pub(super) fn name_after_all(config: Config, cluster: &ClusterName) -> Config {
    name_after_namespaces(name_after_clusters(name_after_datacenters(name_after_cluster(config, cluster))))
}

/// Services are also known as `<service>.<cluster>`, the form that ECS Service Connect and Cloud Map gave them.
fn name_after_cluster(mut config: Config, cluster: &ClusterName) -> Config {
    let suffix = cluster.as_str().to_ascii_lowercase();
    if !config.dns.suffixes.contains(&suffix) {
        config.dns.suffixes.push(suffix);
    }
    config
}

/// Consul's names with a datacenter in them: `world.service.dc1.consul`, for each suffix `service.…`. Those of the first
/// datacenter are the bare names.
fn name_after_datacenters(mut config: Config) -> Config {
    let Some(consul) = &config.discovery.consul else { return config };
    let domains: Vec<_> =
        config.dns.suffixes.iter().filter_map(|suffix| suffix.strip_prefix("service.")).map(str::to_owned).collect();
    for (place, datacenter) in consul.datacenters.iter().enumerate() {
        for suffix in domains.iter().map(|domain| format!("service.{datacenter}.{domain}")) {
            match place {
                0 if config.dns.suffixes.contains(&suffix) => {}
                0 => config.dns.suffixes.push(suffix),
                _ => config.dns.datacenters.push((suffix, datacenter.clone())),
            }
        }
    }
    config
}

/// Docker gives the host's search domains to tasks, unless it is told otherwise.
pub(super) fn search_as_the_host(mut config: Config, search: &[String]) -> Config {
    config.dns.search.get_or_insert_with(|| search.to_vec());
    config
}

/// Names of services of further clusters: `world.<cluster>`.
fn name_after_clusters(mut config: Config) -> Config {
    let Some(ecs) = &config.discovery.ecs else { return config };
    for cluster in ecs.clusters.iter().skip(1).map(cluster_label) {
        if !config.dns.suffixes.contains(&cluster) {
            config.dns.datacenters.push((cluster.clone(), cluster));
        }
    }
    config
}

/// Cloud Map's names: `world.my.demo`. Services of the first namespace are the bare names. A namespace that is no domain
/// name is no suffix.
fn name_after_namespaces(mut config: Config) -> Config {
    let Some(cloud_map) = &config.discovery.cloud_map else { return config };
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    for (place, namespace) in cloud_map.namespaces.iter().enumerate() {
        let suffix = namespace.to_ascii_lowercase();
        if config.dns.suffixes.contains(&suffix) || !suffix.split('.').all(label) {
            continue;
        }
        match (place, namespace_label(namespace)) {
            (0, _) => config.dns.suffixes.push(suffix),
            (_, Some(label)) => config.dns.datacenters.push((suffix, label)),
            (_, None) => {}
        }
    }
    config
}

/// The cluster of a host that no ECS agent tells.
const NO_CLUSTER: &str = "default";

/// Gathers the facts.
///
/// # Errors
/// There is no default route and no configured address, or no cgroup2 hierarchy.
pub(super) async fn facts(config: &Config) -> Result<HostFacts, HostError> {
    let address = match config.host.address {
        Some(address) => address,
        None => address_of_default_route().map_err(|source| HostError::Address { source })?,
    };
    let cgroup_root = match &config.kernel.cgroup_root {
        Some(root) => root.clone(),
        None => cgroup::root()?,
    };
    let own_cgroup = cgroup::id(&cgroup::of_process(std::process::id(), &cgroup_root)?)?;
    let (resolvers, search) = resolvers();
    Ok(HostFacts { address, cluster: cluster(config).await, cgroup_root, own_cgroup, resolvers, search })
}

fn address_of_default_route() -> io::Result<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(SOMEWHERE)?;
    Ok(socket.local_addr()?.ip())
}

async fn cluster(config: &Config) -> ClusterName {
    if let Some(cluster) = &config.host.cluster {
        return cluster.clone();
    }
    match ecs_agent::cluster(config.host.ecs_agent).await {
        Ok(cluster) => cluster,
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, cluster = NO_CLUSTER, "the ECS agent does not tell the cluster; set `host.cluster`");
            NO_CLUSTER.parse().expect("a valid cluster name")
        }
    }
}

fn resolvers() -> (Vec<SocketAddr>, Vec<String>) {
    let parsed = fs::read("/etc/resolv.conf").ok().and_then(|text| resolv_conf::Config::parse(text).ok());
    let Some(parsed) = parsed else { return Default::default() };
    let servers = parsed.nameservers.iter().map(|server| SocketAddr::new(server.into(), 53)).collect();
    (servers, parsed.get_last_search_or_domain().cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_from_where_services_are_learnt() {
        let text = "[identity]\ntrust_domain = \"t\"\nca_bundle = \"/x\"\njoin_token_file = \"/x\"\n\
                    [discovery.cloud_map]\nnamespaces = [\"My.demo\", \"other.demo\", \"a/name\"]\n\
                    [discovery.ecs]\nclusters = [\"Demo\", \"Far_one\"]\n";
        let config = mesh_core::config::parse(text).expect("parses");
        let named = name_after_all(config, &"Demo".parse().expect("valid"));
        assert_eq!(named.dns.suffixes, ["mesh", "service.consul", "demo", "my.demo"]);
        let expected = [("far_one", "far_one"), ("other.demo", "other-demo")];
        assert_eq!(named.dns.datacenters, expected.map(|(suffix, label)| (suffix.to_owned(), label.to_owned())));
    }
}
