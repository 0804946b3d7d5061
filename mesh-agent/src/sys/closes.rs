//! How much an application had read of a connection that it closed with something unread in it, as the socket operation hook
//! recorded it before the reset left.
//!
//! Knows the map's layout; knows nothing of what was sent.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use mesh_common::maps::{Close, CloseKey};
use socket2::SockRef;

use super::raw;

/// Asks for the records of the hook. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Closes(Arc<OwnedFd>);

/// A connection from here to an application of this host, from the moment on at which it was made.
#[derive(Debug)]
pub struct Watched {
    closes: Closes,
    key: CloseKey,
    /// Nanoseconds. The same addresses may have been another connection's before.
    since: u64,
}

impl Closes {
    /// The map has [`CloseKey`] keys and [`Close`] values.
    pub(super) fn new(map: Arc<OwnedFd>) -> Self {
        Self(map)
    }

    /// Watches a connection that has just been made in the namespace with this cookie. `None`: it is over already.
    pub fn watch(&self, netns_cookie: u64, stream: &impl AsFd) -> Option<Watched> {
        let socket = SockRef::from(stream);
        let client = socket.local_addr().ok()?.as_socket()?;
        let server = socket.peer_addr().ok()?.as_socket()?;
        let key = CloseKey { netns: netns_cookie, client: client.into(), server: server.into() };
        Some(Watched { closes: self.clone(), key, since: raw::monotonic_ns() })
    }
}

impl Watched {
    /// How many octets the application had read when it closed the connection with more in it. `None`: it did not, or has not
    /// yet. To be asked once, when the connection was reset: the record is removed.
    pub fn taken(&self) -> Option<u64> {
        let close: Close = raw::take(&self.closes.0, &self.key).ok().flatten()?;
        (close.at > self.since).then_some(close.taken)
    }
}
