//! The static file through the seam, as the agent uses it: real files, real inotify.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use mesh_core::services::ServiceSet;
use tokio::time::timeout;

use crate::discovery::{Backend, Discovery, SourceStatus, run};
use crate::state::uses::Uses;

/// Far more than inotify needs, so that only a lost change fails.
const PATIENCE: Duration = Duration::from_secs(10);

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ecs-mesh-file-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn service(name: &str) -> String {
    format!("[[service]]\nname = \"{name}\"\nports = [ {{ port = 80 }} ]\n")
}

fn watch(path: &Path) -> Discovery {
    run(vec![Backend::StaticFile { path: path.into() }], &Uses::default())
}

fn names(sets: &[ServiceSet]) -> Vec<String> {
    sets.iter().flat_map(|set| set.services.keys()).map(ToString::to_string).collect()
}

async fn expect(discovery: &mut Discovery, wanted: &[&str]) {
    let seen = timeout(PATIENCE, discovery.sets.wait_for(|sets| names(sets) == wanted)).await.map(drop);
    assert!(
        seen.is_ok(),
        "wanted {wanted:?}, got {:?}, {:?}",
        names(&discovery.sets.borrow()),
        discovery.status.borrow()
    );
}

async fn expect_status(discovery: &mut Discovery, wanted: impl Fn(&SourceStatus) -> bool) {
    let seen = timeout(PATIENCE, discovery.status.wait_for(|all| all.iter().all(&wanted))).await.map(drop);
    assert!(seen.is_ok(), "got {:?}", discovery.status.borrow());
}

#[tokio::test]
async fn what_is_there_is_known_at_once_and_changes_are_followed() {
    let scratch = Scratch::new();
    let path = scratch.path("services.toml");
    fs::write(&path, service("one")).unwrap();
    let mut discovery = watch(&path);
    assert_eq!(names(&discovery.sets.borrow()), ["one"]);
    assert!(discovery.status.borrow()[0].loaded_at.is_some());
    for name in ["two", "three", "four"] {
        // In place, as `cat >` and some editors do: truncated first, which must not be seen as an empty file.
        fs::write(&path, service(name)).unwrap();
        discovery.sets.changed().await.unwrap();
        assert_eq!(names(&discovery.sets.borrow_and_update()), [name]);
    }
}

#[tokio::test]
async fn a_malformed_file_keeps_the_last_good_one_and_says_why() {
    let scratch = Scratch::new();
    let path = scratch.path("services.toml");
    fs::write(&path, service("good")).unwrap();
    let mut discovery = watch(&path);
    fs::write(&path, "[[service]]\nname = \"Not A Name\"\nporst = 1\n").unwrap();
    expect_status(&mut discovery, |status| status.error.is_some()).await;
    let status = discovery.status.borrow()[0].clone();
    let error = status.error.unwrap();
    assert!(error.contains("Not A Name") && error.contains("porst"), "every fault is named: {error}");
    assert!(status.loaded_at.is_some());
    assert_eq!(names(&discovery.sets.borrow()), ["good"]);
    fs::write(&path, service("better")).unwrap();
    expect(&mut discovery, &["better"]).await;
    expect_status(&mut discovery, |status| status.error.is_none()).await;
}

#[tokio::test]
async fn an_atomic_rename_is_seen() {
    let scratch = Scratch::new();
    let path = scratch.path("services.toml");
    fs::write(&path, service("old")).unwrap();
    let mut discovery = watch(&path);
    for name in ["new", "newer"] {
        fs::write(scratch.path("services.toml.tmp"), service(name)).unwrap();
        fs::rename(scratch.path("services.toml.tmp"), &path).unwrap();
        expect(&mut discovery, &[name]).await;
    }
}

#[tokio::test]
async fn a_swapped_symlink_and_a_change_behind_it_are_seen() {
    let scratch = Scratch::new();
    for version in ["v1", "v2"] {
        fs::create_dir(scratch.path(version)).unwrap();
        fs::write(scratch.path(version).join("services.toml"), service(version)).unwrap();
    }
    // As configuration management lays files out: the file links into a directory that is itself a link.
    symlink("v1", scratch.path("current")).unwrap();
    symlink("current/services.toml", scratch.path("services.toml")).unwrap();
    let mut discovery = watch(&scratch.path("services.toml"));
    assert_eq!(names(&discovery.sets.borrow()), ["v1"]);
    symlink("v2", scratch.path("next")).unwrap();
    fs::rename(scratch.path("next"), scratch.path("current")).unwrap();
    expect(&mut discovery, &["v2"]).await;
    fs::write(scratch.path("v2").join("services.toml"), service("changed")).unwrap();
    expect(&mut discovery, &["changed"]).await;
}

#[tokio::test]
async fn a_file_and_its_directory_may_appear_later_and_vanish() {
    let scratch = Scratch::new();
    let path = scratch.path("etc/mesh/services.toml");
    let mut discovery = watch(&path);
    assert!(names(&discovery.sets.borrow()).is_empty());
    let status = discovery.status.borrow()[0].clone();
    assert!(status.loaded_at.is_none());
    assert!(status.error.unwrap().contains("services.toml"));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, service("late")).unwrap();
    expect(&mut discovery, &["late"]).await;
    fs::remove_file(&path).unwrap();
    expect_status(&mut discovery, |status| status.error.is_some()).await;
    assert_eq!(names(&discovery.sets.borrow()), ["late"]);
    fs::write(&path, service("again")).unwrap();
    expect(&mut discovery, &["again"]).await;
}

#[tokio::test]
async fn sets_come_in_the_order_of_their_backends() {
    let scratch = Scratch::new();
    let (first, second) = (scratch.path("first.toml"), scratch.path("second.toml"));
    fs::write(&second, service("b")).unwrap();
    let backends = [&first, &second].map(|path| Backend::StaticFile { path: path.clone() });
    let mut discovery = run(backends.to_vec(), &Uses::default());
    assert_eq!(discovery.sets.borrow().len(), 2);
    fs::write(&first, service("a")).unwrap();
    expect(&mut discovery, &["a", "b"]).await;
}
