//! Typed handles to the kernel maps: apply the writes that `mesh_core::dataplane` ordered, read back, count.
//!
//! Knows layouts; knows nothing of why an entry is there.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf},
};
use mesh_common::{
    addr::Addr,
    maps::{Close, CloseKey, Endpoint, EndpointKey, FlowKey, GrantKey, Knobs, Namespace, Original, Service, counter},
};
use mesh_core::dataplane::{Image, Write};

use super::{bpf::BpfError, closes::Closes, flows::Flows, raw};

/// A write to a kernel map failed. The kernel then holds the image of the writes before it.
#[derive(Debug, thiserror::Error)]
#[error("cannot write kernel map {map}: it may be full; connections that need the entry are refused and counted")]
pub struct WriteError {
    pub map: &'static str,
    pub source: MapError,
}

/// Everything the agent writes for the hooks to read. One owner.
pub struct Maps {
    knobs: Array<MapData, Knobs>,
    namespaces: HashMap<MapData, u64, Namespace>,
    cgroups: HashMap<MapData, u64, u32>,
    services: HashMap<MapData, Addr, Service>,
    endpoints: HashMap<MapData, EndpointKey, Endpoint>,
    grants: HashMap<MapData, GrantKey, u32>,
    flows: HashMap<MapData, FlowKey, Original>,
}

/// Whom the hooks intercept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enrolled {
    /// By cookie.
    pub namespaces: BTreeMap<u64, Namespace>,
    /// By id: the workload's number.
    pub cgroups: BTreeMap<u64, u32>,
}

/// What the agent reads, and the sign of life that it gives; for other owners than [`Maps`].
pub struct Readers {
    pub flows: Flows,
    pub closes: Closes,
    pub counters: Counters,
    pub events: RingBuf<MapData>,
    pub pulse: Pulse,
    pub heart: Heart,
}

/// Reads the heartbeat as the hooks do.
pub struct Heart(Array<MapData, u64>);

/// What the hooks counted since the maps were made.
pub struct Counters(PerCpuArray<MapData, u64>);

/// Writes the heartbeat that the hooks look at.
pub struct Pulse(Array<MapData, u64>);

impl Maps {
    /// Takes all maps out of a loaded object.
    ///
    /// # Errors
    /// The object is not ours: a map is missing or has another layout.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<(Self, Readers), BpfError> {
        let maps = Self {
            knobs: typed("KNOBS", ebpf)?,
            namespaces: typed("NAMESPACES", ebpf)?,
            cgroups: typed("CGROUPS", ebpf)?,
            services: typed("SERVICES", ebpf)?,
            endpoints: typed("ENDPOINTS", ebpf)?,
            grants: typed("GRANTS", ebpf)?,
            flows: second_flows(ebpf).map_err(|source| BpfError::MapLayout { name: "FLOWS", source })?,
        };
        let heart = ebpf.map("HEARTBEAT").ok_or(BpfError::NoMap { name: "HEARTBEAT" })?;
        let heart = second_handle(heart).map_err(|source| BpfError::MapLayout { name: "HEARTBEAT", source })?;
        let readers = Readers {
            flows: Flows::new(
                descriptor::<FlowKey, Original>("FLOWS", ebpf)?,
                descriptor::<FlowKey, Original>("QUERIES", ebpf)?,
            ),
            closes: Closes::new(descriptor::<CloseKey, Close>("CLOSES", ebpf)?),
            counters: Counters(typed("COUNTERS", ebpf)?),
            events: typed("EVENTS", ebpf)?,
            pulse: Pulse(typed("HEARTBEAT", ebpf)?),
            heart: Heart(heart),
        };
        Ok((maps, readers))
    }

    /// Tells the hooks what they must know before anything is intercepted.
    ///
    /// # Errors
    /// The kernel refuses the write.
    pub fn set_knobs(&mut self, knobs: &Knobs) -> Result<(), WriteError> {
        self.knobs.set(0, knobs, 0).map_err(failed("KNOBS"))
    }

    /// Carries out writes in their order, and the rest also when one fails: removals come last, and it is they who make
    /// room. Until then the hooks refuse what misses an entry.
    ///
    /// # Errors
    /// A map is full; the first write that failed.
    pub fn apply(&mut self, writes: &[Write]) -> Result<(), WriteError> {
        let mut first = Ok(());
        for write in writes {
            let written = match write {
                Write::PutEndpoint(key, value) => self.endpoints.insert(key, value, 0).map_err(failed("ENDPOINTS")),
                Write::PutGrant(key) => self.grants.insert(key, 1, 0).map_err(failed("GRANTS")),
                Write::PutService(key, value) => self.services.insert(key, value, 0).map_err(failed("SERVICES")),
                Write::RemoveService(key) => absent_is_fine(self.services.remove(key)).map_err(failed("SERVICES")),
                Write::RemoveGrant(key) => absent_is_fine(self.grants.remove(key)).map_err(failed("GRANTS")),
                Write::RemoveEndpoint(key) => absent_is_fine(self.endpoints.remove(key)).map_err(failed("ENDPOINTS")),
            };
            first = first.and(written);
        }
        first
    }

    /// What the kernel holds now: after a restart, what the agent before this one had written.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn image(&self) -> Result<Image, MapError> {
        Ok(Image {
            services: self.services.iter().collect::<Result<_, _>>()?,
            endpoints: self.endpoints.iter().collect::<Result<_, _>>()?,
            grants: self.grants.iter().collect::<Result<_, _>>()?,
        })
    }

    /// Enrols the namespace with this cookie.
    ///
    /// # Errors
    /// The map is full: nothing of that namespace is intercepted.
    pub fn put_namespace(&mut self, cookie: u64, namespace: Namespace) -> Result<(), WriteError> {
        self.namespaces.insert(cookie, namespace, 0).map_err(failed("NAMESPACES"))
    }

    /// From now on nothing of this namespace is intercepted.
    ///
    /// # Errors
    /// The kernel refuses; a missing entry is no error.
    pub fn remove_namespace(&mut self, cookie: u64) -> Result<(), WriteError> {
        absent_is_fine(self.namespaces.remove(&cookie)).map_err(failed("NAMESPACES"))
    }

    /// Forgets connections of this namespace, or of all, that nobody will accept any more.
    ///
    /// # Errors
    /// The map cannot be read or written.
    pub fn forget_flows(&mut self, cookie: Option<u64>) -> Result<(), WriteError> {
        let of = |key: &FlowKey| cookie.is_none_or(|cookie| key.netns == cookie);
        // A key that fails to be read is one that has just gone.
        let stale: Vec<FlowKey> = self.flows.keys().filter_map(Result::ok).filter(of).collect();
        stale.iter().try_for_each(|key| absent_is_fine(self.flows.remove(key)).map_err(failed("FLOWS")))
    }

    /// Enrols a host-mode container's cgroup.
    ///
    /// # Errors
    /// The map is full: nothing of that cgroup is intercepted.
    pub fn put_cgroup(&mut self, id: u64, workload: u32) -> Result<(), WriteError> {
        self.cgroups.insert(id, workload, 0).map_err(failed("CGROUPS"))
    }

    /// From now on nothing of this cgroup is intercepted.
    ///
    /// # Errors
    /// The kernel refuses; a missing entry is no error.
    pub fn remove_cgroup(&mut self, id: u64) -> Result<(), WriteError> {
        absent_is_fine(self.cgroups.remove(&id)).map_err(failed("CGROUPS"))
    }

    /// All enrolled namespaces by cookie, and all enrolled cgroups by id with their workload.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn enrolled(&self) -> Result<Enrolled, MapError> {
        Ok(Enrolled {
            namespaces: self.namespaces.iter().collect::<Result<_, _>>()?,
            cgroups: self.cgroups.iter().collect::<Result<_, _>>()?,
        })
    }
}

impl Counters {
    /// Sums over all CPUs, indexed as `mesh_common::maps::counter` says.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn read(&self) -> Result<[u64; counter::COUNT as usize], MapError> {
        let mut sums = [0; counter::COUNT as usize];
        for (index, sum) in (0u32..).zip(sums.iter_mut()) {
            *sum = self.0.get(&index, 0)?.iter().sum();
        }
        Ok(sums)
    }
}

impl Heart {
    /// How long ago the last heartbeat was; `None` before the first.
    pub fn age(&self) -> Option<Duration> {
        let beat = self.0.get(&0, 0).ok().filter(|beat| *beat > 0)?;
        Some(Duration::from_nanos(raw::monotonic_ns().saturating_sub(beat)))
    }
}

impl Pulse {
    /// Says that the agent is alive now.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn beat(&mut self) -> Result<(), MapError> {
        self.0.set(0, raw::monotonic_ns(), 0)
    }
}

fn typed<T: TryFrom<Map, Error = MapError>>(name: &'static str, ebpf: &mut Ebpf) -> Result<T, BpfError> {
    let map = ebpf.take_map(name).ok_or(BpfError::NoMap { name })?;
    T::try_from(map).map_err(|source| BpfError::MapLayout { name, source })
}

/// A handle to a map with these keys and values.
fn descriptor<K: Pod, V: Pod>(name: &'static str, ebpf: &Ebpf) -> Result<Arc<OwnedFd>, BpfError> {
    let map = ebpf.map(name).ok_or(BpfError::NoMap { name })?;
    HashMap::<_, K, V>::try_from(map).map_err(|source| BpfError::MapLayout { name, source })?;
    let (Map::HashMap(data) | Map::LruHashMap(data)) = map else { return Err(BpfError::NoMap { name }) };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(|source| BpfError::Descriptor { name, source })?;
    Ok(Arc::new(fd))
}

/// Another handle to a map that has an owner.
fn second_handle(map: &Map) -> Result<Array<MapData, u64>, MapError> {
    let Map::Array(data) = map else { return Err(MapError::InvalidMapType { map_type: 0 }) };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(MapError::IoError)?;
    Array::try_from(Map::from_map_data(MapData::from_fd(fd)?)?)
}

/// Another handle to the map of connections, of which [`Flows`] has the first.
fn second_flows(ebpf: &Ebpf) -> Result<HashMap<MapData, FlowKey, Original>, MapError> {
    let Some(Map::HashMap(data)) = ebpf.map("FLOWS") else { return Err(MapError::InvalidMapType { map_type: 0 }) };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(MapError::IoError)?;
    HashMap::try_from(Map::from_map_data(MapData::from_fd(fd)?)?)
}

fn failed(map: &'static str) -> impl Fn(MapError) -> WriteError {
    move |source| WriteError { map, source }
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
