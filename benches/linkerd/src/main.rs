//! `linkerd-control serve FILE`: answers one linkerd2-proxy in place of Linkerd's control plane, from a file.
//! `linkerd-control knock ADDRESS NAME ROOT PORT [CERTIFICATE KEY]`: asks what is behind a proxy's own port.
//!
//! It must not know what is measured.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "its log is what is shown when the proxy does not start"
)]

use std::{
    convert::Infallible,
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_linkerd::{Knock, Plane, World};
use tokio::{net::TcpListener, time::timeout};

/// For one question.
const LIMIT: Duration = Duration::from_secs(5);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match run(&words.iter().map(String::as_str).collect::<Vec<_>>()).await {
        Ok(answer) => {
            print!("{answer}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("linkerd-control {}: {error:#}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

async fn run(words: &[&str]) -> Result<String> {
    match *words {
        ["serve", file] => match serve(Path::new(file)).await? {},
        ["knock", at, name, root, port] => knock(at, name, root, port, None).await,
        ["knock", at, name, root, port, certificate, key] => {
            knock(at, name, root, port, Some((certificate.into(), key.into()))).await
        }
        _ => bail!("there is no such command; there are: serve FILE, knock ADDRESS NAME ROOT PORT [CERTIFICATE KEY]"),
    }
}

async fn serve(file: &Path) -> Result<Infallible> {
    let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let world: World =
        serde_json::from_slice(&text).with_context(|| format!("{} does not say what to answer", file.display()))?;
    let at = world.listen;
    ensure!(at.ip().is_loopback(), "{at} is no loopback address, and this answers in clear");
    let plane = Plane::new(world)?;
    let listener =
        TcpListener::bind(at).await.with_context(|| format!("cannot listen on {at}; is it in use already?"))?;
    println!("linkerd-control: answers on {at}");
    plane.serve(listener).await
}

async fn knock(at: &str, name: &str, root: &str, port: &str, own: Option<(PathBuf, PathBuf)>) -> Result<String> {
    let at: SocketAddr = at.parse().with_context(|| format!("{at} is no address"))?;
    let port = port.parse().with_context(|| format!("{port} is no port"))?;
    let knock = Knock { at, name: name.to_owned(), root: root.into(), port, own };
    timeout(LIMIT, knock.ask()).await.with_context(|| format!("{at} did not answer within {LIMIT:?}"))?
}
