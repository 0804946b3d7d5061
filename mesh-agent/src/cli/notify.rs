//! Tells systemd how the start goes (sd_notify(3)): one datagram to the socket that `NOTIFY_SOCKET` names.
//!
//! Must not know what ready means. Without systemd it does nothing.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

use tracing::warn;

/// The service manager, if there is one that listens.
#[derive(Debug, Default)]
pub struct Notify {
    manager: Option<(UnixDatagram, SocketAddr)>,
}

impl Notify {
    /// The manager that the environment names. Read once, at start.
    pub fn from_env() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Self::default();
        };
        match Self::to(&name) {
            Ok(notify) => notify,
            Err(error) => {
                warn!(socket = ?name, error = %error, "service manager cannot be told");
                Self::default()
            }
        }
    }

    /// The agent does its job: `systemctl start` returns, and what is ordered after the unit may start.
    pub fn ready(&self) {
        self.send("READY=1\nSTATUS=ready");
    }

    /// The agent stops.
    pub fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=draining");
    }

    fn to(name: &OsStr) -> io::Result<Self> {
        let addr = match name.as_bytes() {
            [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        Ok(Self { manager: Some((UnixDatagram::unbound()?, addr)) })
    }

    fn send(&self, state: &str) {
        if let Some((socket, addr)) = &self.manager
            && let Err(error) = socket.send_to_addr(state.as_bytes(), addr)
        {
            warn!(error = %error, "service manager not told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(manager: &UnixDatagram) -> String {
        let mut datagram = [0; 128];
        let length = manager.recv(&mut datagram).expect("a datagram has been sent");
        String::from_utf8_lossy(&datagram[..length]).into_owned()
    }

    #[test]
    fn both_kinds_of_address_are_told() {
        let name = format!("mesh-notify-{}", std::process::id());
        let path = std::env::temp_dir().join(&name);
        let by_path = UnixDatagram::bind(&path).expect("the temporary directory is writable");
        let abstract_addr = SocketAddr::from_abstract_name(&name).expect("a valid name");
        let by_name = UnixDatagram::bind_addr(&abstract_addr).expect("nobody else has this name");
        for (manager, address) in [(by_path, path.clone().into_os_string()), (by_name, format!("@{name}").into())] {
            let notify = Notify::to(&address).expect("a valid address");
            notify.ready();
            assert_eq!(received(&manager), "READY=1\nSTATUS=ready");
            notify.stopping();
            assert_eq!(received(&manager), "STOPPING=1\nSTATUS=draining");
        }
        std::fs::remove_file(path).expect("it was made here");
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        Notify::default().ready();
        Notify::to(OsStr::new("/nonexistent/notify")).expect("a valid address").ready();
    }
}
