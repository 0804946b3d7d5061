//! What an address *is*: types that keep an original destination from being taken for a peer.
//!
//! Must not know the kernel's representation (that is `mesh-common`) nor who owns a socket.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// The destination that an application named in `connect()`, before the hook rewrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OrigDst(pub SocketAddr);

/// The host-local virtual addresses of a service, one per family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vip {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

/// The one form in which addresses are compared: IPv4 held as `::ffff:a.b.c.d` becomes plain IPv4, scope and flow
/// label are dropped.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_become_plain_ones() {
        for (given, expected) in [
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[fe80::1%3]:80", "[fe80::1]:80"),
        ] {
            assert_eq!(canonical(given.parse().expect("a literal")).to_string(), expected);
        }
    }
}
