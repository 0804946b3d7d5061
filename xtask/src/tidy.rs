//! `tidy`: rules of the house that neither the compiler nor clippy checks. Each rule is one file below; it gets the
//! sources and returns faults. It runs nothing and changes nothing.

mod budget;
mod headers;
mod layers;
mod manifests;
mod names;
mod purity;
mod text;

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::workspace;

/// One file of the workspace that is text.
pub struct Source {
    /// From the workspace's folder, with `/` between the parts.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Files that hold nothing but tests, or help for them.
    fn is_test(&self) -> bool {
        self.path.ends_with("/tests.rs") || self.path.contains("/tests/") || self.path.starts_with("tests/")
    }

    /// The lines before the file's own tests, numbered from one.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines()).take_while(|(_, line)| line.trim() != "#[cfg(test)]")
    }
}

/// A rule that does not hold, and where.
pub struct Fault {
    path: String,
    line: usize,
    what: String,
}

impl Fault {
    fn new(source: &Source, line: usize, what: impl Into<String>) -> Self {
        Self { path: source.path.clone(), line, what: what.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.what)
    }
}

/// Shows every fault; true when there is none.
pub fn run() -> Result<bool> {
    let faults = faults(&workspace::root())?;
    for fault in &faults {
        println!("{fault}");
    }
    if !faults.is_empty() {
        println!("tidy: {} faults", faults.len());
    }
    Ok(faults.is_empty())
}

/// Every fault in the workspace at `root`.
fn faults(root: &Path) -> Result<Vec<Fault>> {
    let mut sources = Vec::new();
    collect(root, root, &mut sources)?;
    sources.sort_by(|one, other| one.path.cmp(&other.path));
    let mut faults = Vec::new();
    for source in &sources {
        text::check(source, &mut faults);
        manifests::check(source, &mut faults);
        if source.is_rust() {
            headers::check(source, &mut faults);
            budget::check(source, &mut faults);
            names::check(source, &mut faults);
            layers::check(source, &mut faults);
            purity::check(source, &mut faults);
        }
    }
    if !sources.iter().any(|source| source.path == "LICENSE") {
        faults.push(Fault { path: "LICENSE".to_owned(), line: 1, what: "the licence is missing".to_owned() });
    }
    Ok(faults)
}

/// Reads what git would keep: everything but build folders, history and files that are not text.
fn collect(root: &Path, folder: &Path, sources: &mut Vec<Source>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if name == "target" || name == ".git" || name == "Cargo.lock" || path == workspace::target() {
            continue;
        }
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(root, &path, sources)?;
        } else if kind.is_file() {
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let Ok(text) = String::from_utf8(bytes) else { continue };
            let path = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            sources.push(Source { path, text });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Fault, Source, budget, faults, headers, layers, manifests, names, purity, text};
    use crate::workspace;

    /// What the rules say of one file with this name and text: the lines of the faults.
    fn check(path: &str, text_of_file: &str) -> Vec<String> {
        let source = Source { path: path.to_owned(), text: text_of_file.to_owned() };
        let mut found = Vec::new();
        for rule in [headers::check, budget::check, names::check, layers::check, purity::check] {
            if source.is_rust() {
                rule(&source, &mut found);
            }
        }
        text::check(&source, &mut found);
        manifests::check(&source, &mut found);
        found.iter().map(Fault::to_string).collect()
    }

    #[test]
    fn the_workspace_is_tidy() {
        let faults = faults(&workspace::root()).expect("the workspace can be read");
        let faults: Vec<String> = faults.iter().map(Fault::to_string).collect();
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }

    #[test]
    fn a_file_opens_with_what_it_is_for() {
        assert!(check("a/src/x.rs", "//! For a reason.\n").is_empty());
        assert!(check("a/src/main.rs", "#![no_std]\n\n//! For a reason.\n").is_empty());
        assert_eq!(check("a/src/x.rs", "fn main() {}\n").len(), 1);
    }

    #[test]
    fn a_file_has_a_budget() {
        let lines = |count: usize| format!("//! .\n{}", "// x\n".repeat(count - 1));
        assert!(check("a/src/x.rs", &lines(800)).is_empty());
        assert_eq!(check("a/src/x.rs", &lines(801)).len(), 1);
    }

    #[test]
    fn modules_are_named_for_their_subject() {
        for bad in ["a/src/utils.rs", "a/src/x/mod.rs", "a/src/x/types.rs", "a/src/x/lib.rs"] {
            assert_eq!(check(bad, "//! .\n").len(), 1, "{bad}");
        }
        assert!(check("a/src/lib.rs", "//! .\n").is_empty());
    }

    #[test]
    fn lower_layers_know_nothing_of_higher_ones() {
        let dns = "mesh-agent/src/dns/server.rs";
        assert!(check(dns, "//! .\nuse crate::{state::Published, sys::{flows::Flows, netns::Netns}};\n").is_empty());
        assert_eq!(check(dns, "//! .\nuse crate::proxy::Listener;\n").len(), 1);
        assert_eq!(
            check(dns, "//! .\nuse crate::{\n    state::Published,\n    sys::{maps::Maps, netns},\n};\n").len(),
            1
        );
        assert_eq!(check(dns, "//! .\nfn f() { crate::reconciler::go() }\n").len(), 1);
        assert!(check(dns, "//! .\n// see crate::reconciler::go\n").is_empty());
        assert!(check(dns, "//! .\n#[cfg(test)]\nmod tests { use crate::proxy::Listener; }\n").is_empty());
        assert_eq!(check("mesh-agent/src/unheard_of.rs", "//! .\nuse crate::state;\n").len(), 1);
        assert!(check("mesh-agent/src/agent.rs", "//! .\nuse crate::{proxy, reconciler};\n").is_empty());
    }

    #[test]
    fn decisions_are_pure() {
        assert_eq!(check("mesh-core/src/plan.rs", "//! .\nlet now = std::time::Instant::now();\n").len(), 1);
        assert!(check("mesh-core/src/plan.rs", "//! Never Instant::now.\nfn f(now: Instant) {}\n").is_empty());
        assert!(check("mesh-agent/src/agent.rs", "//! .\nlet now = Instant::now();\n").is_empty());
    }

    #[test]
    fn crates_depend_on_what_they_may() {
        assert!(check("mesh-core/Cargo.toml", "[dependencies]\nserde = { workspace = true }\n").is_empty());
        assert_eq!(check("mesh-core/Cargo.toml", "[dependencies]\ntokio = { workspace = true }\n").len(), 1);
        assert!(check("mesh-core/Cargo.toml", "[dev-dependencies]\ntokio = { workspace = true }\n").is_empty());
        assert_eq!(check("xtask/Cargo.toml", "[dependencies.mesh-core]\nworkspace = true\n").len(), 1);
    }

    #[test]
    fn text_is_finished_and_clean() {
        assert_eq!(check("README.md", "a \n").len(), 1);
        assert_eq!(check("deploy/x.sh", "cat /ho\u{6d}e/me/x\n").len(), 1);
        assert_eq!(check("a/src/x.rs", &format!("//! .\nfn f() {{ {}!() }}\n", "todo")).len(), 1);
        assert_eq!(check("README.md", "no line feed at the end").len(), 1);
        assert!(check("README.md", "a\n").is_empty());
    }
}
