//! Asks the admin socket.
//!
//! Must not know what the documents say.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::Failure;

/// An agent that needs longer hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// 65,000 endpoints with everything about them are some 30 MB.
const LARGEST: usize = 256 * 1024 * 1024;

/// The text of the document at `path` (with its query).
///
/// # Errors
/// No agent answers, it answers with something else than the admin API, or it says what is wrong with the question.
pub fn get(socket: &Path, path: &str) -> anyhow::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    let (status, body) = runtime
        .block_on(async { tokio::time::timeout(PATIENCE, exchange(socket, path)).await })
        .with_context(|| format!("the agent on {} does not answer: it hangs, see its log", socket.display()))??;
    if status == StatusCode::OK {
        return Ok(body);
    }
    match serde_json::from_str::<Failure>(&body) {
        Ok(failure) => bail!("{}; {}", failure.error, failure.remedy),
        Err(_) => bail!("the agent on {} answers {status}: {}", socket.display(), body.trim()),
    }
}

/// The document itself.
///
/// # Errors
/// As [`get`]; or the text is not such a document.
pub fn document<T: DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    serde_json::from_str(text).context("the agent's answer is not understood: agent and command are of other releases")
}

async fn exchange(socket: &Path, path: &str) -> anyhow::Result<(StatusCode, String)> {
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!(
            "no agent answers on {}; is it running (`systemctl status ecs-mesh`), are you root, and is --socket right?",
            socket.display()
        )
    })?;
    let (mut sender, connection) = http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path).header(header::HOST, "mesh-agent").body(Empty::new())?;
    let answer = sender.send_request(request).await.context("the agent closed the connection")?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), LARGEST).collect().await;
    let body = body.map_err(anyhow::Error::from_boxed).context("the agent's answer ended early")?.to_bytes();
    connection.abort();
    Ok((status, String::from_utf8(body.into()).context("the agent's answer is not text")?))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::UnixListener,
        path::PathBuf,
        thread,
    };

    use super::*;

    fn socket(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("mesh-client-{}-{name}", std::process::id()))
    }

    /// What the client makes of an answer: the document, or `error: ` and all causes.
    fn answered(name: &str, answer: &'static str) -> String {
        let path = socket(name);
        let listener = UnixListener::bind(&path).expect("the temporary directory is writable");
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the client connects");
            let mut request = [0; 1024];
            let length = stream.read(&mut request).expect("the client asks");
            stream.write_all(answer.as_bytes()).expect("the client reads");
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let got = get(&path, "/v1/status").unwrap_or_else(|error| format!("error: {error:#}"));
        let request = server.join().expect("no panic");
        assert!(request.starts_with("GET /v1/status HTTP/1.1\r\n"), "{request}");
        std::fs::remove_file(path).expect("it was made here");
        got
    }

    #[test]
    fn answers_are_told_apart() {
        let good = answered("good", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}\n");
        assert_eq!(good, "{}\n");
        let failed = answered(
            "failed",
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 34\r\n\r\n{\"error\":\"no such\",\"remedy\":\"ask\"}",
        );
        assert_eq!(failed, "error: no such; ask");
        let strange = answered("strange", "HTTP/1.1 500 Oh\r\ncontent-length: 3\r\n\r\nno\n");
        assert!(strange.contains("500") && strange.ends_with(": no"), "{strange}");
        let cut = answered("cut", "HTTP/1.1 200 OK\r\ncontent-length: 30\r\n\r\n{}");
        assert!(cut.starts_with("error: the agent's answer ended early"), "{cut}");
        let closed = answered("closed", "");
        assert!(closed.starts_with("error: the agent closed the connection"), "{closed}");
        let garbage = answered("garbage", "SSH-2.0-OpenSSH\r\n");
        assert!(garbage.starts_with("error: the agent closed the connection"), "{garbage}");
    }

    #[test]
    fn an_absent_agent_has_a_remedy() {
        let error = get(&socket("absent"), "/v1/status").expect_err("nobody listens").to_string();
        assert!(error.contains("is it running") && error.contains("--socket"), "{error}");
    }

    #[test]
    fn another_release_is_named_as_the_cause() {
        let error = document::<Failure>("{}").expect_err("it lacks everything").to_string();
        assert!(error.contains("other releases"), "{error}");
    }
}
