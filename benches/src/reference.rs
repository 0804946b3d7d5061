//! Figures of another machine, for what is not installed here. Every use of them says so.
//!
//! A machine of two CPUs of the same kind, same work, same topology. Only ratios to that machine's own `direct` are of
//! use; absolute values are not comparable.

use crate::load::Work;

/// One figure of that machine.
#[derive(Clone, Copy, Debug)]
pub struct Reference {
    pub name: &'static str,
    pub work: Work,
    /// Per second, lowest and highest that was seen; bytes for bulk.
    pub rate: (f64, f64),
}

const fn of(name: &'static str, work: Work, low: f64, high: f64) -> Reference {
    Reference { name, work, rate: (low, high) }
}

/// Rates.
pub const RATES: [Reference; 22] = [
    of("direct", Work::Http, 160e3, 160e3),
    of("ztunnel", Work::Http, 52e3, 52e3),
    of("nginx-tcp", Work::Http, 50e3, 50e3),
    of("haproxy-tcp", Work::Http, 49e3, 49e3),
    of("envoy-tcp", Work::Http, 41e3, 41e3),
    of("nginx", Work::Http, 38e3, 38e3),
    of("haproxy", Work::Http, 27e3, 34e3),
    of("linkerd2-proxy", Work::Http, 19e3, 19e3),
    of("envoy", Work::Http, 16e3, 16e3),
    of("direct", Work::Large, 500.0, 735.0),
    of("envoy-tcp", Work::Large, 98.0, 165.0),
    of("ztunnel", Work::Large, 92.0, 125.0),
    of("direct", Work::Fresh, 38e3, 38e3),
    of("nginx", Work::Fresh, 16e3, 16e3),
    of("ztunnel", Work::Fresh, 7.2e3, 7.8e3),
    of("direct", Work::Grpc, 55e3, 66e3),
    of("ztunnel", Work::Grpc, 36e3, 38e3),
    of("haproxy", Work::Grpc, 23e3, 26e3),
    of("direct", Work::Bulk, 5.0e9, 5.25e9),
    of("envoy-tcp", Work::Bulk, 1.25e9, 1.425e9),
    of("nginx-tcp", Work::Bulk, 1.125e9, 1.125e9),
    of("ztunnel", Work::Bulk, 0.95e9, 0.95e9),
];

/// CPU time of both proxies for a request of the HTTP/1.1 work, in microseconds.
pub const CPU: [(&str, f64, f64); 5] = [
    ("ztunnel", 23.0, 23.0),
    ("nginx", 36.0, 36.0),
    ("haproxy", 42.0, 54.0),
    ("linkerd2-proxy", 79.0, 115.0),
    ("envoy", 105.0, 150.0),
];

/// p50 and p99 at 2,000 requests per second, in microseconds.
pub const TIMES: [(&str, f64, f64); 3] = [("direct", 104.0, 310.0), ("ztunnel", 266.0, 690.0), ("nginx", 270.0, 590.0)];

/// A subject's rate there as a share of that machine's `direct`.
#[must_use]
pub fn of_direct(name: &str, work: Work) -> Option<f64> {
    let middle = |name: &str| {
        let found = RATES.iter().find(|each| each.name == name && each.work == work)?;
        Some(f64::midpoint(found.rate.0, found.rate.1))
    };
    Some(middle(name)? / middle("direct")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_same_machine() {
        assert_eq!(of_direct("ztunnel", Work::Fresh), Some(7.5e3 / 38e3));
        assert_eq!(of_direct("ztunnel", Work::Connect), None);
        assert_eq!(of_direct("nobody", Work::Http), None);
    }
}
