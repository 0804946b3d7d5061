//! Against a daemon that speaks Docker's API on a real unix socket: JSON answers and a chunked stream of events.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use mesh_core::task::{ContainerHealth, Phase};
use serde_json::{Value, json};
use tokio::{
    net::UnixListener,
    sync::{broadcast, watch},
    time::timeout,
};

use super::*;
use crate::tasks::{Observer, observe};

/// Far more than any step needs, so that only lost news fails.
const PATIENCE: Duration = Duration::from_secs(10);

/// A daemon and its containers. It stops when dropped; what it knows can be given to the next.
struct Daemon {
    dir: PathBuf,
    shared: Arc<Shared>,
    serving: JoinSet<()>,
}

struct Shared {
    containers: Mutex<BTreeMap<String, Value>>,
    events: broadcast::Sender<String>,
    /// Inspects of a container that is being started wait for this, as dockerd's do.
    starting: watch::Sender<bool>,
}

impl Daemon {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ecs-mesh-docker-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(dir.join("netns")).unwrap();
        fs::create_dir_all(dir.join("cgroup")).unwrap();
        let shared = Arc::new(Shared {
            containers: Mutex::default(),
            events: broadcast::Sender::new(64),
            starting: watch::Sender::new(false),
        });
        Self { dir, shared, serving: JoinSet::new() }
    }

    fn started() -> Self {
        let mut daemon = Self::new();
        daemon.start();
        daemon
    }

    fn start(&mut self) {
        let listener = UnixListener::bind(self.dir.join("docker.sock")).unwrap();
        let shared = self.shared.clone();
        self.serving.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let shared = shared.clone();
                open.spawn(async move {
                    let service = service_fn(move |request| answer(shared.clone(), request));
                    http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.ok();
                });
            }
        });
    }

    async fn stop(&mut self) {
        self.serving.shutdown().await;
        fs::remove_file(self.dir.join("docker.sock")).unwrap();
    }

    fn observe(&self) -> Observer {
        observe(Settings {
            socket: self.dir.join("docker.sock"),
            cgroup_root: Some(self.dir.join("cgroup")),
            netns_dir: self.dir.join("netns"),
            host: "10.90.1.10".parse().unwrap(),
            own_container: None,
        })
    }

    fn put(&self, n: u8, status: &str, patch: &Value) {
        let mut answer: Value = serde_json::from_str(include_str!("../assemble/inspect.json")).unwrap();
        answer["Id"] = id(n).into();
        answer["Name"] = format!("/c{n}").into();
        answer["Config"]["Labels"] = json!({});
        answer["State"]["Status"] = status.into();
        answer["State"]["Pid"] = 0.into();
        answer["State"]["StartedAt"] = "2026-01-01T00:00:00Z".into();
        answer["NetworkSettings"]["SandboxKey"] = "".into();
        for (pointer, value) in patch.as_object().unwrap() {
            *answer.pointer_mut(pointer).unwrap() = value.clone();
        }
        self.shared.containers.lock().unwrap().insert(id(n), answer);
    }

    fn remove(&self, n: u8) {
        self.shared.containers.lock().unwrap().remove(&id(n));
    }

    fn say(&self, n: u8, action: &str, attributes: &Value) {
        let now = nanoseconds(SystemTime::now());
        let event = json!({"status": action, "id": id(n), "from": "web:3", "Type": "container", "Action": action,
            "Actor": {"ID": id(n), "Attributes": attributes}, "scope": "local",
            "time": i64::try_from(now / 1_000_000_000).unwrap(), "timeNano": i64::try_from(now).unwrap()});
        self.shared.events.send(format!("{event}\n")).unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.dir).ok();
    }
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let json = |value: &Value| {
        Response::builder()
            .header("content-type", "application/json")
            .body(Full::from(value.to_string()).boxed())
            .unwrap()
    };
    let path: Vec<&str> = request.uri().path().trim_start_matches('/').split('/').collect();
    Ok(match path[..] {
        [.., "version"] => json(&json!({"Version": "20.10.24", "ApiVersion": "1.41", "MinAPIVersion": "1.12"})),
        [.., "events"] => {
            assert!(request.uri().query().unwrap().contains("since="), "what happened before is asked for");
            let events = stream::unfold(shared.events.subscribe(), |mut events| async move {
                let event = events.recv().await.ok()?;
                Some((Ok(Frame::data(Bytes::from(event))), events))
            });
            Response::new(BodyExt::boxed(StreamBody::new(events)))
        }
        [.., "containers", "json"] => {
            assert!(request.uri().query().unwrap().contains("all=true"));
            let containers = shared.containers.lock().unwrap();
            let list = containers.iter().map(|(id, container)| {
                json!({"Id": id, "Names": [container["Name"]], "State": container["State"]["Status"],
                    "Labels": container["Config"]["Labels"],
                    "HostConfig": {"NetworkMode": container["HostConfig"]["NetworkMode"]}})
            });
            let list = list.collect();
            json(&Value::Array(list))
        }
        [.., "containers", id, "json"] => {
            shared.starting.subscribe().wait_for(|starting| !starting).await.unwrap();
            match shared.containers.lock().unwrap().get(id) {
                Some(container) => json(container),
                None => {
                    let mut answer = json(&json!({"message": "No such container"}));
                    *answer.status_mut() = hyper::StatusCode::NOT_FOUND;
                    answer
                }
            }
        }
        _ => panic!("not expected: {}", request.uri()),
    })
}

fn id(n: u8) -> String {
    format!("{n:02x}").repeat(32)
}

async fn expect(observer: &mut Observer, what: &str, wanted: impl Fn(&[Task]) -> bool) {
    let seen = timeout(PATIENCE, observer.tasks.wait_for(|tasks| wanted(tasks))).await.map(drop);
    assert!(seen.is_ok(), "{what}: {:#?}", observer.tasks.borrow());
}

async fn expect_connected(observer: &mut Observer, wanted: bool) {
    timeout(PATIENCE, observer.connected.wait_for(|connected| *connected == wanted)).await.unwrap().unwrap();
}

fn phases(tasks: &[Task]) -> Vec<(&str, Phase)> {
    tasks.iter().map(|task| (task.family.as_str(), task.phase)).collect()
}

#[tokio::test]
async fn a_container_is_followed_from_its_creation_to_its_end() {
    let daemon = Daemon::started();
    daemon.put(1, "running", &json!({}));
    let mut observer = daemon.observe();
    expect(&mut observer, "what runs is listed", |tasks| phases(tasks) == [("c1", Phase::Running)]).await;
    daemon.put(2, "created", &json!({}));
    daemon.say(2, "create", &json!({}));
    expect(&mut observer, "created", |tasks| phases(tasks).contains(&("c2", Phase::Created))).await;
    daemon.put(2, "running", &json!({}));
    daemon.say(2, "start", &json!({}));
    expect(&mut observer, "started", |tasks| phases(tasks).contains(&("c2", Phase::Running))).await;
    daemon.say(2, "kill", &json!({"signal": "1"}));
    daemon.put(1, "running", &json!({"/State": {"Status": "running", "Health": {"Status": "unhealthy"}}}));
    daemon.say(1, "health_status: unhealthy", &json!({}));
    let unhealthy = Some(ContainerHealth::Unhealthy);
    expect(&mut observer, "unhealthy", |tasks| tasks[0].containers[0].health == unhealthy).await;
    assert!(phases(&observer.tasks.borrow()).contains(&("c2", Phase::Running)), "SIGHUP does not stop");
    daemon.say(2, "kill", &json!({"signal": "15"}));
    expect(&mut observer, "told to stop", |tasks| phases(tasks).contains(&("c2", Phase::Stopping))).await;
    daemon.put(2, "exited", &json!({}));
    daemon.say(2, "die", &json!({"exitCode": "143"}));
    expect(&mut observer, "dead", |tasks| phases(tasks) == [("c1", Phase::Running)]).await;
    daemon.put(2, "running", &json!({}));
    daemon.say(2, "start", &json!({}));
    expect(&mut observer, "started again", |tasks| phases(tasks).contains(&("c2", Phase::Running))).await;
    daemon.remove(2);
    daemon.say(2, "destroy", &json!({}));
    expect(&mut observer, "removed", |tasks| phases(tasks) == [("c1", Phase::Running)]).await;
}

#[tokio::test]
async fn a_daemon_that_goes_away_leaves_what_was_known_and_is_listed_anew() {
    let mut daemon = Daemon::new();
    let mut observer = daemon.observe();
    assert!(!*observer.connected.borrow());
    daemon.put(1, "running", &json!({}));
    daemon.put(2, "running", &json!({}));
    daemon.start();
    expect_connected(&mut observer, true).await;
    expect(&mut observer, "both", |tasks| tasks.len() == 2).await;
    daemon.stop().await;
    expect_connected(&mut observer, false).await;
    assert_eq!(observer.tasks.borrow().len(), 2, "the last state is kept");
    // Nobody tells of this.
    daemon.remove(1);
    daemon.put(3, "running", &json!({}));
    daemon.start();
    let wanted = [("c2", Phase::Running), ("c3", Phase::Running)];
    expect(&mut observer, "vanished and new", |tasks| phases(tasks) == wanted).await;
    expect_connected(&mut observer, true).await;
}

#[tokio::test]
async fn a_cgroup_is_known_before_docker_answers_again() {
    let daemon = Daemon::started();
    let mut observer = daemon.observe();
    expect_connected(&mut observer, true).await;
    let host =
        json!({"/HostConfig/NetworkMode": "host", "/HostConfig/CgroupParent": "/ecstasks.slice/ecstasks-1.slice"});
    daemon.put(1, "created", &host);
    daemon.say(1, "create", &json!({}));
    expect(&mut observer, "created", |tasks| phases(tasks) == [("c1", Phase::Created)]).await;
    daemon.shared.starting.send_replace(true);
    let leaf = make_cgroup(&daemon.dir, 1);
    expect(&mut observer, "cgroup", |tasks| tasks[0].containers[0].cgroup.as_ref() == Some(&leaf)).await;
    daemon.put(1, "running", &host);
    daemon.say(1, "start", &json!({}));
    daemon.shared.starting.send_replace(false);
    expect(&mut observer, "running", |tasks| phases(tasks) == [("c1", Phase::Running)]).await;
    assert_eq!(observer.tasks.borrow()[0].containers[0].cgroup.as_ref(), Some(&leaf));
    // It dies and is started again: the new cgroup tells before docker does.
    fs::remove_dir(&leaf).unwrap();
    daemon.put(1, "exited", &host);
    daemon.say(1, "die", &json!({"exitCode": "1"}));
    expect(&mut observer, "dead", <[Task]>::is_empty).await;
    fs::create_dir(&leaf).unwrap();
    let armed = |tasks: &[Task]| phases(tasks) == [("c1", Phase::Created)];
    expect(&mut observer, "about to start again", armed).await;
    assert_eq!(observer.tasks.borrow()[0].containers[0].cgroup.as_ref(), Some(&leaf));
}

#[tokio::test]
async fn a_container_that_is_started_before_docker_answers_an_inspect_is_known_in_time() {
    let daemon = Daemon::started();
    let mut observer = daemon.observe();
    expect_connected(&mut observer, true).await;
    daemon.shared.starting.send_replace(true);
    let arn = "arn:aws:ecs:eu-west-1:123456789012:task/demo/1";
    let labels = json!({"com.amazonaws.ecs.task-arn": arn, "com.amazonaws.ecs.task-definition-family": "web"});
    let host = json!({"/HostConfig/NetworkMode": "host", "/Config/Labels": labels,
        "/HostConfig/CgroupParent": "/ecstasks.slice/ecstasks-1.slice"});
    daemon.put(1, "created", &host);
    daemon.say(1, "create", &json!({}));
    expect(&mut observer, "created", |tasks| phases(tasks) == [("web", Phase::Created)]).await;
    let leaf = make_cgroup(&daemon.dir, 1);
    expect(&mut observer, "cgroup", |tasks| tasks[0].containers[0].cgroup.as_ref() == Some(&leaf)).await;
    daemon.put(1, "running", &host);
    daemon.say(1, "start", &json!({}));
    daemon.shared.starting.send_replace(false);
    expect(&mut observer, "running", |tasks| phases(tasks) == [("web", Phase::Running)]).await;
    let ports = observer.tasks.borrow()[0].containers[0].exposed.clone();
    assert!(!ports.is_empty(), "what only an inspect tells is learnt too");
}

fn make_cgroup(dir: &Path, n: u8) -> PathBuf {
    let leaf = dir.join("cgroup/ecstasks.slice/ecstasks-1.slice").join(format!("docker-{}.scope", id(n)));
    fs::create_dir_all(&leaf).unwrap();
    leaf
}

#[tokio::test]
async fn the_first_list_is_complete() {
    let daemon = Daemon::started();
    for n in 1..=20 {
        daemon.put(n, "running", &json!({}));
    }
    let mut observer = daemon.observe();
    timeout(PATIENCE, observer.tasks.changed()).await.unwrap().unwrap();
    assert_eq!(observer.tasks.borrow_and_update().len(), 20, "a part would look as if the rest had gone");
}

#[tokio::test]
async fn who_hears_that_docker_is_connected_finds_its_tasks() {
    let daemon = Daemon::started();
    for n in 1..=2 {
        daemon.put(n, "running", &json!({}));
    }
    daemon.shared.starting.send_replace(true);
    let mut observer = daemon.observe();
    // The list is answered, and both containers are being asked about.
    while daemon.shared.starting.receiver_count() < 2 {
        tokio::task::yield_now().await;
    }
    assert!(!*observer.connected.borrow(), "an empty list of tasks would disarm those that an earlier agent armed");
    daemon.shared.starting.send_replace(false);
    expect_connected(&mut observer, true).await;
    assert_eq!(observer.tasks.borrow().len(), 2);
}

#[test]
fn old_events_are_no_news_but_an_old_signal_is() {
    let places = Places { cgroup_root: None, netns_dir: PathBuf::new(), learnt_parent: None };
    let mut known = Known::new(places, None);
    let daemon_says = |as_of: i128| {
        let mut answer: Value = serde_json::from_str(include_str!("../assemble/inspect.json")).unwrap();
        answer["Id"] = id(1).into();
        answer["State"]["StartedAt"] = "1970-01-01T00:00:00.0000001Z".into();
        Seen::read(serde_json::from_value(answer).unwrap(), "10.0.0.1".parse().unwrap(), as_of).unwrap()
    };
    let signal = |name: &str| (name == "signal").then(|| "15".to_owned());
    let phase = |known: &Known| known.tasks().first().map(|task| task.phase);
    // Killed in a former life.
    known.event(&id(1), "kill", Some(50), signal);
    known.inspected(daemon_says(1000));
    assert_eq!(phase(&known), Some(Phase::Running));
    assert_eq!(known.event(&id(1), "die", Some(60), |_| None), Next::Nothing);
    assert_eq!(phase(&known), Some(Phase::Running));
    // Killed in this one, before anybody looked.
    known.gone(&id(1));
    known.event(&id(1), "kill", Some(500), signal);
    known.inspected(daemon_says(1000));
    assert_eq!(phase(&known), Some(Phase::Stopping));
    assert_eq!(known.event(&id(1), "die", Some(2000), |_| None), Next::Inspect);
    assert_eq!(phase(&known), None);
}
