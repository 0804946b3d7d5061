//! Files stay small enough to be read at once.

use super::{Fault, Source};

/// Lines of a file, its tests included.
const LIMIT: usize = 800;

/// Files that may be longer: path, limit, and the reason.
const EXCEPTIONS: [(&str, usize, &str); 0] = [];

pub(super) fn check(source: &Source, faults: &mut Vec<Fault>) {
    let exception = EXCEPTIONS.iter().find(|(path, _, _)| *path == source.path);
    let limit = exception.map_or(LIMIT, |(_, limit, _)| *limit);
    let lines = source.text.lines().count();
    if lines > limit {
        let what = format!("{lines} lines; more than {limit} are not read at once. Part it by subject");
        faults.push(Fault::new(source, limit + 1, what));
    }
}
