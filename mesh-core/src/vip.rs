//! Stable virtual addresses: hash of the name first, probing on collision; an assignment once made is kept.
//!
//! Must not know where the table is stored.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::{addr::Vip, id::ServiceName};

/// Which service has which address. Serialised by the agent as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VipTable(pub BTreeMap<ServiceName, Vip>);

impl VipTable {
    /// Adds addresses for names that have none; keeps all others, also of names that are gone, while the range lasts.
    /// A name for which the range has no room is missing from the table.
    ///
    /// The host part is the FNV-1a hash of the name, or the next free one after it: hosts that never talked to each
    /// other mostly agree. The first and the last address of the range are never given (network and broadcast, in
    /// case that the range is routed). Entries outside of the range, after it was configured anew, are replaced.
    pub fn assign<'a>(&mut self, names: impl Iterator<Item = &'a ServiceName>, v4: Ipv4Net, v6: Ipv6Net) {
        let wanted: BTreeSet<&ServiceName> = names.collect();
        let size = 1_u64 << (32 - u32::from(v4.prefix_len()));
        let Some(last) = size.checked_sub(2).filter(|last| *last > 0) else {
            self.0.clear();
            return;
        };
        let mut used: HashMap<u32, ServiceName> = HashMap::with_capacity(self.0.len() + wanted.len());
        self.0.retain(|name, vip| {
            let host = u32::from(vip.v4).wrapping_sub(u32::from(v4.network()));
            let valid =
                (1..=last).contains(&u64::from(host)) && *vip == address(host, v4, v6) && !used.contains_key(&host);
            if valid {
                used.insert(host, name.clone());
            }
            valid
        });
        // Names that are gone, from the end: whoever has to give way is the same on every run.
        let mut gone: Vec<ServiceName> = self.0.keys().filter(|name| !wanted.contains(name)).cloned().collect();
        for name in wanted {
            if self.0.contains_key(name) {
                continue;
            }
            if used.len() as u64 == last {
                let Some(vip) = gone.pop().and_then(|old| self.0.remove(&old)) else { return };
                used.remove(&u32::from(vip.v4).wrapping_sub(u32::from(v4.network())));
            }
            let start = fnv1a(name.as_str()) % last;
            let free = (0..last).map(|step| (start + step) % last + 1).filter_map(|host| u32::try_from(host).ok());
            if let Some(host) = free.into_iter().find(|host| !used.contains_key(host)) {
                used.insert(host, name.clone());
                self.0.insert(name.clone(), address(host, v4, v6));
            }
        }
    }
}

fn address(host: u32, v4: Ipv4Net, v6: Ipv6Net) -> Vip {
    Vip {
        v4: Ipv4Addr::from(u32::from(v4.network()).wrapping_add(host)),
        v6: Ipv6Addr::from(u128::from(v6.network()).wrapping_add(u128::from(host))),
    }
}

/// FNV-1a, 64 bits (draft-eastlake-fnv): small, and the same in every release, unlike the standard library's hashes.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb;
    use proptest::prelude::*;

    fn nets(prefix: u8) -> (Ipv4Net, Ipv6Net) {
        (
            Ipv4Net::new(Ipv4Addr::new(240, 240, 0, 0), prefix).expect("valid"),
            "fd65:6373:6d65:7368::/96".parse().expect("valid"),
        )
    }

    proptest! {
        #[test]
        fn each_has_its_own_and_keeps_it(
            first in prop::collection::btree_set(arb::any_service_name(), 0..30),
            second in prop::collection::btree_set(arb::any_service_name(), 0..30),
            prefix in 24_u8..=30,
        ) {
            let (v4, v6) = nets(prefix);
            let mut table = VipTable::default();
            table.assign(first.iter(), v4, v6);
            let before = table.clone();
            table.assign(second.iter(), v4, v6);
            let room = (1_usize << (32 - prefix)) - 2;
            let v4s: BTreeSet<_> = table.0.values().map(|vip| vip.v4).collect();
            prop_assert_eq!(v4s.len(), table.0.len());
            prop_assert!(table.0.len() <= room);
            for vip in table.0.values() {
                prop_assert!(v4.contains(&vip.v4) && vip.v4 != v4.network() && vip.v4 != v4.broadcast());
                let host = u32::from(vip.v4) - u32::from(v4.network());
                prop_assert_eq!(u128::from(vip.v6) - u128::from(v6.network()), u128::from(host));
            }
            prop_assert_eq!(second.iter().filter(|name| table.0.contains_key(*name)).count(), second.len().min(room));
            let all = first.union(&second).count();
            for (name, vip) in &before.0 {
                if all <= room || second.contains(name) {
                    prop_assert_eq!(table.0.get(name), Some(vip));
                }
            }
            let settled = table.clone();
            table.assign(second.iter(), v4, v6);
            prop_assert_eq!(table, settled);
        }
    }

    #[test]
    fn the_hash_never_changes() {
        // Test vectors of draft-eastlake-fnv.
        assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a("foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn another_range_means_other_addresses() {
        let (v4, v6) = nets(24);
        let name: ServiceName = "world".parse().expect("valid");
        let mut table = VipTable::default();
        table.assign([&name].into_iter(), v4, v6);
        let other: Ipv4Net = "10.1.0.0/16".parse().expect("valid");
        table.assign([&name].into_iter(), other, v6);
        assert!(other.contains(&table.0[&name].v4));
    }
}
