//! nginx: `proxy_pass` and `grpc_pass` at L7, the stream module at L4.
//!
//! It must not know where it runs.

use std::fmt::Write as _;

use super::{Half, Lane, Launch, Layer, Peer, Programs, Side, Speaks};
use crate::certificates::CALLED;

pub(super) const L7: Peer = Peer { name: "nginx", layer: Layer::L7, launch: l7 };
pub(super) const L4: Peer = Peer { name: "nginx-tcp", layer: Layer::L4, launch: l4 };

fn l7(half: &Half<'_>, _programs: &Programs) -> Launch {
    let mut servers = String::new();
    for (index, lane) in half.lanes.iter().enumerate() {
        let (http2, pass) = if lane.speaks == Speaks::Http2 { (" http2", "grpc") } else { ("", "proxy") };
        let secure = if half.side == Side::Caller { "s" } else { "" };
        let scheme = if lane.speaks == Speaks::Http2 { format!("grpc{secure}") } else { format!("http{secure}") };
        let version = if lane.speaks == Speaks::Http1 {
            "proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_max_temp_file_size 0;"
        } else {
            ""
        };
        let tls = if half.side == Side::Caller { outward(half, &format!("{pass}_ssl")) } else { inward(half) };
        let listen = listen(half, lane);
        write!(
            servers,
            "    upstream up{index} {{ server {to}; keepalive 128; keepalive_requests 1000000000; }}
    server {{
        listen {listen}{http2};
        {tls}
        location / {{ {pass}_pass {scheme}://up{index}; {version} }}
    }}\n",
            to = lane.to,
        )
        .ok();
    }
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};", half.dir.display()))
        .join("\n    ");
    let body = format!(
        "http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    {temporary}
{servers}}}\n"
    );
    launch(half, "", &body)
}

fn l4(half: &Half<'_>, _programs: &Programs) -> Launch {
    let mut servers = String::new();
    for lane in &half.lanes {
        let tls = if half.side == Side::Caller {
            format!("proxy_ssl on; {}", outward(half, "proxy_ssl"))
        } else {
            inward(half)
        };
        let listen = listen(half, lane);
        writeln!(servers, "    server {{ listen {listen}; proxy_pass {}; {tls} }}", lane.to).ok();
    }
    launch(half, "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n", &format!("stream {{\n{servers}}}\n"))
}

fn launch(half: &Half<'_>, first: &str, body: &str) -> Launch {
    let pid = half.dir.join("nginx.pid");
    let pid = pid.display();
    let text = format!(
        "{first}user root; daemon off; error_log stderr; pid {pid}; worker_processes auto; worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
{body}"
    );
    let argv = ["nginx", "-e", "stderr", "-c", "{}"];
    Launch { file: "nginx.conf", text, argv: argv.map(str::to_owned).to_vec(), before: Vec::new(), control: None }
}

fn listen(half: &Half<'_>, lane: &Lane) -> String {
    let tls = if half.side == Side::Called { " ssl" } else { "" };
    format!("{}{tls} backlog=4096 reuseport", lane.listen)
}

/// Directives of the side that makes TLS connections; `prefix` is the module's.
fn outward(half: &Half<'_>, prefix: &str) -> String {
    [
        format!("{prefix}_certificate {};", half.own.certificate.display()),
        format!("{prefix}_certificate_key {};", half.own.key.display()),
        format!("{prefix}_trusted_certificate {};", half.root.display()),
        format!("{prefix}_verify on; {prefix}_name {CALLED}; {prefix}_server_name on;"),
        format!("{prefix}_protocols TLSv1.3; {prefix}_session_reuse on;"),
    ]
    .join("\n        ")
}

/// Directives of the side that accepts them.
fn inward(half: &Half<'_>) -> String {
    [
        format!("ssl_certificate {};", half.own.certificate.display()),
        format!("ssl_certificate_key {};", half.own.key.display()),
        format!("ssl_client_certificate {};", half.root.display()),
        "ssl_verify_client on; ssl_protocols TLSv1.3; ssl_session_cache shared:tls:10m;".to_owned(),
    ]
    .join("\n        ")
}
