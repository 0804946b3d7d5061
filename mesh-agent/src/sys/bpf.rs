//! Loads, attaches, pins and removes the kernel programs.
//!
//! Programs and maps are pinned, so that they outlive the agent: with it dead, the hooks go on by themselves. A
//! restarted agent adopts the maps of the same ABI version and swaps its programs in through the pinned links, so
//! that there is no moment without them; anything else that it finds pinned is removed first. Knows nothing of what
//! the programs decide.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, Map, MapData, MapError},
    programs::{
        CgroupAttachMode, CgroupSockAddr, ProgramError, SockOps,
        links::{FdLink, LinkError},
    },
};
use mesh_common::maps::{Knobs, SocketLayout};

use super::{
    btf,
    maps::{Maps, Readers},
    raw,
};

/// The object that `cargo xtask build-ebpf` made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("MESH_EBPF_OBJECT"));

const MAPS: [&str; 14] = [
    "KNOBS",
    "HEARTBEAT",
    "NAMESPACES",
    "CGROUPS",
    "SERVICES",
    "ENDPOINTS",
    "GRANTS",
    "FLOWS",
    "QUERIES",
    "COUNTERS",
    "EVENTS",
    "ORIGINALS",
    "DIRECTS",
    "CLOSES",
];

/// In the order in which they are attached: what restores addresses comes before what rewrites them.
const SOCK_ADDR: [&str; 8] = [
    "mesh_getpeername4",
    "mesh_getpeername6",
    "mesh_recvmsg4",
    "mesh_recvmsg6",
    "mesh_sendmsg4",
    "mesh_sendmsg6",
    "mesh_connect4",
    "mesh_connect6",
];
const SOCK_OPS: &str = "mesh_sock_ops";
/// A constant of the programs: a [`SocketLayout`].
const SOCKET_LAYOUT: &str = "SOCKET_LAYOUT";

/// Loading or attaching failed. Nothing new is attached then.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    #[error(
        "cannot use {path} for pinned programs: it must be on a BPF filesystem (`mount -t bpf bpf /sys/fs/bpf`) and \
         writable"
    )]
    PinDir { path: PathBuf, source: io::Error },
    #[error("the kernel does not load the programs: Linux 6.1 or newer with CAP_BPF and CAP_NET_ADMIN is needed")]
    Load(#[source] Box<EbpfError>),
    #[error("the kernel's verifier refuses program {name}")]
    Verify { name: &'static str, source: Box<ProgramError> },
    #[error("the embedded object has no program {name}: rebuild with `cargo xtask build-ebpf`")]
    NoProgram { name: &'static str },
    #[error("the embedded object has no map {name}: rebuild with `cargo xtask build-ebpf`")]
    NoMap { name: &'static str },
    #[error("map {name} has another layout than the agent's: rebuild with `cargo xtask build-ebpf`")]
    MapLayout { name: &'static str, source: MapError },
    #[error("cannot share map {name}: out of file descriptors?")]
    Descriptor { name: &'static str, source: io::Error },
    #[error("cannot take over the kernel maps that an earlier agent left: remove its pins with `mesh-agent cleanup`")]
    Adopt(#[source] MapError),
    #[error("cannot open cgroup {path}")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cannot attach {name} to cgroup {path}")]
    Attach { name: &'static str, path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
}

/// The loaded programs. Once attached, dropping it leaves everything pinned in place; before that, what was pinned by
/// this value goes. [`Programs::remove`] removes everything.
pub struct Programs {
    ebpf: Ebpf,
    pins: Pins,
    cgroup: PathBuf,
    /// Whether the maps were another agent's before.
    pub adopted: bool,
    /// Whether they tell what applications leave unread.
    pub knows_unread: bool,
    attached: bool,
}

/// The directory of pinned maps and links.
#[derive(Clone, Debug)]
pub struct Pins(PathBuf);

impl Pins {
    /// `dir` need not exist yet; its parent must be on a BPF filesystem.
    pub fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    fn maps(&self) -> PathBuf {
        self.0.join("maps")
    }

    fn link(&self, program: &str) -> PathBuf {
        self.0.join("links").join(program)
    }

    /// Whether maps of this ABI version are pinned here.
    fn usable(&self) -> bool {
        let knobs = || -> Option<Knobs> {
            let map = Map::from_map_data(MapData::from_pin(self.maps().join("KNOBS")).ok()?).ok()?;
            Array::<_, Knobs>::try_from(map).ok()?.get(&0, 0).ok()
        };
        let links = SOCK_ADDR.iter().chain([&SOCK_OPS]).all(|name| self.link(name).exists());
        links && knobs().is_some_and(|knobs| knobs.abi == mesh_common::ABI_VERSION)
    }

    /// Detaches every program and removes every pin: with the last one a map is freed. Nothing there is no error.
    ///
    /// # Errors
    /// A file or directory cannot be removed.
    pub fn remove(&self) -> Result<(), BpfError> {
        // What rewrites addresses goes before what restores them.
        for name in std::iter::once(&SOCK_OPS).chain(&SOCK_ADDR).rev() {
            // One that cannot be opened or detached is detached with its pin, only later.
            let detached = raw::open_pin(&self.link(name)).and_then(|link| raw::detach_link(&link));
            if let Err(error) = detached
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::debug!(error = &error as &dyn std::error::Error, name, "a link is not detached at once");
            }
        }
        for dir in [self.0.join("links"), self.maps(), self.0.clone()] {
            let failed = |source| BpfError::PinDir { path: dir.clone(), source };
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            for entry in entries {
                fs::remove_file(entry.map_err(failed)?.path()).map_err(failed)?;
            }
            fs::remove_dir(&dir).map_err(failed)?;
        }
        Ok(())
    }
}

impl Programs {
    /// Loads the embedded object and verifies every program. Attaches nothing.
    ///
    /// # Errors
    /// See [`BpfError`]; the verifier's log is in the source.
    pub fn load(pins: Pins, cgroup: PathBuf) -> Result<(Self, Maps, Readers), BpfError> {
        Self::load_sized(pins, cgroup, &[])
    }

    /// The same with other capacities than `mesh_common::maps` names, by map; of maps that are made anew.
    ///
    /// # Errors
    /// As [`Programs::load`].
    pub fn load_sized(pins: Pins, cgroup: PathBuf, sizes: &[(&str, u32)]) -> Result<(Self, Maps, Readers), BpfError> {
        let without = |why: &(dyn std::error::Error + 'static)| {
            tracing::warn!(error = why, "what an application leaves unread is not known: {}", btf::WITHOUT);
            Self::load_with(&pins, &cgroup, sizes, SocketLayout::default())
        };
        match btf::socket_layout() {
            Ok(layout) => match Self::load_with(&pins, &cgroup, sizes, layout) {
                Err(refused @ BpfError::Verify { name: SOCK_OPS, .. }) => without(&refused),
                loaded => loaded,
            },
            Err(unknown) => without(&unknown),
        }
    }

    /// The same with programs that know the kernel's `layout`, or nothing of it.
    ///
    /// # Errors
    /// As [`Programs::load`]; the verifier refuses a layout that is not this kernel's.
    pub fn load_with(
        pins: &Pins,
        cgroup: &Path,
        sizes: &[(&str, u32)],
        layout: SocketLayout,
    ) -> Result<(Self, Maps, Readers), BpfError> {
        let adopted = pins.usable();
        if !adopted {
            pins.remove()?;
        }
        let maps = pins.maps();
        for dir in [maps.clone(), pins.0.join("links")] {
            fs::create_dir_all(&dir).map_err(|source| BpfError::PinDir { path: dir.clone(), source })?;
        }
        let mut loader = EbpfLoader::new();
        // The programs have no relocations by the kernel's BTF, which, once read, takes more memory than everything else here
        // together. The one structure whose layout they need is looked up without it.
        loader.btf(None).override_global(SOCKET_LAYOUT, &layout, true);
        for name in MAPS {
            loader.map_pin_path(name, maps.join(name));
        }
        for (name, entries) in sizes {
            loader.map_max_entries(name, *entries);
        }
        let mut ebpf = loader.load(OBJECT).map_err(|source| BpfError::Load(Box::new(source)))?;
        for name in SOCK_ADDR {
            let program = sock_addr(&mut ebpf, name)?;
            program.load().map_err(|source| BpfError::Verify { name, source: Box::new(source) })?;
        }
        let program = sock_ops(&mut ebpf)?;
        program.load().map_err(|source| BpfError::Verify { name: SOCK_OPS, source: Box::new(source) })?;
        let (maps, readers) = Maps::take(&mut ebpf)?;
        let (pins, cgroup, knows_unread) = (pins.clone(), cgroup.to_path_buf(), layout != SocketLayout::default());
        Ok((Self { ebpf, pins, cgroup, adopted, knows_unread, attached: false }, maps, readers))
    }

    /// Attaches every program to the cgroup, or puts it in the place of its predecessor.
    ///
    /// # Errors
    /// The cgroup cannot be opened or the kernel refuses. What is attached stays; call [`Programs::remove`].
    pub fn attach(&mut self) -> Result<(), BpfError> {
        self.attached = true;
        let path = self.cgroup.clone();
        let cgroup = File::open(&path).map_err(|source| BpfError::Cgroup { path: path.clone(), source })?;
        for name in SOCK_ADDR {
            let pin = self.pins.link(name);
            let program = sock_addr(&mut self.ebpf, name)?;
            let attached = if pin.exists() {
                program.fd().map_err(Into::into).and_then(|fd| swap(&pin, &fd.as_fd()))
            } else {
                attach_sock_addr(program, &cgroup, &pin)
            };
            attached.map_err(|source| BpfError::Attach { name, path: path.clone(), source })?;
        }
        let pin = self.pins.link(SOCK_OPS);
        let program = sock_ops(&mut self.ebpf)?;
        let attached = if pin.exists() {
            program.fd().map_err(Into::into).and_then(|fd| swap(&pin, &fd.as_fd()))
        } else {
            attach_sock_ops(program, &cgroup, &pin)
        };
        attached.map_err(|source| BpfError::Attach { name: SOCK_OPS, path, source })
    }

    /// Detaches and frees everything.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn remove(self) -> Result<(), BpfError> {
        self.pins.remove()
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        if self.attached || self.adopted {
            return;
        }
        if let Err(error) = self.pins.remove() {
            tracing::warn!(error = &error as &dyn std::error::Error, "pins of an unfinished start are left");
        }
    }
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn swap(pin: &Path, program: &impl std::os::fd::AsFd) -> Result<(), AnyError> {
    raw::update_link(&raw::open_pin(pin)?, program)?;
    Ok(())
}

fn attach_sock_addr(program: &mut CgroupSockAddr, cgroup: &File, pin: &Path) -> Result<(), AnyError> {
    let id = program.attach(cgroup, CgroupAttachMode::Single)?;
    keep(program.take_link(id)?.try_into(), pin)
}

fn attach_sock_ops(program: &mut SockOps, cgroup: &File, pin: &Path) -> Result<(), AnyError> {
    let id = program.attach(cgroup, CgroupAttachMode::Single)?;
    keep(program.take_link(id)?.try_into(), pin)
}

/// Pins a link, so that it outlives this process.
fn keep(link: Result<FdLink, LinkError>, pin: &Path) -> Result<(), AnyError> {
    link?.pin(pin)?;
    Ok(())
}

fn sock_addr<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut CgroupSockAddr, BpfError> {
    let program = ebpf.program_mut(name).ok_or(BpfError::NoProgram { name })?;
    program.try_into().map_err(|_other_type: ProgramError| BpfError::NoProgram { name })
}

fn sock_ops(ebpf: &mut Ebpf) -> Result<&mut SockOps, BpfError> {
    let program = ebpf.program_mut(SOCK_OPS).ok_or(BpfError::NoProgram { name: SOCK_OPS })?;
    program.try_into().map_err(|_other_type: ProgramError| BpfError::NoProgram { name: SOCK_OPS })
}
