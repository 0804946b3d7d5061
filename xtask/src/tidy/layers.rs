//! Who may know whom inside `mesh-agent`: lower layers know nothing of higher ones, and modules of one layer do not
//! know each other. What passes between them is a type of `mesh-core`, on a channel that `agent` made.

use super::{Fault, Source};

/// The lowest layer: every module above may use it.
const BASE: [&str; 3] = ["telemetry", "api", "state"];

/// What each module may use beside the base and itself, lowest first. A path allows all that is below it.
const LAYERS: &[(&str, &[&str])] = &[
    ("telemetry", &[]),
    ("api", &[]),
    ("state", &[]),
    // The only unsafe code: kernel objects, namespaces, sockets.
    ("sys", &[]),
    // These fetch and report; they touch no kernel object. An ENI's address is found inside its namespace only.
    ("tasks", &["sys::netns"]),
    ("discovery", &["sys::memory"]),
    ("identity", &[]),
    ("transport", &["sys::socket", "identity"]),
    // Both serve sockets inside a task's namespace and ask where a flow was meant to go; the proxy also how a task left one.
    ("proxy", &["sys::socket", "sys::netns", "sys::flows", "sys::closes", "transport", "identity"]),
    ("dns", &["sys::socket", "sys::netns", "sys::flows"]),
    // It asks the applications, by sockets made where they are.
    ("readiness", &["proxy::places"]),
    // It performs actions, and what it arms are the servers of the layers below; what it observes reaches it by channel.
    ("reconciler", &["sys", "proxy", "dns", "transport", "identity"]),
    ("admin", &[]),
    ("agent", &["*"]),
    // The command line speaks to the running agent through its socket, except where it is the agent.
    ("cli", &["cli"]),
    ("main", &["cli"]),
    ("lib", &["*"]),
    // The root of another crate, for measuring.
    ("tunnels", &["identity", "sys::socket", "transport"]),
];

/// Single files that may use more than their module: path below `src`, what, and the reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("cli/run.rs", "agent", "this command is the agent"),
    ("cli/check.rs", "sys::probe", "it looks at the machine before there is an agent"),
    ("cli/check.rs", "discovery", "it asks the registries before there is an agent"),
    ("cli/run.rs", "sys::probe", "it refuses to start where `check` would fail"),
    ("cli/run.rs", "sys::memory", "the allocator is set before there are threads"),
    ("cli/cleanup.rs", "sys::bpf", "it removes what an agent left when there is none"),
    ("cli/ca.rs", "identity", "it makes a certificate authority before there is an agent"),
];

pub(super) fn check(source: &Source, faults: &mut Vec<Fault>) {
    let Some(file) = source.path.strip_prefix("mesh-agent/src/") else { return };
    if source.is_test() {
        return;
    }
    let module = file.split(['/', '.']).next().unwrap_or(file);
    let Some((_, may)) = LAYERS.iter().find(|(known, _)| *known == module) else {
        faults.push(Fault::new(source, 1, format!("module `{module}` has no layer; give it one in tidy/layers.rs")));
        return;
    };
    // The base is one layer: its modules do not know each other either.
    let base: &[&str] = if BASE.contains(&module) { &[] } else { &BASE };
    for (line, used) in uses(source) {
        let permitted = may
            .iter()
            .chain(base)
            .copied()
            .chain([module])
            .chain(EXCEPTIONS.iter().filter(|(exempt, _, _)| *exempt == file).map(|(_, what, _)| *what));
        if !permitted.into_iter().any(|permitted| permitted == "*" || is_below(&used, permitted)) {
            let what = format!("`{module}` may not know `crate::{used}` (the layers are in tidy/layers.rs)");
            faults.push(Fault::new(source, line, what));
        }
    }
}

/// Every path that the file's code takes from the crate's root, with the line where its root stands.
fn uses(source: &Source) -> Vec<(usize, String)> {
    let code: Vec<(usize, &str)> =
        source.code().map(|(number, line)| (number, line.split("//").next().unwrap_or(line))).collect();
    let mut found = Vec::new();
    for (index, (number, line)) in code.iter().enumerate() {
        for (at, root) in line.match_indices("crate::") {
            let name_goes_on = |before: char| before.is_alphanumeric() || before == '_';
            if line[..at].chars().next_back().is_some_and(name_goes_on) {
                continue; // the end of another crate's name
            }
            let mut tree = line[at + root.len()..].to_owned();
            for (_, next) in &code[index + 1..] {
                if tree.matches('{').count() <= tree.matches('}').count() || !tree.starts_with('{') && !is_use(line) {
                    break;
                }
                tree.push_str(next);
            }
            let mut paths = Vec::new();
            flatten("", &mut tree.as_str(), &mut paths);
            found.extend(paths.into_iter().map(|path| (*number, path)));
        }
    }
    found
}

fn is_use(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with("use ") || line.starts_with("pub use ")
}

/// Turns `a::{b, c::d}` into `a::b` and `a::c::d`, eating it from `rest`.
fn flatten(prefix: &str, rest: &mut &str, paths: &mut Vec<String>) {
    let join = |name: &str| if prefix.is_empty() { name.to_owned() } else { format!("{prefix}::{name}") };
    let text = rest.trim_start();
    if let Some(inner) = text.strip_prefix('{') {
        *rest = inner;
        loop {
            *rest = rest.trim_start_matches([' ', ',', '\n']);
            if let Some(after) = rest.strip_prefix('}') {
                *rest = after;
                return;
            }
            let before = rest.len();
            flatten(prefix, rest, paths);
            if rest.len() == before {
                return; // not a tree of names: nothing more to learn here
            }
        }
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*').unwrap_or(text.len());
    let (name, after) = text.split_at(end);
    if name.is_empty() {
        return;
    }
    *rest = after;
    let path = if name == "self" { prefix.to_owned() } else { join(name) };
    match after.strip_prefix("::") {
        Some(deeper) => {
            *rest = deeper;
            flatten(&path, rest, paths);
        }
        None => {
            if let Some(renamed) = after.trim_start().strip_prefix("as ") {
                let end = renamed.find([',', '}', ';']).unwrap_or(renamed.len());
                *rest = &renamed[end..];
            }
            paths.push(path);
        }
    }
}

/// Whether `path` is `permitted` or something in it.
fn is_below(path: &str, permitted: &str) -> bool {
    path.strip_prefix(permitted).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}
