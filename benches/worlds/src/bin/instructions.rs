//! Does one case a given number of times below a function of a known name, for a profiler to count its instructions.
//!
//! `instructions` lists the cases, `instructions NAME` does one. Must not count anything itself.
#![allow(clippy::print_stdout, reason = "the list of cases is what it is asked for")]

use std::{env, process::ExitCode};

use mesh_worlds::{CASES, World};

/// What caches and allocators need to settle.
const WARM_UP: usize = 3;
/// `cargo xtask` divides by it.
const TIMES: usize = 16;

fn main() -> ExitCode {
    let Some(name) = env::args().nth(1) else {
        for case in CASES {
            println!("{}\t{}\t{TIMES}", case.name, case.about);
        }
        return ExitCode::SUCCESS;
    };
    let Some(case) = CASES.iter().find(|case| case.name == name) else { return ExitCode::FAILURE };
    let mut decide = (case.make)(&World::new(case.size));
    for _ in 0..WARM_UP {
        decide();
    }
    for _ in 0..TIMES {
        counted_from_here(&mut *decide);
    }
    ExitCode::SUCCESS
}

/// The profiler collects while this runs; it is told by name.
#[inline(never)]
fn counted_from_here(decide: &mut dyn FnMut()) {
    decide();
    // Keeps it from becoming a jump, which a profiler takes for something else.
    std::hint::black_box(());
}
