//! `mesh-core` decides and does nothing: no clock, chance, files, environment, sockets, threads or output.

use super::{Fault, Source};

/// What reaches outside, and what to do instead.
const EFFECTS: [(&str, &str); 10] = [
    ("Instant::now", "take the time as an argument"),
    ("SystemTime::now", "take the time as an argument"),
    ("std::env", "take the value as an argument"),
    ("std::fs", "take the text as an argument"),
    ("std::process", "return an action for the agent to perform"),
    ("std::thread", "return an action for the agent to perform"),
    ("TcpStream", "return an action for the agent to perform"),
    ("UdpSocket", "return an action for the agent to perform"),
    ("tracing::", "return the reason; the agent logs it"),
    ("rand::", "take the drawn number as an argument"),
];

pub(super) fn check(source: &Source, faults: &mut Vec<Fault>) {
    if !source.path.starts_with("mesh-core/src/") || source.is_test() {
        return;
    }
    for (number, line) in source.code() {
        let code = line.split("//").next().unwrap_or(line);
        for (effect, instead) in EFFECTS {
            if code.contains(effect) {
                faults.push(Fault::new(source, number, format!("mesh-core is pure, `{effect}` is not; {instead}")));
            }
        }
    }
}
