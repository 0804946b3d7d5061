//! Every map of the programs. Layouts and capacities come from `mesh_common::maps`.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use mesh_common::{
    addr::Addr,
    maps::{
        Close, CloseKey, Direct, EVENTS_BYTES, Endpoint, EndpointKey, FlowKey, GrantKey, Heartbeat, Knobs, MAX_CGROUPS,
        MAX_CLOSES, MAX_DIRECTS, MAX_ENDPOINTS, MAX_FLOWS, MAX_GRANTS, MAX_NAMESPACES, MAX_SERVICES, Namespace,
        Original, Service, counter,
    },
};

#[map]
pub static KNOBS: Array<Knobs> = Array::with_max_entries(1, 0);
#[map]
pub static HEARTBEAT: Array<Heartbeat> = Array::with_max_entries(1, 0);
#[map]
pub static NAMESPACES: HashMap<u64, Namespace> = HashMap::with_max_entries(MAX_NAMESPACES, BPF_F_NO_PREALLOC);
#[map]
pub static CGROUPS: HashMap<u64, u32> = HashMap::with_max_entries(MAX_CGROUPS, BPF_F_NO_PREALLOC);
#[map]
pub static SERVICES: HashMap<Addr, Service> = HashMap::with_max_entries(MAX_SERVICES, BPF_F_NO_PREALLOC);
#[map]
pub static ENDPOINTS: HashMap<EndpointKey, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);
#[map]
pub static GRANTS: HashMap<GrantKey, u32> = HashMap::with_max_entries(MAX_GRANTS, BPF_F_NO_PREALLOC);
/// Written at the SYN, removed by the agent at accept, or here when the connection breaks before that. What is left when
/// a listener is closed, the agent removes.
#[map]
pub static FLOWS: HashMap<FlowKey, Original> = HashMap::with_max_entries(MAX_FLOWS, BPF_F_NO_PREALLOC);
/// The last question of each UDP socket. Least recently used goes first: a lost entry costs one forwarded query.
#[map]
pub static QUERIES: LruHashMap<FlowKey, Original> = LruHashMap::with_max_entries(MAX_FLOWS, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES, 0);
/// See `directs`.
#[map]
pub static DIRECTS: Array<Direct> = Array::with_max_entries(MAX_DIRECTS, 0);
/// What applications have closed unread. Least recently used goes first: a lost entry costs a request that could have been
/// sent again.
#[map]
pub static CLOSES: LruHashMap<CloseKey, Close> = LruHashMap::with_max_entries(MAX_CLOSES, 0);
#[btf_map]
pub static ORIGINALS: SkStorage<Original> = SkStorage::new();
