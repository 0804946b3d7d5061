//! What tunnels do, one at a time, for a profiler. Must not know how instructions are counted.

use std::process::ExitCode;

use mesh_tunnels::CASES;
use mesh_worlds::counted;

fn main() -> ExitCode {
    // Flow control needs as long to settle.
    counted::main(CASES.iter().map(|it| (it.name, it.about, Box::new(it.make) as _)), 64, 64)
}
