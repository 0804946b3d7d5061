//! What only the operating system can do: namespaces, sockets in them, cgroups, BPF.
//!
//! The only module of the agent where unsafe code is allowed. Everything it exports is safe to call from anywhere,
//! also with nonsense: the worst answer is an error. Knows nothing of services, identities or protocols.

pub mod bpf;
pub mod btf;
pub mod cgroup;
pub mod closes;
pub mod events;
pub mod flows;
pub mod maps;
pub mod memory;
pub mod netns;
pub mod probe;
mod raw;
pub mod socket;
