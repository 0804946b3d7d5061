//! Sockets as the mesh needs them: made in a given namespace, marked, non-blocking, with a deep backlog.
//!
//! Knows nothing of what is sent over them.
#![expect(unsafe_code, reason = "SO_NETNS_COOKIE and TCP_INFO have no safe wrapper, and AsyncFd asks for a promise")]

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;

/// `SO_MARK` of the agent's listeners; the hooks recognise a living agent by it. ASCII "mesh".
pub const MARK: u32 = 0x6d65_7368;

/// A queue deep enough for a connect storm; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// The cookie of the namespace that the calling thread is in.
pub(crate) fn netns_cookie() -> io::Result<u64> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let mut cookie = 0u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: `cookie` and `length` live across the call and `length` is the size of `cookie`.
    let code = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if code == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// What has become of what was written to a TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    /// So many octets the other end's kernel has acknowledged.
    pub octets: u64,
    /// The connection is over, so there will not be more.
    pub over: bool,
}

/// Asks for it, of a socket that has connected (not of one that was accepted).
///
/// # Errors
/// It is no TCP socket.
pub fn acknowledged(socket: &impl AsFd) -> io::Result<Acknowledged> {
    /// `TCP_CLOSE` of <net/tcp_states.h>: reset, or ended both ways.
    const CLOSED: u8 = 7;
    // SAFETY: it is made of numbers, and a kernel that knows fewer leaves the others as they are.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    // SAFETY: `info` and `length` live across the call and `length` is the size of `info`.
    let code = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if code != 0 {
        return Err(io::Error::last_os_error());
    }
    // The kernel counts the SYN.
    Ok(Acknowledged { octets: info.tcpi_bytes_acked.saturating_sub(1), over: info.tcpi_state == CLOSED })
}

/// A marked, non-blocking TCP listener in the namespace that the calling thread is in.
///
/// # Errors
/// The address is in use or not available, or the process may not set marks (CAP_NET_ADMIN).
pub fn tcp_listener(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_mark(MARK)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A marked, non-blocking UDP socket in the namespace that the calling thread is in.
///
/// # Errors
/// As [`tcp_listener`].
pub fn udp_socket(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_mark(MARK)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// A marked, non-blocking, unconnected TCP socket in the namespace that the calling thread is in, for `tokio`'s
/// `TcpSocket::from_std_stream` to connect.
///
/// # Errors
/// Out of sockets, or no CAP_NET_ADMIN.
pub fn tcp_client(family_of: SocketAddr) -> io::Result<TcpStream> {
    // Of two thousand a second each call counts.
    let socket = Socket::new(Domain::for_address(family_of), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_mark(MARK)?;
    Ok(socket.into())
}

/// A listener whose connections are not yet bound to a runtime, so that another thread's can take them.
pub struct Acceptor(AsyncFd<TcpListener>);

impl Acceptor {
    /// Watches a non-blocking listener from the calling runtime.
    ///
    /// # Errors
    /// The runtime cannot watch it.
    pub fn new(listener: TcpListener) -> io::Result<Self> {
        // SAFETY: a `TcpListener` owns its descriptor and gives the same one as long as it lives, here as long as the
        // `AsyncFd` that owns it.
        unsafe { AsyncFd::register(listener) }.map(Self).map_err(io::Error::from)
    }

    /// The next connection, non-blocking, and where it comes from. Cancelling loses none.
    ///
    /// # Errors
    /// As `accept(2)`.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        loop {
            let mut ready = self.0.readable().await?;
            let Ok(accepted) = ready.try_io(|listener| listener.get_ref().accept()) else { continue };
            let (stream, peer) = accepted?;
            stream.set_nonblocking(true)?;
            return Ok((stream, peer));
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// As `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.get_ref().local_addr()
    }
}

impl AsFd for Acceptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
