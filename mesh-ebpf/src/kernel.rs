//! The programs themselves: one function per hook, and the verdict it returns to the kernel.
//!
//! Must not decide: that is `mesh_ebpf::decide` with the facts that the modules below bring.

mod connect;
mod context;
mod directs;
mod lifecycle;
mod maps;
mod report;
mod reverse;
mod unread;

use aya_ebpf::{
    macros::{cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockOpsContext},
};

use context::{Family, SockAddr};

/// The kernel's words for yes and no in `cgroup/sock_addr` programs.
const PROCEED: i32 = 1;
const REFUSE: i32 = 0;

#[cgroup_sock_addr(connect4)]
pub fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    connect::connect(&SockAddr::new(ctx, Family::V4))
}

#[cgroup_sock_addr(connect6)]
pub fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    connect::connect(&SockAddr::new(ctx, Family::V6))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn mesh_sendmsg4(ctx: SockAddrContext) -> i32 {
    connect::send(&SockAddr::new(ctx, Family::V4))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn mesh_sendmsg6(ctx: SockAddrContext) -> i32 {
    connect::send(&SockAddr::new(ctx, Family::V6))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn mesh_recvmsg4(ctx: SockAddrContext) -> i32 {
    reverse::receive(&SockAddr::new(ctx, Family::V4));
    PROCEED
}

#[cgroup_sock_addr(recvmsg6)]
pub fn mesh_recvmsg6(ctx: SockAddrContext) -> i32 {
    reverse::receive(&SockAddr::new(ctx, Family::V6));
    PROCEED
}

#[cgroup_sock_addr(getpeername4)]
pub fn mesh_getpeername4(ctx: SockAddrContext) -> i32 {
    reverse::peer_name(&SockAddr::new(ctx, Family::V4));
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn mesh_getpeername6(ctx: SockAddrContext) -> i32 {
    reverse::peer_name(&SockAddr::new(ctx, Family::V6));
    PROCEED
}

#[sock_ops]
pub fn mesh_sock_ops(ctx: SockOpsContext) -> u32 {
    lifecycle::socket_operation(&ctx);
    // Ignored for the operations that are handled here.
    0
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier proves that this is never reached.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
