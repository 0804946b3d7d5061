//! The stand-in's Docker socket: as much of the Engine API 1.41 as a program that observes containers uses.
//!
//! `GET` of `_ping`, `version`, `info`, `containers/json`, `containers/ID/json` and `events`; anything else is 404.
//! It must not know how containers are made.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{StandIn, record::State};

/// Answers on the socket until the stand-in is dropped and somebody connects, or the process ends.
pub(super) fn serve(socket: &Path, standin: &Arc<StandIn>) -> Result<()> {
    let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    let standin = Arc::downgrade(standin);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if standin.strong_count() == 0 {
                return;
            }
            let standin = Weak::clone(&standin);
            // A client that goes away in the middle is its own business.
            thread::spawn(move || converse(stream, &standin).ok());
        }
    });
    Ok(())
}

fn converse(mut stream: UnixStream, standin: &Weak<StandIn>) -> std::io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    loop {
        let mut request = String::new();
        if input.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut header = String::new();
        while input.read_line(&mut header)? > 2 {
            header.clear();
        }
        let Some(standin) = standin.upgrade() else { return Ok(()) };
        let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let path = unversioned(path);
        if path == "/events" {
            let events = standin.book().listen(since(query));
            drop(standin);
            stream.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            for event in events {
                write!(stream, "{:x}\r\n{event}\r\n", event.len())?;
                stream.flush()?;
            }
            return Ok(());
        }
        let (status, body) = answer(&standin, path, query);
        let body = if path == "/_ping" { "OK".to_owned() } else { body.to_string() };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nApi-Version: 1.41\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
    }
}

fn answer(standin: &StandIn, path: &str, query: &str) -> (&'static str, Value) {
    const OK: &str = "200 OK";
    let book = standin.book();
    match path {
        "/_ping" => (OK, Value::Null),
        "/version" => {
            (OK, json!({ "Version": "0-stand-in", "ApiVersion": "1.41", "MinAPIVersion": "1.12", "Os": "linux" }))
        }
        "/info" => (OK, json!({ "CgroupDriver": "cgroupfs", "CgroupVersion": "2", "ServerVersion": "0-stand-in" })),
        "/containers/json" => {
            let all = query.contains("all=true") || query.contains("all=1");
            let shown = book.records().iter().filter(|record| all || record.state == State::Running);
            (OK, shown.map(super::record::Record::summary).collect())
        }
        _ => {
            let id = path.strip_prefix("/containers/").and_then(|rest| rest.strip_suffix("/json"));
            match id.and_then(|id| book.find(id).ok()) {
                Some(record) => (OK, record.inspect()),
                None => ("404 Not Found", json!({ "message": format!("the stand-in has no {path}") })),
            }
        }
    }
}

/// `/v1.41/info` to `/info`.
fn unversioned(path: &str) -> &str {
    match path.strip_prefix("/v1.").and_then(|rest| rest.find('/').map(|slash| &rest[slash..])) {
        Some(rest) => rest,
        None => path,
    }
}

/// `since` as seconds with an optional fraction; without it only what is to come.
fn since(query: &str) -> Duration {
    let value = query.split('&').find_map(|pair| pair.strip_prefix("since="));
    value.and_then(|text| Duration::try_from_secs_f64(text.parse().ok()?).ok()).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_times_in_requests_are_understood() {
        assert_eq!(unversioned("/v1.41/containers/json"), "/containers/json");
        assert_eq!(unversioned("/_ping"), "/_ping");
        assert_eq!(since("filters=x&since=1.500000000"), Duration::from_millis(1500));
        assert_eq!(since("filters=x"), Duration::MAX);
    }
}
