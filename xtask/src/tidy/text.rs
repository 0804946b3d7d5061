//! What no file may hold: unfinished work, blanks at the end of a line, paths of somebody's own machine.

use super::{Fault, Source};

/// Marks of unfinished work. In pieces, so that this file does not hold them itself.
const UNFINISHED: [&str; 5] = [
    concat!("to", "do!("),
    concat!("un", "implemented!("),
    concat!("FIX", "ME"),
    concat!("TO", "DO"),
    concat!("XX", "X:"),
];

/// Folders that are one person's, not every machine's.
const PERSONAL: [&str; 4] =
    [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/wo", "rk/"), concat!("/Us", "ers/")];

pub(super) fn check(source: &Source, faults: &mut Vec<Fault>) {
    for (number, line) in (1..).zip(source.text.lines()) {
        if line.ends_with([' ', '\t']) {
            faults.push(Fault::new(source, number, "blanks at the end of the line"));
        }
        if let Some(mark) = UNFINISHED.iter().find(|mark| line.contains(**mark)) {
            faults.push(Fault::new(source, number, format!("`{mark}`: finish it, or write down the limit")));
        }
        if let Some(folder) = PERSONAL.iter().find(|folder| mentions(line, folder)) {
            faults.push(Fault::new(source, number, format!("`{folder}…` is one person's folder")));
        }
    }
    if !source.text.is_empty() && !source.text.ends_with('\n') {
        faults.push(Fault::new(source, source.text.lines().count(), "no line feed at the end of the file"));
    }
}

/// `folder` as the beginning of an absolute path, not in the middle of an address or a longer path.
fn mentions(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|before| before.is_alphanumeric() || "./-_*}".contains(before))
    })
}
