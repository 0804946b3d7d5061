//! What the benchmarks of `benches/` are made of: hosts to measure on, proxies to measure, work to do, and statistics.
//!
//! Each benchmark is a file of `benches/benches`; nothing here knows which of them runs. Nothing here may favour a
//! subject: the same work, the same tasks, the same wire.
#![expect(clippy::print_stdout, reason = "a benchmark talks to whoever started it")]

pub mod agents;
pub mod certificates;
pub mod figures;
pub mod load;
pub mod peers;
pub mod topology;
pub mod usage;
