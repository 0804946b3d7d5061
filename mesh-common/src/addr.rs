//! Socket addresses as both sides of the kernel store them: network byte order, IPv4 held as `::ffff:a.b.c.d`.
//!
//! One form means one code path and one key for an IPv4 address, a v4-mapped IPv6 address and what an IPv6 socket
//! that carries IPv4 shows. Must not know what an address is used for.

/// An IPv6 address, or an IPv4 address in its v4-mapped form (RFC 4291 §2.5.5.2); network byte order.
///
/// Aligned so that the kernel programs move it by words and not by bytes.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ip(pub [u8; 16]);

impl Ip {
    /// The v4-mapped form of four octets in network order.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// The four octets, if this is an IPv4 address.
    #[inline(always)]
    pub const fn as_v4(&self) -> Option<[u8; 4]> {
        match self.0 {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }
}

impl From<core::net::IpAddr> for Ip {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => Self::v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Self(v6.octets()),
        }
    }
}

impl From<Ip> for core::net::IpAddr {
    fn from(ip: Ip) -> Self {
        match ip.as_v4() {
            Some(octets) => Self::V4(octets.into()),
            None => Self::V6(ip.0.into()),
        }
    }
}

/// An address and a TCP or UDP port, both in network order. 20 bytes, no padding, fit to be a map key.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr {
    pub ip: Ip,
    /// Network byte order.
    pub port: [u8; 2],
    /// Always zero: a key is compared byte by byte.
    pub zero: [u8; 2],
}

impl Addr {
    /// `port` in host order.
    #[inline(always)]
    pub const fn new(ip: Ip, port: u16) -> Self {
        Self { ip, port: port.to_be_bytes(), zero: [0; 2] }
    }

    /// The port in host order.
    #[inline(always)]
    pub const fn port(&self) -> u16 {
        u16::from_be_bytes(self.port)
    }
}

impl From<core::net::SocketAddr> for Addr {
    fn from(addr: core::net::SocketAddr) -> Self {
        Self::new(addr.ip().into(), addr.port())
    }
}

impl From<Addr> for core::net::SocketAddr {
    fn from(addr: Addr) -> Self {
        Self::new(addr.ip.into(), addr.port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::SocketAddr;

    #[test]
    fn addresses_survive_the_round_trip() {
        for text in ["10.0.0.1:80", "[fd00::1]:65535", "0.0.0.0:0", "[::1]:53"] {
            let addr: SocketAddr = text.parse().expect("a literal");
            assert_eq!(SocketAddr::from(Addr::from(addr)), addr);
        }
    }

    #[test]
    fn a_mapped_address_is_its_ipv4_address() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().expect("a literal");
        let plain: SocketAddr = "10.0.0.1:80".parse().expect("a literal");
        assert_eq!(Addr::from(mapped), Addr::from(plain));
    }
}
