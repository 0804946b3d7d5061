//! `linkerd-control FILE`: answers one linkerd2-proxy in place of Linkerd's control plane, from a file. It must not know
//! what is measured.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its log is what is shown when the proxy does not start")]

use std::{convert::Infallible, env, fs, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use mesh_linkerd::{Plane, World};
use tokio::net::TcpListener;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("linkerd-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<Infallible> {
    let file = env::args_os().nth(1).context("no file is named that says what to answer")?;
    let file = Path::new(&file);
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
