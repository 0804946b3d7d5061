//! Entry points of the kernel programs: a typed result becomes a kernel verdict, and nothing else happens here.
//!
//! The connect hooks decide in [`kernel::connect`], the socket operations in [`kernel::lifecycle`], answers to DNS and
//! the names of peers in [`kernel::reverse`]. For any other target than BPF this is an empty program.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod kernel;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
