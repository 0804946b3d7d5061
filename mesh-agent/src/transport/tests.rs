//! Two agents on loopback: what a tunnel promises, and what it refuses.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_common::refusal::Refusal;
use mesh_core::id::SpiffeId;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
};

use crate::{
    identity::{
        Identities,
        tests::{DAY, ca, id},
    },
    sys::socket::Acceptor,
    transport::{
        To,
        accept::{Acceptance, Arrival, Failed, Request, serve},
        dial::{Dialer, Settings},
        tls::TlsError,
        tunnel::Tunnel,
    },
};

/// What the tests below make diallers with.
macro_rules! dialling {
    ($settings:expr) => {
        use super::*;

        fn settings() -> Settings {
            $settings
        }

        fn dialer(identities: &Identities) -> Dialer {
            Dialer::new(identities.clone(), settings()).unwrap()
        }

        /// Opens a tunnel and returns both ends.
        async fn pair() -> (Dialer, Accepting, Tunnel, Tunnel) {
            let identities = identities();
            let (tell, mut accepted) = mpsc::channel(1024);
            let server = accepting(identities.clone(), move |request: Request| {
                let tell = tell.clone();
                async move {
                    drop(tell.send(request.accept().unwrap()).await);
                }
            })
            .await;
            let dialer = dialer(&identities);
            let ours = soon(dialer.open(&server.to())).await.unwrap();
            let theirs = soon(accepted.recv()).await.unwrap();
            (dialer, server, ours, theirs)
        }
    };
}

mod hbone;
mod mesh;

/// A test must never hang: whatever is awaited has this long.
const LIMIT: Duration = Duration::from_secs(30);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what).await.expect("it happens in time")
}

/// An agent that accepts.
struct Accepting {
    addr: SocketAddr,
    failed: mpsc::Receiver<Failed>,
    drain: watch::Sender<bool>,
    task: JoinHandle<Result<(), TlsError>>,
}

/// Accepts as `world`, whatever name is asked for, and does with each request what `handler` does.
async fn accepting<H, F>(identities: Identities, handler: H) -> Accepting
where
    H: Fn(Request) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (tell, failed) = mpsc::channel(1024);
    let acceptance = Acceptance {
        presents: Arc::new(|_, _| Some(id("world"))),
        failed: Arc::new(move |failure| tell.try_send(failure).unwrap()),
        handshake_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(5),
    };
    let (drain, draining) = watch::channel(false);
    let task = tokio::spawn(serving(listener, identities, acceptance, handler, draining));
    Accepting { addr, failed, drain, task }
}

/// Serves on the calling runtime.
async fn serving<H, F>(
    listener: TcpListener,
    identities: Identities,
    acceptance: Acceptance,
    handler: H,
    drain: watch::Receiver<bool>,
) -> Result<(), TlsError>
where
    H: Fn(Request) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = Acceptor::new(listener.into_std().unwrap()).unwrap();
    let spawn = |connections: &mut JoinSet<()>, arrival: Arrival| {
        connections.spawn(arrival.run(handler.clone()));
    };
    serve(listener, identities, acceptance, spawn, drain).await
}

impl Accepting {
    /// A destination there, called by `web`.
    fn to(&self) -> To {
        self.to_as("web", &id("world"))
    }

    fn to_as(&self, from: &str, expect: &SpiffeId) -> To {
        To {
            agent: self.addr,
            authority: "10.90.1.11:8080".parse().unwrap(),
            from: id(from),
            expect: expect.clone(),
            elsewhere: false,
        }
    }

    async fn next_refusal(&mut self) -> Refusal {
        soon(self.failed.recv()).await.unwrap().error.refusal()
    }
}

/// Two agents of one trust domain share its CA.
fn identities() -> Identities {
    Identities::new(ca("demo.mesh"), DAY)
}
