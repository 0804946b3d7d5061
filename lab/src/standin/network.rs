//! The stand-in's bridge: `docker0`, addresses, and published ports by the same rules as Docker's own.
//!
//! It must not know containers' processes beyond the pid whose namespace is joined.

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicU16, Ordering},
};

use anyhow::{Context as _, Result};

use super::record::Record;
use crate::host::Host;

const BRIDGE: &str = "docker0";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);
const LENGTH: u8 = 16;

/// A container's address on the bridge, and its ports with the host ports they are published on.
pub(super) type Joined = (Option<Ipv4Addr>, Vec<(u16, u16)>);

/// Makes the host's bridge and its address translation.
pub(super) fn up(host: &Host) -> Result<()> {
    lines(
        host,
        &[format!("ip link add {BRIDGE} type bridge"), format!("ip addr add {GATEWAY}/{LENGTH} dev {BRIDGE}")],
    )?;
    lines(host, &[format!("ip link set {BRIDGE} up")])?;
    host.run(&["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"])?;
    let out = format!("iptables -t nat -A POSTROUTING -s {GATEWAY}/{LENGTH} ! -o {BRIDGE} -j MASQUERADE");
    lines(host, &[out]).context("this kernel translates no addresses, so bridge mode cannot be shown at all")
}

/// Gives a namespace an interface on the bridge and publishes ports of it; returns its address and the host ports.
pub(super) fn join(host: &Host, pid: u32, ports: &[u16]) -> Result<Joined> {
    static NEXT: AtomicU16 = AtomicU16::new(2);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let [high, low] = number.to_be_bytes();
    let address = Ipv4Addr::new(172, 17, high, low);
    let port = format!("veth{number}");
    lines(
        host,
        &[
            format!("ip link add {port} type veth peer name eth0 netns {pid}"),
            format!("ip link set {port} master {BRIDGE} up"),
            format!("nsenter -t {pid} -n ip link set lo up"),
            format!("nsenter -t {pid} -n ip addr add {address}/{LENGTH} dev eth0"),
            format!("nsenter -t {pid} -n ip link set eth0 up"),
            format!("nsenter -t {pid} -n ip route add default via {GATEWAY}"),
        ],
    )?;
    let mut published = Vec::new();
    for (&container, index) in ports.iter().zip(0_u16..) {
        // Docker takes them from the ephemeral range, upwards; sixteen per container are enough here.
        let outside = 32_768 + number * 16 + index;
        rules("-A", address, container, outside).into_iter().try_for_each(|line| lines(host, &[line]))?;
        published.push((container, outside));
    }
    Ok((Some(address), published))
}

/// Takes the rules of an ended container back. Its interface went with its namespace.
pub(super) fn leave(host: &Host, record: &Record) {
    let Some(address) = record.address else { return };
    for &(container, outside) in &record.published {
        for line in rules("-D", address, container, outside) {
            // A rule that is not there needs no removing.
            lines(host, &[line]).ok();
        }
    }
}

fn rules(verb: &str, address: Ipv4Addr, container: u16, outside: u16) -> Vec<String> {
    ["PREROUTING", "OUTPUT"]
        .iter()
        .map(|chain| {
            format!(
                "iptables -t nat {verb} {chain} -p tcp -m addrtype --dst-type LOCAL --dport {outside} -j DNAT --to-destination {address}:{container}"
            )
        })
        .collect()
}

fn lines(host: &Host, lines: &[String]) -> Result<()> {
    lines.iter().try_for_each(|line| host.run(&line.split(' ').collect::<Vec<_>>()).map(drop))
}
