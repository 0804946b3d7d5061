//! The one place that reads and writes the kernel's context structures. Everything else sees [`Addr`].

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_sk_storage_get},
    programs::SockAddrContext,
};
use mesh_common::{
    addr::{Addr, Ip},
    maps::Original,
};

use super::maps::ORIGINALS;

/// IPPROTO_TCP of <linux/in.h>.
const TCP: u32 = 6;

/// Which of the two hooks runs. An IPv6 socket that carries IPv4 arrives at the IPv6 hook with a mapped address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// The context of a `cgroup/sock_addr` program.
pub struct SockAddr {
    ctx: SockAddrContext,
    pub family: Family,
}

impl SockAddr {
    #[inline(always)]
    pub fn new(ctx: SockAddrContext, family: Family) -> Self {
        Self { ctx, family }
    }

    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.ctx.sock_addr
    }

    #[inline(always)]
    pub fn as_ptr(&self) -> *mut core::ffi::c_void {
        self.ctx.as_ptr()
    }

    /// The address that the hook is about: the destination, or for `recvmsg` the source.
    #[inline(always)]
    pub fn addr(&self) -> Addr {
        let raw = self.raw();
        let ip = match self.family {
            // SAFETY: the kernel hands a valid context; the verifier checks the offset.
            Family::V4 => Ip::v4(unsafe { (*raw).user_ip4 }.to_ne_bytes()),
            Family::V6 => {
                let mut ip = [0u8; 16];
                let words: [u32; 4] = core::array::from_fn(|i| {
                    // SAFETY: as above; `i` is below 4.
                    unsafe { (*raw).user_ip6[i] }
                });
                for (bytes, word) in ip.as_chunks_mut::<4>().0.iter_mut().zip(words) {
                    *bytes = word.to_ne_bytes();
                }
                Ip(ip)
            }
        };
        // SAFETY: as above. The port is in network order in the first two octets.
        let port = unsafe { (*raw).user_port }.to_ne_bytes();
        Addr { ip, port: [port[0], port[1]], zero: [0; 2] }
    }

    /// Replaces the address. Returns false when an IPv4 socket is asked to hold an IPv6 address.
    #[inline(always)]
    pub fn set_addr(&self, addr: &Addr) -> bool {
        // Hidden from the optimiser: it would keep the address of a field that was read before, and the verifier
        // refuses to write through a context pointer that was moved.
        let raw = core::hint::black_box(self.raw());
        match self.family {
            Family::V4 => {
                let Some(v4) = addr.ip.as_v4() else { return false };
                // SAFETY: valid context.
                unsafe { (*raw).user_ip4 = u32::from_ne_bytes(v4) };
            }
            Family::V6 => {
                let (words, _) = addr.ip.0.as_chunks::<4>();
                for i in 0..4 {
                    // SAFETY: as above; `i` is below 4.
                    unsafe { (*raw).user_ip6[i] = u32::from_ne_bytes(words[i]) };
                }
            }
        }
        let port = u32::from(u16::from_ne_bytes(addr.port));
        // SAFETY: as above.
        unsafe { (*raw).user_port = port };
        true
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        // SAFETY: valid context.
        unsafe { (*self.raw()).protocol == TCP }
    }

    /// The socket. The verifier knows it as valid and not null in these hooks.
    #[inline(always)]
    pub fn sock(&self) -> *mut bpf_sock {
        // SAFETY: valid context.
        unsafe { (*self.raw()).__bindgen_anon_1.sk }
    }

    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper accepts this context.
        unsafe { bpf_get_netns_cookie(self.as_ptr()) }
    }

    /// What this socket had asked for, if it was redirected.
    #[inline(always)]
    pub fn original(&self) -> Option<&mut Original> {
        // SAFETY: `sock` is valid; the storage lives as long as the socket.
        unsafe { original_of(self.sock(), None).as_mut() }
    }

    /// Remembers what this socket asks for. False: the kernel has no memory for it.
    #[inline(always)]
    pub fn remember(&self, original: &mut Original) -> bool {
        // SAFETY: as in `original`.
        match unsafe { original_of(self.sock(), Some(original)).as_mut() } {
            Some(stored) => {
                *stored = *original;
                true
            }
            None => false,
        }
    }
}

/// The storage of `sock`, made from `initial` if it is given and there is none yet. Null if there is none.
///
/// # Safety
/// `sock` must be a socket pointer that the verifier accepts for `bpf_sk_storage_get`.
#[inline(always)]
pub unsafe fn original_of(sock: *mut bpf_sock, initial: Option<&mut Original>) -> *mut Original {
    let map = (&raw const ORIGINALS).cast_mut().cast();
    let (initial, flags) = match initial {
        Some(original) => (core::ptr::from_mut(original).cast(), u64::from(BPF_SK_STORAGE_GET_F_CREATE)),
        None => (core::ptr::null_mut(), 0),
    };
    // SAFETY: the caller vouches for `sock`; the map is a socket storage with this value type.
    unsafe { bpf_sk_storage_get(map, sock.cast(), initial, flags) }.cast()
}
