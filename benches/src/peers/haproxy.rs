//! haproxy: mode http at L7, mode tcp at L4.
//!
//! It must not know where it runs.

use std::fmt::Write as _;

use super::{Half, Launch, Layer, Peer, Programs, Side, Speaks};
use crate::certificates::CALLED;

pub(super) const L7: Peer = Peer { name: "haproxy", layer: Layer::L7, launch };
pub(super) const L4: Peer = Peer { name: "haproxy-tcp", layer: Layer::L4, launch };

fn launch(half: &Half<'_>, _programs: &Programs) -> Launch {
    let mut text = "global
    maxconn 8192
    ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-server-options ssl-min-ver TLSv1.3
defaults
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    http-reuse always
    backlog 4096
"
    .to_owned();
    let files = format!("crt {} ca-file {} verify required", half.own.both.display(), half.root.display());
    for (index, lane) in half.lanes.iter().enumerate() {
        let mode = if lane.speaks == Speaks::Bytes { "tcp" } else { "http" };
        // In clear HTTP/2 is known beforehand; over TLS it is negotiated.
        let (clear, over_tls) = match lane.speaks {
            Speaks::Http2 => (" proto h2", " alpn h2"),
            Speaks::Http1 => ("", " alpn http/1.1"),
            Speaks::Bytes => ("", ""),
        };
        let (bind, server) = match half.side {
            Side::Caller => {
                (clear.to_owned(), format!(" ssl {files} verifyhost {CALLED} sni str({CALLED}){over_tls}{clear}"))
            }
            Side::Called => (format!(" ssl {files}{over_tls}"), clear.to_owned()),
        };
        writeln!(
            text,
            "listen lane{index}\n    mode {mode}\n    bind {}{bind}\n    server up {}{server}",
            lane.listen, lane.to
        )
        .ok();
    }
    let argv = ["haproxy", "-db", "-f", "{}"];
    Launch { file: "haproxy.cfg", text, argv: argv.map(str::to_owned).to_vec(), before: Vec::new(), control: None }
}
