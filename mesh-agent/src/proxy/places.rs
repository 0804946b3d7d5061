//! Where sockets to local tasks are made: in the task's own network namespace, or in the host's.
//!
//! Filled by who arms namespaces, read by the proxy. Must not know what the sockets are for.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    sync::{Arc, PoisonError, RwLock},
};

use mesh_core::id::TaskId;
use tokio::sync::watch;

use crate::sys::{
    closes::{Closes, Watched},
    netns::Netns,
    socket,
};

/// The network namespace of a task.
#[derive(Clone, Debug)]
pub enum Home {
    /// Its own.
    Netns(Arc<Netns>),
    /// The host's: a task in host network mode.
    Host,
}

/// The namespaces of local tasks.
#[derive(Debug)]
pub struct Namespaces {
    homes: RwLock<HashMap<TaskId, Entry>>,
    marked: bool,
    /// Where the kernel tells how tasks leave connections, if it does; and the cookie of the host's namespace.
    closes: Option<(Closes, u64)>,
}

#[derive(Debug)]
struct Entry {
    home: Home,
    /// Dropped with the entry, which tells who holds a [`Gone`].
    here: watch::Sender<()>,
}

/// Tells when a task has gone. What it held then must be let go, or its namespace would live on.
#[derive(Clone, Debug)]
pub struct Gone {
    here: watch::Receiver<()>,
    /// With the cookie of the task's namespace.
    closes: Option<(Closes, u64)>,
}

impl Gone {
    /// Waits until the task is removed from the namespaces.
    pub async fn wait(&mut self) {
        while self.here.changed().await.is_ok() {}
    }

    /// Watches how the task leaves a connection that has just been made to it. `None`: nobody tells.
    pub(super) fn watch(&self, stream: &impl AsFd) -> Option<Watched> {
        let (closes, netns) = self.closes.as_ref()?;
        closes.watch(*netns, stream)
    }
}

impl Default for Namespaces {
    fn default() -> Self {
        Self { homes: RwLock::default(), marked: true, closes: None }
    }
}

impl Namespaces {
    /// The same, with a kernel that tells how tasks leave connections. Called in the host's namespace.
    ///
    /// # Errors
    /// The kernel does not number namespaces.
    pub fn watched(closes: Closes) -> io::Result<Self> {
        Ok(Self { closes: Some((closes, socket::netns_cookie()?)), ..Self::default() })
    }

    /// Sockets without the mesh's mark, which needs CAP_NET_ADMIN: for an agent on a machine without hooks.
    pub fn unmarked() -> Self {
        Self { marked: false, ..Self::default() }
    }

    /// Sockets to this task are made there from now on.
    pub fn put(&self, task: TaskId, home: Home) {
        let entry = Entry { home, here: watch::Sender::new(()) };
        self.homes.write().unwrap_or_else(PoisonError::into_inner).insert(task, entry);
    }

    /// The task has gone. Connections into its namespace are cut.
    pub fn remove(&self, task: &TaskId) {
        self.homes.write().unwrap_or_else(PoisonError::into_inner).remove(task);
    }

    /// An unconnected, non-blocking socket of the family of `to` in the namespace of `task`; `None` when the task is
    /// not known here.
    ///
    /// # Errors
    /// The namespace cannot be entered, or it has no more sockets.
    pub fn socket_of(&self, task: &TaskId, to: SocketAddr) -> Option<(io::Result<TcpStream>, Gone)> {
        let (home, here) = {
            let homes = self.homes.read().unwrap_or_else(PoisonError::into_inner);
            let entry = homes.get(task)?;
            (entry.home.clone(), entry.here.subscribe())
        };
        let closes = self.closes.as_ref().map(|(closes, host)| {
            let netns = if let Home::Netns(netns) = &home { netns.cookie() } else { *host };
            (closes.clone(), netns)
        });
        let socket = match home {
            Home::Netns(netns) => netns.run(|| self.make(to)).map_err(io::Error::other).flatten(),
            Home::Host => self.make(to),
        };
        Some((socket, Gone { here, closes }))
    }

    /// The same in the host's namespace.
    ///
    /// # Errors
    /// Out of sockets.
    pub fn socket_of_host(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.make(to)
    }

    fn make(&self, to: SocketAddr) -> io::Result<TcpStream> {
        if self.marked {
            return socket::tcp_client(to);
        }
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }
}
