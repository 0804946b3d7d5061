//! `explain`: what would happen to a connection now, and why.
//!
//! Must not know how it is decided.

use super::{Out, Outcome, Socket, client};
use crate::api::{Delivery, Explain, Verdict};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Who connects: a task of this host (id, or the beginning of one), or a service with a task on this host.
    #[arg(long, value_name = "TASK|SERVICE")]
    from: String,
    /// Where to: a name or address, with or without a port.
    #[arg(value_name = "HOST[:PORT]")]
    to: String,
    #[command(flatten)]
    socket: Socket,
    /// Print the agent's document as it is.
    #[arg(long)]
    json: bool,
}

/// Prints the decision and its reasons. [`Outcome::Bad`] where the connection would not be made.
///
/// # Errors
/// No agent answers, or it does not understand the question.
pub fn run(args: &Args, out: &mut Out) -> anyhow::Result<Outcome> {
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("source", &args.from)
        .append_pair("to", &args.to)
        .finish();
    let text = client::get(&args.socket.socket, &format!("/v1/explain?{query}"))?;
    let explained: Explain = client::document(&text)?;
    if args.json {
        out.raw(&text)?;
    } else {
        out.line(describe(&explained))?;
    }
    Ok(match explained.verdict {
        Verdict::Plan { .. } | Verdict::Direct { .. } | Verdict::Pass => Outcome::Good,
        Verdict::Refusal { .. } | Verdict::NoSuchName => Outcome::Bad,
    })
}

fn describe(explained: &Explain) -> String {
    let question = &explained.question;
    let address = question.destination.map(|addr| format!(" ({addr})")).unwrap_or_default();
    let mut lines = vec![
        format!("from     {}, task {}, {}", question.source_service, question.source, question.source_identity),
        format!("to       {}{address}", question.to),
    ];
    lines.extend(match &explained.verdict {
        Verdict::Plan { service, port, protocol, endpoint, delivery } => vec![
            format!("verdict  {}", carried(delivery)),
            format!("service  {service}, port {port}, {protocol}"),
            format!("endpoint {endpoint}"),
        ],
        Verdict::Direct { service, port, endpoints } => {
            let endpoints: Vec<_> = endpoints.iter().map(ToString::to_string).collect();
            vec![
                "verdict  connected by the kernel to a task of this host, with no proxy in the path".into(),
                format!("service  {service}, port {port}, tcp"),
                format!("endpoint {}", endpoints.join(" or ")),
            ]
        }
        Verdict::Refusal { number, label, blame, cause, next_step } => vec![
            format!("verdict  refused: {number} {label}"),
            format!("cause    {cause} (to be solved by: {blame})"),
            format!("next     {next_step}"),
        ],
        Verdict::Pass => vec!["verdict  left alone: the connection goes where the application sends it".into()],
        Verdict::NoSuchName => vec!["verdict  no such name: the application gets NXDOMAIN".into()],
    });
    lines.push(format!("why      (generation {})", explained.generation));
    lines.extend(explained.reasons.iter().enumerate().map(|(i, reason)| format!("  {}. {reason}", i + 1)));
    lines.join("\n")
}

fn carried(delivery: &Delivery) -> String {
    match delivery {
        Delivery::Local { task, to } => format!("delivered on this host, to {to} of task {task}"),
        Delivery::Tunnel { agent, authority, expect, .. } => {
            format!("carried in mTLS to the agent at {agent}, which must prove {expect}, and there to {authority}")
        }
        Delivery::Plaintext { to } => format!("sent in PLAINTEXT to {to}"),
    }
}

#[cfg(test)]
mod tests {
    use mesh_common::refusal::Refusal;

    use super::*;
    use crate::api::Question;

    fn explained(verdict: Verdict) -> Explain {
        Explain {
            question: Question {
                source: "web-1".into(),
                source_service: "web".into(),
                source_identity: "spiffe://demo.mesh/ns/demo/sa/web".into(),
                to: "world".into(),
                destination: Some(([240, 240, 0, 7], 80).into()),
            },
            generation: 9,
            verdict,
            reasons: vec!["first".into(), "second".into()],
        }
    }

    #[test]
    fn a_plan_is_readable() {
        let delivery = Delivery::Tunnel {
            agent: ([10, 90, 1, 11], 15008).into(),
            authority: ([10, 90, 1, 11], 32768).into(),
            from: "spiffe://demo.mesh/ns/demo/sa/web".into(),
            expect: "spiffe://demo.mesh/ns/demo/sa/world".into(),
        };
        let plan = Verdict::Plan {
            service: "world".into(),
            port: 80,
            protocol: "http".into(),
            endpoint: ([10, 90, 1, 11], 32768).into(),
            delivery,
        };
        let expected = "\
from     web, task web-1, spiffe://demo.mesh/ns/demo/sa/web
to       world (240.240.0.7:80)
verdict  carried in mTLS to the agent at 10.90.1.11:15008, which must prove spiffe://demo.mesh/ns/demo/sa/world, \
                        and there to 10.90.1.11:32768
service  world, port 80, http
endpoint 10.90.1.11:32768
why      (generation 9)
  1. first
  2. second";
        assert_eq!(describe(&explained(plan)), expected);
    }

    #[test]
    fn a_direct_connection_names_its_candidates() {
        let endpoints = vec![([172, 17, 0, 3], 6379).into(), ([172, 17, 0, 4], 6379).into()];
        let text = describe(&explained(Verdict::Direct { service: "cache".into(), port: 6379, endpoints }));
        assert!(text.contains("\nendpoint 172.17.0.3:6379 or 172.17.0.4:6379\n"), "{text}");
    }

    #[test]
    fn a_refusal_has_its_number_cause_and_next_step() {
        let text = describe(&explained(Verdict::refusal(Refusal::Denied)));
        assert!(text.contains("refused: 6 denied\n"), "{text}");
        assert!(text.contains(Refusal::Denied.cause()), "{text}");
        assert!(text.contains(Refusal::Denied.next_step()), "{text}");
    }
}
