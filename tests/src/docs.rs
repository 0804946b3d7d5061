//! Documents that are made from code, so that they cannot say something else: written by `cargo xtask docs`, and
//! compared on every run of the tests. It must not decide anything that the code does not say.

use std::time::Duration;

use mesh_agent::telemetry::metrics::{Direction, DnsOutcome, LinkKey, Metrics, Outcome, SourceFigures};
use mesh_common::refusal::{Blame, Refusal};

/// `docs/refusals.md`.
pub fn refusals() -> String {
    let mut page = "# Refusals\n\n\
        Every connection or request that is not served has one of these numbers, in the access log, in the metrics, in\n\
        the HTTP answer and in `mesh-agent explain`. A number is never used again. This page is made from the code by\n\
        `cargo xtask docs`.\n\n\
        | number | label | who has to act | what happened | what to do next |\n\
        |---|---|---|---|---|\n"
        .to_owned();
    for refusal in Refusal::ALL {
        let who = match refusal.blame() {
            Blame::Client => "the client",
            Blame::Upstream => "the destination",
            Blame::Operator => "the operator",
            Blame::Mesh => "the mesh",
        };
        let cells = [refusal.cause(), refusal.next_step()].map(|text| text.replace('|', "\\|"));
        let (number, label, [cause, next]) = (*refusal as u32, refusal.label(), cells);
        page.push_str(&format!("| {number} | `{label}` | {who} | {cause} | {next} |\n"));
    }
    page
}

/// `docs/metrics.md`.
pub fn metrics() -> String {
    let text = one_of_each().encode();
    let mut page = "# Metrics\n\n\
        Served in the Prometheus text format on `admin.metrics` (by default `127.0.0.1:15020/metrics`). Labels: `direction` is\n\
        `outbound`, `inbound` or `direct`; `src_service`, `dst_service`, `src_task` and `dst_task` name services and ECS tasks;\n\
        `refusal` is a label of [refusals.md](refusals.md). `mesh_local_ports` has the labels `service` and `ready` (`true`, `false`),\n\
        those of registrations `registry`, those of sources `source`. Counters end in `_total`. This page is made from the code by\n\
        `cargo xtask docs`.\n\n\
        | metric | type | what it says |\n\
        |---|---|---|\n"
        .to_owned();
    let mut help = "";
    for line in text.lines() {
        if let Some((_, said)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            help = said;
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let name = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
            page.push_str(&format!("| `{name}` | {kind} | {} |\n", help.replace('|', "\\|")));
        }
    }
    page
}

/// A family without a value is not in the text.
fn one_of_each() -> Metrics {
    let metrics = Metrics::new();
    let direction = Direction::Outbound;
    let link =
        metrics.link(&LinkKey { direction, src_service: None, src_task: None, dst_service: None, dst_task: None });
    link.bytes(0, 0);
    link.connection(Outcome::Ok, Duration::ZERO);
    link.request(None, Duration::ZERO);
    link.refused(Refusal::NoHealthyEndpoint);
    drop(metrics.open(direction, "", ""));
    metrics.dns(&[(DnsOutcome::Mesh, 0)]);
    metrics.kernel(&[]);
    metrics.kernel_map("", 0);
    metrics.source("", &SourceFigures { age: Some(Duration::ZERO), answers: 0, errors: 0, watches: 0, services: 0 });
    metrics.registered("", 0, true);
    metrics.local_ports(&"a".parse().into_iter().map(|service| (service, (0, 0))).collect());
    metrics
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::{env, fs};

    /// The page is what the code says; with `MESH_WRITE_DOCS` it is made so.
    fn check(name: &str, page: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
        if env::var_os("MESH_WRITE_DOCS").is_some() {
            fs::write(&path, page).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        }
        let written = fs::read_to_string(&path).unwrap_or_default();
        assert!(written == page, "docs/{name} is not what the code says: run `cargo xtask docs`");
    }

    #[test]
    fn the_list_of_refusals_is_fresh() {
        check("refusals.md", &super::refusals());
    }

    #[test]
    fn the_list_of_metrics_is_fresh() {
        check("metrics.md", &super::metrics());
    }
}
