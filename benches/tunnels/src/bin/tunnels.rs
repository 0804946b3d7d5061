//! Does one case a given number of times below a function of a known name, for a profiler to count its instructions.
//!
//! `tunnels` lists the cases, `tunnels NAME` does one. Must not count anything itself.
#![allow(clippy::print_stdout, reason = "the list of cases is what it is asked for")]

use std::{env, process::ExitCode};

use mesh_tunnels::CASES;

/// What caches, allocators and flow control need to settle.
const WARM_UP: usize = 64;
/// `cargo xtask` divides by it.
const TIMES: usize = 64;

fn main() -> ExitCode {
    let Some(name) = env::args().nth(1) else {
        for case in CASES {
            println!("{}\t{}\t{TIMES}", case.name, case.about);
        }
        return ExitCode::SUCCESS;
    };
    let Some(case) = CASES.iter().find(|case| case.name == name) else { return ExitCode::FAILURE };
    let mut act = (case.make)();
    for _ in 0..WARM_UP {
        act();
    }
    for _ in 0..TIMES {
        counted_from_here(&mut *act);
    }
    ExitCode::SUCCESS
}

/// The profiler collects while this runs; it is told by name.
#[inline(never)]
fn counted_from_here(act: &mut dyn FnMut()) {
    act();
    // Keeps it from becoming a jump, which a profiler takes for something else.
    std::hint::black_box(());
}
