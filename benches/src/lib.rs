//! What the benchmarks of `benches/` are made of.

pub mod whole;
