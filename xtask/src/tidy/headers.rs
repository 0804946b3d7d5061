//! Every Rust file opens by saying what it is for, and what it must not know.

use super::{Fault, Source};

pub(super) fn check(source: &Source, faults: &mut Vec<Fault>) {
    // Attributes of a whole crate must come before its documentation in some files, and may in all.
    let first = source.text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!["));
    if !first.is_some_and(|line| line.starts_with("//!")) {
        faults.push(Fault::new(source, 1, "does not open with `//!`: what is it for, and what must it not know?"));
    }
}
