//! Which implementation of AES-GCM protects records on this CPU.
//!
//! Both libraries have code for one instruction set that the other lacks. On CPUs with the wide AES and carry-less
//! multiplication instructions for 256-bit registers but without AVX-512 (AMD Zen 3), *ring* opens and seals two to
//! three times as fast as AWS-LC, which uses these instructions with AVX-512 only. Everywhere else AWS-LC is the faster.
//!
//! Must not know certificates or connections. Key exchange and signatures are AWS-LC's on every CPU.

use rustls::{
    SupportedCipherSuite,
    crypto::{aws_lc_rs, ring},
};

/// The cipher suites of TLS 1.3 that are offered and accepted (RFC 8446, section B.4), the preferred first.
pub(super) fn fastest() -> Vec<SupportedCipherSuite> {
    suites(only_ring_is_wide())
}

fn suites(ring: bool) -> Vec<SupportedCipherSuite> {
    if ring {
        vec![ring::cipher_suite::TLS13_AES_128_GCM_SHA256, ring::cipher_suite::TLS13_AES_256_GCM_SHA384]
    } else {
        vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256, aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384]
    }
}

/// Whether this CPU has what *ring*'s wide code needs, and not what AWS-LC's needs.
#[cfg(target_arch = "x86_64")]
fn only_ring_is_wide() -> bool {
    let wide =
        is_x86_feature_detected!("vaes") && is_x86_feature_detected!("vpclmulqdq") && is_x86_feature_detected!("avx2");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    wide && !avx512
}

#[cfg(not(target_arch = "x86_64"))]
fn only_ring_is_wide() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use rustls::CipherSuite;

    use super::*;

    #[test]
    fn the_suites_are_the_same_whoever_implements_them() {
        for suites in [suites(false), suites(true), fastest()] {
            let names: Vec<_> = suites.iter().map(SupportedCipherSuite::suite).collect();
            assert_eq!(names, [CipherSuite::TLS13_AES_128_GCM_SHA256, CipherSuite::TLS13_AES_256_GCM_SHA384]);
        }
        for (one, other) in suites(false).iter().zip(&suites(true)) {
            assert!(!std::ptr::eq(one.tls13().unwrap(), other.tls13().unwrap()), "another implementation");
        }
    }
}
