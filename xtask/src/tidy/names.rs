//! Modules are named for their subject, and a module's file stands beside its folder.

use super::{Fault, Source};

/// Names that say nothing, so that everything ends up in them.
const BANNED: [&str; 8] = ["util", "utils", "helper", "helpers", "common", "manager", "misc", "types"];

pub(super) fn check(source: &Source, faults: &mut Vec<Fault>) {
    let (folder, file) = source.path.rsplit_once('/').unwrap_or(("", &source.path));
    let name = file.trim_end_matches(".rs");
    if name == "mod" {
        faults.push(Fault::new(source, 1, "a module `foo` is `foo.rs` with children in `foo/`, never `mod.rs`"));
    } else if BANNED.contains(&name) || (name == "lib" && !folder.ends_with("src")) {
        faults.push(Fault::new(source, 1, format!("`{name}` says nothing of its subject; name the module for it")));
    }
}
