//! The decisions, one at a time, for a profiler. Must not know how instructions are counted.

use std::process::ExitCode;

use mesh_worlds::{CASES, World, counted};

fn main() -> ExitCode {
    counted::main(CASES.iter().map(|it| (it.name, it.about, Box::new(|| (it.make)(&World::new(it.size))) as _)), 3, 16)
}
