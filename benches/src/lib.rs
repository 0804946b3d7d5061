//! What the benchmarks of `benches/` are made of: hosts to measure on, proxies to measure, work to do, and statistics.
//!
//! Each benchmark is a file of `benches/benches`; nothing here knows which of them runs. Nothing here may favour a
//! subject: the same work, the same tasks, the same wire.

pub mod agents;
pub mod certificates;
pub mod figures;
pub mod fresh;
pub mod goals;
pub mod interrupt;
pub mod load;
pub mod peers;
pub mod plot;
pub mod program;
pub mod proof;
pub mod reference;
pub mod registry;
pub mod report;
pub mod rounds;
pub mod subject;
pub mod topology;
pub mod usage;
pub mod whole;
