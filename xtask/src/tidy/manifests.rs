//! Who may depend on whom between crates. Cargo forbids circles; this forbids the edges that would break a promise.

use super::{Fault, Source};

/// The crates whose dependencies are a promise, what they may depend on, and the promise.
const ALLOWED: [(&str, &[&str], &str); 3] = [
    ("mesh-common", &["aya"], "it is shared with the kernel programs, byte for byte"),
    (
        "mesh-core",
        &["mesh-common", "imbl", "ipnet", "serde", "serde_json", "thiserror", "toml"],
        "it decides and has no effects",
    ),
    ("mesh-ebpf", &["mesh-common", "aya-ebpf"], "it runs in the kernel"),
];

/// Crates that know nothing of the mesh, what of ours they may use all the same, and the reason.
const APART: [(&str, &[&str], &str); 3] = [
    ("xtask", &["mesh-lab"], "it builds first"),
    ("lab", &[], "it builds first"),
    ("benches/linkerd", &[], "it answers the proxies of others"),
];

/// Libraries that one crate alone uses, and the reason.
const ALONE: [(&str, &str, &str); 3] = [
    ("linkerd2-proxy-api", "benches/linkerd", "a product of others is measured with it"),
    ("prost", "benches/linkerd", "only Linkerd's messages are made of it"),
    ("tonic", "benches/linkerd", "the agent speaks HTTP with hyper and h2, and no gRPC"),
];

pub(super) fn check(source: &Source, faults: &mut Vec<Fault>) {
    let Some(name) = source.path.strip_suffix("/Cargo.toml") else { return };
    let allowed = ALLOWED.iter().find(|(of, _, _)| *of == name);
    for (line, dependency) in dependencies(&source.text) {
        if let Some((_, allowed, promise)) = allowed
            && !allowed.contains(&dependency)
        {
            faults.push(Fault::new(source, line, format!("{name} may not depend on {dependency}: {promise}")));
        }
        let apart = APART.iter().find(|(of, _, _)| *of == name);
        if let Some((_, but, reason)) = apart
            && dependency.starts_with("mesh-")
            && !but.contains(&dependency)
        {
            faults.push(Fault::new(source, line, format!("{name} may not depend on {dependency}: {reason}")));
        }
        let alone = ALONE.iter().find(|(library, of, _)| *library == dependency && *of != name);
        if let Some((_, of, reason)) = alone {
            faults.push(Fault::new(source, line, format!("{dependency} is for {of} alone: {reason}")));
        }
    }
}

/// Names under `[dependencies]`, `[dependencies.name]` and `[target.….dependencies]`, with their lines.
/// What only tests or build scripts use is not in the product.
fn dependencies(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut inside = false;
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end().trim_end_matches(']');
            inside = section == "dependencies" || section.ends_with(".dependencies");
            if let Some(name) = section.strip_prefix("dependencies.") {
                found.push((number, name));
            }
        } else if inside && let Some((name, _)) = line.split_once(['=', '.']) {
            let name = name.trim();
            if !name.is_empty() && !name.starts_with('#') {
                found.push((number, name));
            }
        }
    }
    found
}
