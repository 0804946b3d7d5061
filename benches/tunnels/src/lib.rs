//! What a tunnel costs both its ends: to open, for a short message, for a full frame.
//!
//! Both ends are the agent's own, in one thread, over loopback: TLS, HTTP/2, the pool and the run-time. Must not know how
//! anything is measured.
#![expect(clippy::unwrap_used, reason = "what cannot be set up cannot be counted")]

use std::{
    env, fs,
    future::poll_fn,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use mesh_core::id::SpiffeId;
use mesh_transport::{
    identity::{
        Identities,
        local_ca::{self, LocalCa},
    },
    sys::socket::Acceptor,
    transport::{
        To,
        accept::{Acceptance, Arrival, Request, serve},
        dial::{Dialer, Settings},
        tunnel::{LARGEST_FRAME, Tunnel},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    runtime::{Builder, Runtime},
    sync::{mpsc, watch},
    task::JoinSet,
};

const HOUR: Duration = Duration::from_secs(3600);
const SHORT: usize = 100;

/// Something that two agents do, again and again.
pub struct Case {
    pub name: &'static str,
    /// What it is, for a table.
    pub about: &'static str,
    pub make: fn() -> Box<dyn FnMut()>,
}

/// Everything that is measured.
pub const CASES: [Case; 3] = [
    Case { name: "tunnel_open", about: "a tunnel on an open connection, opened and closed, both ends", make: opening },
    Case { name: "tunnel_message", about: "100 bytes there and 100 back, both ends", make: messages },
    Case { name: "tunnel_frame", about: "a full frame of 64 KiB, sent and received", make: frames },
];

/// Two agents of one trust domain in one thread.
struct Agents {
    runtime: Runtime,
    dialer: Dialer,
    to: To,
    /// The called one's ends.
    taken: mpsc::Receiver<Tunnel>,
    _drain: watch::Sender<bool>,
}

impl Agents {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let identities = Identities::new(authority(), HOUR);
        let (give, taken) = mpsc::channel(1);
        let (drain, draining) = watch::channel(false);
        let (dialer, agent) = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let agent = listener.local_addr().unwrap();
            let listener = Acceptor::new(listener.into_std().unwrap()).unwrap();
            let acceptance = Acceptance {
                presents: Arc::new(|_, _| Some(id("called"))),
                failed: Arc::new(|failed| panic!("{failed:?}")),
                handshake_timeout: HOUR,
                drain: HOUR,
            };
            let spawn = move |connections: &mut JoinSet<()>, arrival: Arrival| {
                let give = give.clone();
                connections.spawn(arrival.run(move |request: Request| {
                    let give = give.clone();
                    async move { drop(give.send(request.accept().unwrap()).await) }
                }));
            };
            tokio::spawn(serve(listener, identities.clone(), acceptance, spawn, draining));
            (Dialer::new(identities, Settings::default()).unwrap(), agent)
        });
        let authority = SocketAddr::from(([10, 90, 1, 11], 8080));
        let to = To { agent, authority, from: id("caller"), expect: id("called"), elsewhere: true };
        Self { runtime, dialer, to, taken, _drain: drain }
    }

    fn tunnel(&mut self) -> (Tunnel, Tunnel) {
        self.runtime.block_on(async {
            let ours = self.dialer.open(&self.to).await.unwrap();
            (ours, self.taken.recv().await.unwrap())
        })
    }
}

fn id(service: &str) -> SpiffeId {
    format!("spiffe://bench.mesh/ns/bench/sa/{service}").parse().unwrap()
}

/// A CA whose files are gone when this returns.
fn authority() -> LocalCa {
    let folder = env::temp_dir().join(format!("mesh-tunnels-{}", std::process::id()));
    let created = local_ca::init(&"bench.mesh".parse().unwrap(), &folder, SystemTime::now()).unwrap();
    let authority = LocalCa::open(&created.bundle, &created.token).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    authority
}

fn opening() -> Box<dyn FnMut()> {
    let mut agents = Agents::new();
    Box::new(move || {
        let (mut ours, mut theirs) = agents.tunnel();
        agents.runtime.block_on(async {
            for end in [&mut ours, &mut theirs] {
                end.shutdown().await.unwrap();
            }
            for end in [&mut ours, &mut theirs] {
                assert_eq!(end.read(&mut [0]).await.unwrap(), 0);
            }
        });
    })
}

fn messages() -> Box<dyn FnMut()> {
    let mut agents = Agents::new();
    let (mut ours, mut theirs) = agents.tunnel();
    let mut heard = [0; SHORT];
    Box::new(move || {
        agents.runtime.block_on(async {
            ours.write_all(&[7; SHORT]).await.unwrap();
            theirs.read_exact(&mut heard).await.unwrap();
            theirs.write_all(&heard).await.unwrap();
            ours.read_exact(&mut heard).await.unwrap();
        });
    })
}

fn frames() -> Box<dyn FnMut()> {
    let mut agents = Agents::new();
    let (mut ours, mut theirs) = agents.tunnel();
    let frame = Bytes::from(vec![7; LARGEST_FRAME]);
    Box::new(move || {
        agents.runtime.block_on(async {
            let mut rest = frame.clone();
            while !rest.is_empty() {
                poll_fn(|cx| ours.poll_send(cx, &mut rest)).await.unwrap();
            }
            let mut due = LARGEST_FRAME;
            while due > 0 {
                let piece = poll_fn(|cx| theirs.poll_data(cx)).await.unwrap();
                due -= piece.map_or(due, |piece| piece.len());
            }
        });
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_can_be_repeated() {
        for case in CASES {
            let mut done = (case.make)();
            (0..3).for_each(|_| done());
        }
    }
}
