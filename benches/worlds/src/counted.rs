//! Does one case a given number of times below a function of a known name, for a profiler to count its instructions.
//!
//! Must not count anything itself, nor know what the cases do.
#![allow(clippy::print_stdout, reason = "the list of cases is what it is asked for")]

use std::{env, process::ExitCode};

/// A case: its name, what it is, and what makes it.
pub type Listed<'a> = (&'a str, &'a str, Box<dyn Fn() -> Box<dyn FnMut()> + 'a>);

/// The `main` of a program: without arguments it lists the cases, with a name it does that one. `warm_up` is how often
/// beforehand, until caches, allocators and whatever else have settled; `cargo xtask` divides by `times`.
pub fn main<'a>(cases: impl IntoIterator<Item = Listed<'a>>, warm_up: usize, times: usize) -> ExitCode {
    let mut cases = cases.into_iter();
    let Some(wanted) = env::args().nth(1) else {
        for (name, about, _) in cases {
            println!("{name}\t{about}\t{times}");
        }
        return ExitCode::SUCCESS;
    };
    let Some((_, _, make)) = cases.find(|(name, ..)| *name == wanted) else { return ExitCode::FAILURE };
    let mut act = make();
    for _ in 0..warm_up {
        act();
    }
    for _ in 0..times {
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
