//! The composition root: the life of the daemon, from top to bottom. Every channel between the layers is made here.
//!
//! Facts flow down (docker, files → control → snapshot → kernel maps, listeners), connections flow through the proxy, and
//! everybody reports to telemetry. Must not decide, nor do anything by itself.

mod control;
mod events;
pub mod host;
mod only;
mod status;

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    num::NonZero,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ipnet::{Ipv4Net, Ipv6Net};
use mesh_common::maps::{Knobs, knobs};
use mesh_core::{
    config::{Config, discovery::SourceName, ecs::Ecs},
    ecs::entries::Mesh,
    id::{ClusterName, InvalidName, ServiceName, SpiffeId, TaskId},
    lull::Lull,
    merge::Merged,
    readiness::Gate,
    task::Task,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::{
    admin::{Admin, AdminError, Handles},
    discovery::{
        self, Backend, Registrar,
        cloud_map::registrar as cloud_map,
        consul::{SetUpError, registrar as consul},
        ecs,
    },
    dns::DnsCounters,
    identity::{Identities, IdentityError},
    proxy::{
        self, Proxy,
        places::Namespaces,
        workers::{WorkerError, Workers},
    },
    readiness,
    reconciler::{Reconciler, Servers, StartError, serve_tunnels},
    state::{self, Published},
    sys::{
        bpf::{BpfError, Pins, Programs},
        events as kernel_events,
        maps::{Pulse, WriteError},
        memory, socket,
    },
    tasks,
    telemetry::{
        Telemetry,
        access::{Access, Destination, Source},
        metrics::{Direction, DnsOutcome, Outcome, Protocol, SourceFigures},
    },
    transport::{
        dial::{Dialer, Settings, marked_socket},
        tls::{Presents, TlsError, sni_of},
    },
};

use control::Control;
use host::HostError;
use only::Only;
pub use only::OnlyError;
use status::StatusSource;

/// The service part of the agent's own identity.
const OWN_SERVICE: &str = "ecs-mesh-agent";
/// Heartbeats in the time after which the hooks take the agent for hung.
const BEATS_PER_LIMIT: u32 = 6;
/// Beyond its drain, what an agent needs to stop: also to take its tasks out of a registry that is slow.
const STOPPING: Duration = Duration::from_secs(10);
/// How often connections are counted, to see whether a burst of them has ended.
const LOOK: Duration = Duration::from_secs(1);
/// Containers that may wait to be stopped.
const STOPS: usize = 16;
/// Kernel reports that may wait to be recorded; beyond, they wait in the ring buffer.
const REPORTS: usize = 4096;

/// The agent could not start. Nothing is attached then.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Only(#[from] OnlyError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("cannot form the agent's own identity")]
    OwnIdentity(#[from] InvalidName),
    #[error("cannot set up TLS")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Workers(#[from] WorkerError),
    #[error("cannot listen for tunnels on {addr}: free the port, or set `proxy.tunnel_listen`")]
    TunnelPort { addr: SocketAddr, source: io::Error },
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error("tasks could never be registered with Consul")]
    Consul(#[from] SetUpError),
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Reconciler(#[from] StartError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cannot read the cookie of the host's network namespace: SO_NETNS_COOKIE needs Linux 5.14")]
    Namespace(#[source] io::Error),
    #[error("cannot give a sign of life to the kernel programs")]
    Pulse(#[source] aya::maps::MapError),
    #[error("the control loop has ended by itself, so tasks would no longer be followed: start the agent again")]
    ControlEnded(#[source] Option<tokio::task::JoinError>),
}

/// Runs the agent until `stop` completes. `ready` is called once, when the tasks of this host are armed.
///
/// # Errors
/// Something that the agent cannot do without is missing, or has ended. What was made is undone; only what is in the kernel stays
/// when the control loop ends by itself.
pub async fn run(
    config: Config,
    telemetry: Telemetry,
    ready: impl FnOnce() + Send + 'static,
    stop: impl Future<Output = ()>,
) -> Result<(), AgentError> {
    let started = Instant::now();
    let _only = Only::wait(&config.host.state_dir, config.proxy.drain + STOPPING).await?;

    // Who and where we are.
    let host = host::facts(&config).await?;
    let config = host::name_after_all(config, &host.cluster);
    let config = Arc::new(host::search_as_the_host(config, &host.search));
    let identities = Identities::open(&config.identity)?;
    let own = SpiffeId::new(&config.identity.trust_domain, &host.cluster, &OWN_SERVICE.parse::<ServiceName>()?)?;
    identities.leaf(&own)?;

    // The kernel's half: loaded and verified, not yet attached.
    let (mut programs, maps, mut readers) =
        Programs::load(Pins::new(config.kernel.pin_dir.clone()), host.cgroup_root.clone())?;

    // What is known, and who tells it.
    let (publisher, published) = state::publish();
    let discovery = discovery::run(backends(&config, &host.cluster), &published.uses);
    let observer = tasks::observe(tasks::Settings {
        socket: config.docker.socket.clone(),
        cgroup_root: Some(host.cgroup_root.clone()),
        netns_dir: Path::new(tasks::NETNS_DIR).into(),
        host: host.address,
        own_container: None,
    });

    let registrars = registrars(&config, host.address)?;

    // The way of a connection: listeners in namespaces, the proxy, tunnels.
    let namespaces = match programs.knows_unread {
        true => Namespaces::watched(readers.closes.clone()).map_err(AgentError::Namespace)?,
        false => Namespaces::default(),
    };
    let namespaces = Arc::new(namespaces);
    let workers = Arc::new(workers(&config, &identities, &published, &namespaces, &telemetry)?);
    let (drain, draining) = watch::channel(false);
    let servers = Servers {
        config: config.clone(),
        workers: workers.clone(),
        namespaces,
        flows: readers.flows.clone(),
        published: published.clone(),
        identities: identities.clone(),
        resolvers: host.resolvers.clone().into(),
        dns_counters: Arc::new(DnsCounters::default()),
        failed: failed_tunnels(&telemetry),
        drain: draining,
    };
    let addr = config.proxy.tunnel_listen;
    let tunnels = socket::tcp_listener(addr).map_err(|source| AgentError::TunnelPort { addr, source })?;

    // Those who look at it.
    let (armed_sender, armed) = watch::channel(None);
    let (ports_sender, ports) = watch::channel(Vec::new());
    let status = Arc::new(StatusSource {
        config: config.clone(),
        host: host.clone(),
        started,
        published: published.clone(),
        identities: identities.clone(),
        sources: discovery.status.clone(),
        registered: registrars.iter().map(|it| (it.name(), it.status())).collect(),
        tasks: observer.tasks.clone(),
        ports,
        connected: observer.connected.clone(),
        armed: armed.clone(),
        counters: readers.counters,
        heart: readers.heart,
    });
    let figures = figures(&telemetry, &status, &servers.dns_counters, &workers);
    let admin =
        Admin::bind(&config.admin, handles(&config, &published, &workers, &status, figures, &telemetry)).await?;

    // Attach. From here on, an error must detach again.
    let mut reconciler = Reconciler::new(maps, servers.clone())?;
    readers.pulse.beat().map_err(AgentError::Pulse)?;
    reconciler.set_knobs(&knobs(&config, host.own_cgroup))?;
    if let Err(error) = programs.attach() {
        programs.remove()?;
        return Err(error.into());
    }
    tracing::info!(
        host = %host.address,
        cluster = host.cluster.as_str(),
        cgroup = %host.cgroup_root.display(),
        adopted = programs.adopted,
        "kernel programs attached"
    );

    // Everything runs.
    let (report, reports) = mpsc::channel(REPORTS);
    let mut running = JoinSet::new();
    running.spawn(beat(readers.pulse, workers.clone(), config.kernel.heartbeat_limit / BEATS_PER_LIMIT));
    running.spawn(give_back_after_bursts(workers.clone()));
    running.spawn(async move {
        if let Err(error) = kernel_events::forward(readers.events, report).await {
            tracing::error!(%error, "kernel reports are not read");
        }
    });
    running.spawn(events::record(reports, published.clone(), telemetry.clone()));
    running.spawn(identities.clone().keep_fresh());
    let for_registrar = published.clone();
    running.spawn(serve_tunnels(servers.clone(), tunnels, presents(published, own.clone())));
    running.spawn(tell_ready(armed.clone(), ready));
    let (gate_sender, gate) = watch::channel(Gate::default());
    let (stop_task, stops) = mpsc::channel(STOPS);
    running.spawn(tasks::stop::run(config.docker.socket.clone(), stops));
    let probed = readiness::Sources {
        readiness: config.readiness.clone(),
        published: for_registrar.clone(),
        tasks: observer.tasks.clone(),
        namespaces: servers.namespaces.clone(),
        armed: armed.clone(),
    };
    let listeners = readiness::Listeners { gate: gate_sender, ports: ports_sender, stop: stop_task };
    running.spawn(readiness::run(probed, listeners));
    let (withdraw, withdrawing) = watch::channel(false);
    let facts = (for_registrar, observer.tasks.clone());
    let register = |it| tokio::spawn(register(it, armed.clone(), facts.clone(), withdrawing.clone()));
    let registering: Vec<_> = registrars.into_iter().map(register).collect();
    let stopped = drain.subscribe();
    running.spawn(admin.run(async move {
        let mut stopped = stopped;
        // Also when the sender is gone: then the agent is stopping too.
        drop(stopped.wait_for(|stopped| *stopped).await);
    }));
    let (control_stop, control_stopped) = watch::channel(false);
    let control = Control {
        config: config.clone(),
        host,
        publisher,
        reconciler,
        identities,
        own,
        tasks: observer.tasks.clone(),
        connected: observer.connected.clone(),
        sets: discovery.sets.clone(),
        gate: Some(gate),
        metrics: telemetry.metrics.clone(),
        armed: armed_sender,
        merged: Merged::default(),
    };
    let mut control = tokio::spawn(control.run(control_stopped));

    // Stop: no other host shall send anything new. Listeners first, so that the hooks fail open; then what is under way; then every trace. The reconciler holds
    // what is armed, and with it the connections, so it is let go last.
    let controlled = tokio::select! {
        () = stop => {
            withdraw.send_replace(true);
            control_stop.send_replace(true);
            control.await.map_err(Some)
        }
        // Nobody told it to.
        ended = &mut control => Err(ended.err()),
    };
    tracing::info!(connections = workers.connections(), "stopping");
    workers.drain();
    drain.send_replace(true);
    if tokio::time::timeout(config.proxy.drain, workers.idle()).await.is_err() {
        tracing::warn!(connections = workers.connections(), "connections are cut off: they outlasted `proxy.drain`");
    }
    drop(withdraw);
    for registering in registering {
        if let Err(error) = registering.await {
            tracing::error!(%error, "the tasks of this host may still be registered");
        }
    }
    if let Err(ended) = controlled {
        // As after a crash: what is in the kernel goes on deciding, and the next start adopts it. Without it, what is denied
        // would be allowed, and what must be encrypted sent in the clear.
        running.shutdown().await;
        return Err(AgentError::ControlEnded(ended));
    }
    programs.remove()?;
    running.shutdown().await;
    tracing::info!("stopped; nothing is left in the kernel");
    Ok(())
}

/// The threads that carry connections, each with tunnels of its own.
fn workers(
    config: &Config,
    identities: &Identities,
    published: &Published,
    namespaces: &Arc<Namespaces>,
    telemetry: &Telemetry,
) -> Result<Workers, AgentError> {
    let settings = Settings {
        connect_timeout: config.proxy.connect_timeout,
        socket: Arc::new(marked_socket),
        ..Settings::default()
    };
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    let count = config.proxy.threads.and_then(|count| usize::try_from(count).ok()).unwrap_or(cpus);
    let mut first: Option<Arc<Proxy>> = None;
    Workers::start(count, || {
        let dialer = Dialer::new(identities.clone(), settings.clone())?;
        let proxy = match &first {
            Some(first) => first.sibling(dialer),
            None => Proxy::new(
                published.clone(),
                dialer,
                namespaces.clone(),
                telemetry.clone(),
                config.proxy.connect_timeout,
            ),
        };
        first.get_or_insert(proxy.clone());
        Ok(proxy)
    })
}

fn backends(config: &Config, cluster: &ClusterName) -> Vec<Backend> {
    let source = |name: &SourceName| match name {
        SourceName::File => config.services_file.as_ref().map(|path| Backend::StaticFile { path: path.clone() }),
        SourceName::Consul => config.discovery.consul.clone().map(|consul| Backend::Consul(Arc::new(consul))),
        SourceName::Ecs => config.discovery.ecs.clone().map(|it| Backend::Ecs(Arc::new(ecs(config, it, cluster)))),
        SourceName::CloudMap => config.discovery.cloud_map.clone().map(|it| Backend::CloudMap(Arc::new(it))),
    };
    config.discovery.order.iter().filter_map(source).collect()
}

fn ecs(config: &Config, ecs: Ecs, own: &ClusterName) -> ecs::Source {
    let clusters = if ecs.clusters.is_empty() { vec![own.clone()] } else { ecs.clusters.clone() };
    let mesh = Mesh {
        trust_domain: config.identity.trust_domain.clone(),
        enrol: config.enrol.clone(),
        suffixes: config.dns.suffixes.clone(),
    };
    ecs::Source { config: ecs, clusters, mesh }
}

/// Whoever registers tasks of this host.
fn registrars(config: &Config, host: IpAddr) -> Result<Vec<Registrar>, AgentError> {
    let tunnel = SocketAddr::new(host, config.proxy.tunnel_listen.port());
    let mut all = Vec::new();
    if let Some(consul) = &config.discovery.consul
        && let Some(registration) = &consul.registration
    {
        let registrar = consul::Registrar::new(&Arc::new(consul.clone()), registration.clone(), tunnel)?;
        all.push(Registrar::Consul(registrar));
    }
    if let Some(cloud_map) = &config.discovery.cloud_map
        && let Some(registration) = &cloud_map.registration
    {
        let registrar = cloud_map::Registrar::new(&Arc::new(cloud_map.clone()), registration.clone(), tunnel);
        all.push(Registrar::CloudMap(registrar));
    }
    Ok(all)
}

/// Registers once the tasks of this host are known: before, an empty list means nothing.
async fn register(
    registrar: Registrar,
    mut armed: watch::Receiver<Option<BTreeSet<TaskId>>>,
    (published, tasks): (Published, watch::Receiver<Arc<Vec<Task>>>),
    mut withdrawing: watch::Receiver<bool>,
) {
    let known = tokio::select! {
        known = armed.wait_for(Option::is_some) => known.is_ok(),
        _ = withdrawing.wait_for(|stop| *stop) => false,
    };
    if known {
        registrar.run(published, tasks, withdrawing).await;
    }
}

fn failed_tunnels(telemetry: &Telemetry) -> Arc<dyn Fn(crate::transport::accept::Failed) + Send + Sync> {
    let telemetry = telemetry.clone();
    Arc::new(move |failed| {
        let src = Source { addr: Some(failed.remote), ..Source::default() };
        let dst = Destination { addr: Some(failed.local), ..Destination::default() };
        let mut access = Access::begin(&telemetry, Direction::Inbound, Protocol::Tcp, src, dst);
        access.refusal = Some(failed.error.refusal());
        access.outcome = Outcome::Refused;
        tracing::warn!(
            src.addr = %failed.remote,
            error = &failed.error as &dyn std::error::Error,
            "a tunnel was refused"
        );
    })
}

/// Whose certificate the host's own tunnel listener shows: the workload that the peer expects, told by SNI. Without
/// one, or where nobody here is expected, the only workload there is, or the agent itself: the peer then sees who is
/// here and can say so, which a closed connection would not tell it.
fn presents(published: Published, own: SpiffeId) -> Arc<Presents> {
    Arc::new(move |_, sni| {
        let snapshot = published.load();
        let identities = || snapshot.workloads.values().map(|workload| &workload.identity);
        let expected = sni.and_then(|sni| identities().chain([&own]).find(|id| sni_of(id) == sni));
        let only = || {
            let mut identities = identities();
            let first = identities.next();
            first.filter(|first| identities.all(|other| other == *first))
        };
        Some(expected.or_else(only).unwrap_or(&own).clone())
    })
}

fn handles(
    config: &Config,
    published: &Published,
    workers: &Arc<Workers>,
    status: &Arc<StatusSource>,
    figures: impl Fn() + Send + Sync + 'static,
    telemetry: &Telemetry,
) -> Handles {
    let (load, now) = (workers.clone(), workers.clone());
    let (for_status, for_ready) = (status.clone(), status.clone());
    let metrics = telemetry.metrics.clone();
    Handles {
        snapshot: published.clone(),
        status: Arc::new(move || for_status.status()),
        metrics: Arc::new(move || {
            figures();
            metrics.encode()
        }),
        ready: Arc::new(move || for_ready.ready()),
        load: Arc::new(move |endpoint| load.load(endpoint)),
        now: Arc::new(move || now.now()),
        draw: Arc::new(proxy::draw),
        dns: config.dns.clone(),
        vips: config.vip.clone(),
    }
}

/// Takes the counters of others over into the metrics, each time that these are asked for.
fn figures(
    telemetry: &Telemetry,
    status: &Arc<StatusSource>,
    dns: &Arc<DnsCounters>,
    workers: &Arc<Workers>,
) -> impl Fn() + Send + Sync + 'static {
    let (metrics, status, dns, workers) = (telemetry.metrics.clone(), status.clone(), dns.clone(), workers.clone());
    move || {
        let total = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        metrics.kernel(&status.counters());
        metrics.dns(&[
            (DnsOutcome::Mesh, total(&dns.mesh)),
            (DnsOutcome::Forwarded, total(&dns.forwarded)),
            (DnsOutcome::Failed, total(&dns.failed)),
            (DnsOutcome::Overload, total(&dns.overload)),
            (DnsOutcome::Malformed, total(&dns.garbage)),
        ]);
        for (name, source) in status.source_figures() {
            let figures = SourceFigures {
                age: source.last_answer().map(|at| at.elapsed()),
                answers: total(&source.answers),
                errors: total(&source.errors),
                watches: source.watches.load(Ordering::Relaxed),
                services: source.services.load(Ordering::Relaxed),
            };
            metrics.source(&name, &figures);
        }
        metrics.local_ports(&status.local_ports());
        for (registry, count, all) in status.registered() {
            metrics.registered(registry, count, all);
        }
        let tunnels = workers.tunnels();
        metrics.tunnels(tunnels.handshakes, tunnels.connections, tunnels.streams);
    }
}

fn knobs(config: &Config, agent_cgroup: u64) -> Knobs {
    let Ipv4Prefix { net: vip4, mask: vip4_mask } = config.vip.v4.into();
    let Ipv6Prefix { net: vip6, mask: vip6_mask } = config.vip.v6.into();
    Knobs {
        abi: mesh_common::ABI_VERSION,
        flags: knobs::DNS,
        agent_cgroup,
        heartbeat_limit_ns: u64::try_from(config.kernel.heartbeat_limit.as_nanos()).unwrap_or(u64::MAX),
        vip4,
        vip4_mask,
        vip6,
        vip6_mask,
        proxy_port: config.proxy.outbound_port,
        dns_port: config.dns.port,
        mark: socket::MARK,
    }
}

struct Ipv4Prefix {
    net: [u8; 4],
    mask: [u8; 4],
}

struct Ipv6Prefix {
    net: [u8; 16],
    mask: [u8; 16],
}

impl From<Ipv4Net> for Ipv4Prefix {
    fn from(net: Ipv4Net) -> Self {
        Self { net: net.network().octets(), mask: net.netmask().octets() }
    }
}

impl From<Ipv6Net> for Ipv6Prefix {
    fn from(net: Ipv6Net) -> Self {
        Self { net: net.network().octets(), mask: net.netmask().octets() }
    }
}

/// Shows the hooks that the agent is alive. A runtime that hangs does not get here, nor does one that waits for a worker
/// that hangs.
async fn beat(mut pulse: Pulse, workers: Arc<Workers>, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    loop {
        ticks.tick().await;
        workers.answered().await;
        if let Err(error) = pulse.beat() {
            tracing::error!(%error, "cannot give a sign of life; the kernel will take the agent for dead");
        }
    }
}

/// Gives memory back when connections that were many have ended. The C library keeps what they held, each thread for itself, so
/// what one kind of load has left would lie beside what the next one needs.
async fn give_back_after_bursts(workers: Arc<Workers>) {
    let (mut ticks, mut lull) = (tokio::time::interval(LOOK), Lull::default());
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if lull.look(workers.connections()) {
            memory::give_back();
        }
    }
}

async fn tell_ready(mut armed: watch::Receiver<Option<BTreeSet<TaskId>>>, ready: impl FnOnce()) {
    if armed.wait_for(Option::is_some).await.is_ok() {
        ready();
    }
}
