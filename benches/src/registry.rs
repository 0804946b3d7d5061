//! Consul asked without any mesh: what it needs by itself, and when it shows what.
//!
//! Runs on a host, outside of tasks. It must not know the agent.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpStream,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use mesh_lab::serve;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(40);

/// Registers an instance and takes it away again, `count` times: a line with the milliseconds until a blocking query
/// had shown each.
///
/// # Errors
/// Consul does not answer.
pub fn share(url: &str, count: u32) -> io::Result<String> {
    let mut lines = Vec::new();
    for number in 0..count {
        let name = format!("share-{number}");
        let body = json!({ "ID": name, "Name": name, "Address": "192.0.2.1", "Port": 80,
            "Check": { "TTL": "1m", "Status": "passing" } });
        let registered = timed(url, &name, 1, "/v1/agent/service/register", &body.to_string(), drop)?;
        let gone = timed(url, &name, 0, &format!("/v1/agent/service/deregister/{name}"), "", drop)?;
        lines.push(format!("{registered:.3} {gone:.3}"));
    }
    Ok(lines.join("\n"))
}

/// Changes something: milliseconds until a blocking query shows that the service has so many instances that pass. `tell`
/// hears when Consul is told.
///
/// # Errors
/// Consul does not answer.
pub fn timed(
    url: &str,
    name: &str,
    instances: u32,
    path: &str,
    body: &str,
    tell: impl FnOnce(Instant),
) -> io::Result<f64> {
    let (ready, waits) = mpsc::channel();
    let (base, of) = (url.to_owned(), name.to_owned());
    let watcher = thread::spawn(move || watch(&base, &of, instances, Some(&ready)));
    // It has an index, and asks with it right now.
    waits.recv().map_err(io::Error::other)?;
    thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    tell(began);
    let (status, said) = ask(url, "PUT", path, body)?;
    if status != 200 {
        return Err(io::Error::other(format!("{path}: {status} {said}")));
    }
    let at = watcher.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")))?;
    Ok(at.saturating_duration_since(began).as_secs_f64() * 1e3)
}

/// When Consul shows `count` instances that pass, by the machine's clock.
///
/// # Errors
/// It does not.
pub fn seen(url: &str, name: &str, count: u32) -> io::Result<String> {
    watch(url, name, count, None).map(|_| serve::now().to_string())
}

fn watch(url: &str, name: &str, count: u32, ready: Option<&mpsc::Sender<()>>) -> io::Result<Instant> {
    let deadline = Instant::now() + LIMIT;
    let mut index = 0_u64;
    while Instant::now() < deadline {
        let path = format!("/v1/health/service/{name}?passing=1&index={index}&wait=30s");
        let (status, said) = ask(url, "GET", &path, "")?;
        if status != 200 {
            return Err(io::Error::other(format!("{path}: {status} {said}")));
        }
        let at = Instant::now();
        let (head, body) = said.split_once("\r\n\r\n").unwrap_or_default();
        let found = head.lines().find_map(|line| line.strip_prefix("X-Consul-Index: ")?.trim().parse().ok());
        let first = index == 0;
        index = found.unwrap_or(1).max(1);
        let instances: Value = serde_json::from_str(body).map_err(io::Error::other)?;
        if instances.as_array().map(Vec::len) == usize::try_from(count).ok() {
            return Ok(at);
        }
        if let (true, Some(ready)) = (first, ready) {
            ready.send(()).map_err(io::Error::other)?;
        }
    }
    Err(io::Error::other(format!("Consul has not shown {count} instances of {name}")))
}

/// One request; the status, and the whole answer.
fn ask(url: &str, method: &str, path: &str, body: &str) -> io::Result<(u16, String)> {
    let host = url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: {host}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| io::Error::other("an answer has a status"))?, answer))
}
