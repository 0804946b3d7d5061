//! Docker as the source of tasks: events for speed, full lists for certainty.
//!
//! Subscribed first, listed then, so that nothing falls between; listed again every half minute and after every
//! reconnection. Talks to the daemon; what an answer means is [`Known`]'s to say.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bollard::{
    API_DEFAULT_VERSION, Docker,
    errors::Error,
    models::{ContainerInspectResponse, ContainerSummary, EventMessage},
    query_parameters::{EventsOptionsBuilder, InspectContainerOptions, ListContainersOptionsBuilder},
};
use futures_util::StreamExt as _;
use mesh_core::task::Task;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, info, warn};

use super::{
    Settings,
    container::Seen,
    known::{Known, Next},
    notice::Notice,
    sandbox::{self, Places},
};

/// Between full lists.
const LIST: Duration = Duration::from_secs(30);
/// How long the daemon may take over an answer: it gives none about a container that is just being started.
const ANSWER: Duration = Duration::from_secs(30);
/// Pauses between attempts to reach the daemon.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// Events of so long ago are asked for too: a task that was told to stop before we came takes at most so long
/// (ECS's stopTimeout is at most two minutes).
const PAST: Duration = Duration::from_secs(130);
/// Docker makes a namespace's file and mounts the namespace on it a moment later, which nobody tells.
const HUNT_EACH: Duration = Duration::from_millis(3);
const HUNT: Duration = Duration::from_millis(150);
/// After a cgroup appeared, its processes are looked at so often until one is in a namespace of its own. On a busy host
/// that takes long, and docker's file may come earlier or later.
const BY_PROCESS: Duration = Duration::from_millis(4);
/// Looks at this pace; what has not come by then comes at leisure or never.
const BRISK_LOOKS: u32 = 500;
const AT_LEISURE: Duration = Duration::from_millis(200);
/// An awsvpc namespace gets its interface soon after it was made.
const FIRST_LOOK: Duration = Duration::from_millis(20);
const LAST_LOOK: Duration = Duration::from_secs(1);
const LOOKS: u32 = 60;

/// Why the daemon is away.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    #[error("cannot reach docker at {}: is docker.service running, and may the agent use its socket?", .socket.display())]
    Connect { socket: PathBuf, source: Error },
    #[error("docker at {} cannot list its containers", .socket.display())]
    List { socket: PathBuf, source: Error },
    #[error("docker at {} broke off its events", .socket.display())]
    Events { socket: PathBuf, source: Error },
    #[error("docker at {} closed its events: it is stopping", .socket.display())]
    Closed { socket: PathBuf },
}

/// Keeps `tasks` up to date until nobody looks at it.
pub async fn run(settings: Settings, tasks: watch::Sender<Arc<Vec<Task>>>, connected: watch::Sender<bool>) {
    let places = Places {
        cgroup_root: settings.cgroup_root.clone(),
        netns_dir: settings.netns_dir.clone(),
        learnt_parent: None,
    };
    let own = settings.own_container.clone().or_else(sandbox::own_container);
    let mut observation = Observation {
        known: Known::new(places, own),
        notice: Notice::open(),
        tasks,
        complete: false,
        hunts: Vec::new(),
        by_process: None,
        in_vain: 0,
        looks: 0,
        look: None,
        settings,
    };
    let mut pause = FIRST_PAUSE;
    let mut told = false;
    while !observation.tasks.is_closed() {
        let error = observation.session(&connected).await;
        if connected.send_replace(false) {
            (pause, told) = (FIRST_PAUSE, false);
        }
        if !std::mem::replace(&mut told, true) {
            warn!(error = &error as &dyn std::error::Error, "docker is away, the tasks last known stay");
        }
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

struct Observation {
    settings: Settings,
    known: Known,
    notice: Notice,
    tasks: watch::Sender<Arc<Vec<Task>>>,
    /// Whether all containers have been seen once; before that, a container not seen is not one that is gone.
    complete: bool,
    /// New files in docker's namespace directory, and when to give up on each.
    hunts: Vec<(PathBuf, Instant)>,
    /// When to look for namespaces by process, and how often that was in vain.
    by_process: Option<Instant>,
    in_vain: u32,
    /// Attempts to find missing addresses, and when the next one is due.
    looks: u32,
    look: Option<Instant>,
}

/// One answer of the daemon.
enum Answer {
    List { asked: i128, result: Result<Vec<ContainerSummary>, Error> },
    Glance { asked: i128, result: Result<Vec<ContainerSummary>, Error> },
    Inspect { id: String, asked: i128, result: Result<Box<ContainerInspectResponse>, Error> },
}

/// Questions to the daemon that are under way.
struct Questions {
    docker: Docker,
    running: JoinSet<Answer>,
    /// Containers being inspected, and whether they are to be inspected again because something happened meanwhile.
    inspecting: BTreeMap<String, bool>,
    /// Containers of the first list whose answer is awaited.
    awaited: BTreeSet<String>,
    listed: bool,
}

impl Observation {
    /// From connecting until the connection breaks.
    async fn session(&mut self, connected: &watch::Sender<bool>) -> DockerError {
        let socket = self.settings.socket.clone();
        let docker = match connect(&socket.to_string_lossy()).await {
            Ok(docker) => docker,
            Err(source) => return DockerError::Connect { socket, source },
        };
        let since = nanoseconds(SystemTime::now()).saturating_sub(PAST.as_nanos().cast_signed());
        let filters = [("type", vec!["container"])].into();
        let since = format!("{}.{:09}", since / 1_000_000_000, since % 1_000_000_000);
        let mut events = docker.events(Some(EventsOptionsBuilder::new().since(&since).filters(&filters).build()));
        let mut questions = Questions {
            docker: docker.clone(),
            running: JoinSet::new(),
            inspecting: BTreeMap::new(),
            awaited: BTreeSet::new(),
            listed: false,
        };
        questions.list();
        let mut next_list = Instant::now() + LIST;
        loop {
            tokio::select! {
                biased;
                () = self.tasks.closed() => return DockerError::Closed { socket },
                event = events.next() => match event {
                    Some(Ok(event)) => self.event(&event, &mut questions),
                    Some(Err(source)) => return DockerError::Events { socket, source },
                    None => return DockerError::Closed { socket },
                },
                Some(answer) = questions.running.join_next() => match answer {
                    Ok(Answer::List { asked, result }) => match result {
                        Ok(list) => self.listed(&list, asked, &mut questions),
                        Err(source) => return DockerError::List { socket, source },
                    },
                    Ok(Answer::Glance { asked, result }) => self.glanced(asked, result),
                    Ok(Answer::Inspect { id, asked, result }) => self.inspected(&id, asked, result, &mut questions),
                    Err(error) => warn!(%error, "a question to docker was lost"),
                },
                Some(path) = self.notice.created.recv() => self.noticed(path),
                () = sleep(HUNT_EACH), if !self.hunts.is_empty() => {}
                () = until(self.by_process) => self.look_for_processes(),
                () = until(self.look) => self.look_for_addresses(),
                () = sleep_until(next_list) => {
                    questions.list();
                    next_list = Instant::now() + LIST;
                }
            }
            self.hunt();
            let answered = questions.listed && questions.awaited.is_empty();
            self.complete |= answered;
            self.publish();
            // After the tasks: whoever hears of the connection must find those that run, or it would take them for gone.
            if answered && !connected.send_replace(true) {
                info!(socket = %socket.display(), tasks = self.tasks.borrow().len(), "docker is connected");
            }
        }
    }

    fn event(&mut self, event: &EventMessage, questions: &mut Questions) {
        let (Some(action), Some(actor)) = (&event.action, &event.actor) else { return };
        let Some(id) = &actor.id else { return };
        let attribute = |name: &str| actor.attributes.as_ref()?.get(name).cloned();
        if !action.starts_with("exec_") {
            debug!(container = id, action, "docker event");
        }
        if self.known.event(id, action, event.time_nano.map(i128::from), attribute) == Next::Inspect {
            questions.inspect(id);
            if action == "create" {
                questions.glance(id);
            }
            self.find_cgroups();
        }
        self.look_again();
    }

    /// Enough to arm the container by, where it was started before docker could answer the inspect: that answer comes
    /// after the app's first instruction.
    fn glanced(&mut self, asked: i128, result: Result<Vec<ContainerSummary>, Error>) {
        // Inspect will tell.
        let Ok(list) = result else { return };
        for seen in list.into_iter().filter_map(|summary| Seen::glance(summary, asked)) {
            if !self.known.has(&seen.id) {
                debug!(container = seen.id, "container seen in a list");
                self.known.inspected(seen);
                self.find_cgroups();
                self.look_again();
            }
        }
    }

    fn listed(&mut self, list: &[ContainerSummary], asked: i128, questions: &mut Questions) {
        let ids: Vec<String> = list.iter().filter_map(|container| container.id.clone()).collect();
        self.known.listed(&ids, asked);
        for id in ids {
            if !self.known.is_settled(&id) {
                questions.inspect(&id);
                if !questions.listed {
                    questions.awaited.insert(id);
                }
            }
        }
        questions.listed = true;
        self.look_again();
    }

    fn inspected(
        &mut self,
        id: &str,
        asked: i128,
        result: Result<Box<ContainerInspectResponse>, Error>,
        questions: &mut Questions,
    ) {
        questions.awaited.remove(id);
        let outdated = questions.inspecting.remove(id).unwrap_or_default();
        match result {
            Ok(inspect) => {
                // Outdated is better than nothing, but no better than what events have told since.
                if let Some(seen) = Seen::read(*inspect, self.settings.host, asked)
                    && !(outdated && self.known.has(&seen.id))
                {
                    self.known.inspected(seen);
                    self.find_cgroups();
                    self.look_again();
                }
            }
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => self.known.gone(id),
            Err(error) => warn!(container = id, %error, "container not inspected, tried again with the next list"),
        }
        if outdated {
            questions.inspect(id);
        }
    }

    /// Something appeared in a watched directory.
    fn noticed(&mut self, path: PathBuf) {
        let deadline = Instant::now() + HUNT;
        let netns_dir = &self.known.places.netns_dir;
        if path.parent() == Some(netns_dir) {
            self.hunts.push((path, deadline));
            return;
        }
        if netns_dir.starts_with(&path)
            && let Ok(files) = std::fs::read_dir(netns_dir)
        {
            self.hunts.extend(files.filter_map(|file| Some((file.ok()?.path(), deadline))));
        }
        debug!(path = %path.display(), "directory appeared");
        self.known.cgroup_appeared(&path);
        self.look_for_processes_soon();
        self.find_cgroups();
    }

    fn look_for_processes_soon(&mut self) {
        self.by_process = Some(Instant::now() + BY_PROCESS);
        self.in_vain = 0;
    }

    fn look_for_processes(&mut self) {
        let (found, missing) = self.known.locate_by_process();
        self.in_vain += 1;
        let pause = if self.in_vain < BRISK_LOOKS { BY_PROCESS } else { AT_LEISURE };
        self.by_process = missing.then(|| Instant::now() + pause);
        if found {
            self.look_again();
        }
    }

    fn hunt(&mut self) {
        let now = Instant::now();
        let mut found = false;
        self.hunts.retain(|(file, deadline)| {
            let located = self.known.locate_namespace(file);
            found |= located;
            *deadline > now && !located
        });
        if found {
            self.look_again();
        }
    }

    fn find_cgroups(&mut self) {
        loop {
            if self.known.locate_cgroups() {
                self.look_for_processes_soon();
            }
            let netns_dir = self.known.places.netns_dir.clone();
            if !self.notice.watch(self.known.cgroup_parents().into_iter().chain([netns_dir])) {
                return;
            }
        }
    }

    fn look_again(&mut self) {
        self.looks = 0;
        self.look = Some(Instant::now());
    }

    fn look_for_addresses(&mut self) {
        let missing = self.known.locate_addresses();
        self.looks += 1;
        let pause = FIRST_LOOK.saturating_mul(1 << self.looks.min(6)).min(LAST_LOOK);
        self.look = (missing && self.looks < LOOKS).then(|| Instant::now() + pause);
    }

    fn publish(&self) {
        if !self.complete {
            return;
        }
        let now = self.known.tasks();
        self.tasks.send_if_modified(|last| {
            let changed = **last != now;
            if changed {
                *last = Arc::new(now);
            }
            changed
        });
    }
}

impl Questions {
    fn list(&mut self) {
        let docker = self.docker.clone();
        self.running.spawn(async move {
            let asked = nanoseconds(SystemTime::now());
            let options = ListContainersOptionsBuilder::new().all(true).build();
            Answer::List { asked, result: docker.list_containers(Some(options)).await }
        });
    }

    /// Asks for what can be had of a new container without waiting.
    fn glance(&mut self, id: &str) {
        let (docker, filters) = (self.docker.clone(), [("id", vec![id.to_owned()])].into());
        self.running.spawn(async move {
            let asked = nanoseconds(SystemTime::now());
            let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
            Answer::Glance { asked, result: docker.list_containers(Some(options)).await }
        });
    }

    /// One question at a time about one container.
    fn inspect(&mut self, id: &str) {
        if let Some(again) = self.inspecting.get_mut(id) {
            *again = true;
            return;
        }
        self.inspecting.insert(id.to_owned(), false);
        let (docker, id) = (self.docker.clone(), id.to_owned());
        self.running.spawn(async move {
            let asked = nanoseconds(SystemTime::now());
            let result = docker.inspect_container(&id, None::<InspectContainerOptions>).await.map(Box::new);
            Answer::Inspect { id, asked, result }
        });
    }
}

/// Speaks the newest version that both sides know.
async fn connect(socket: &str) -> Result<Docker, Error> {
    Docker::connect_with_unix(socket, ANSWER.as_secs(), API_DEFAULT_VERSION)?.negotiate_version().await
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// Docker's clock is ours: it runs on this host.
fn nanoseconds(time: SystemTime) -> i128 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos().cast_signed())
}

#[cfg(test)]
mod tests;
