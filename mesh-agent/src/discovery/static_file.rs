//! The static file as a backend: read, watched, read again.
//!
//! Watched are the directories, not the file: an editor, a rename and a swapped symlink all replace it. Knows paths;
//! the file's content is the core's to judge.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use aws_lc_rs::digest;
use mesh_core::services;
use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, CreateKind, ModifyKind},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};

use super::{Report, SourceError, SourceId};
use crate::sys::memory;

/// Changes closer together than this are one.
const QUIET: Duration = Duration::from_millis(10);
/// And however dense they are, the file is read after this long.
const SETTLE: Duration = Duration::from_millis(40);
/// The file is looked at so often even when nothing was noticed: not every file system tells.
const LOOK: Duration = Duration::from_secs(30);
/// After this long everybody has the new reading.
const LOOKED_AT: Duration = Duration::from_secs(1);
/// Links to links that are followed before giving up, as the kernel does.
const LINKS: usize = 40;

/// One watched file.
pub struct StaticFile {
    path: PathBuf,
    source: SourceId,
    /// What was last read, so that an unchanged file says nothing.
    last: Option<Content>,
}

#[derive(PartialEq, Eq)]
enum Content {
    /// Its SHA-256: the text itself would weigh as much as what was made of it.
    Text([u8; 32]),
    Unreadable(io::ErrorKind),
}

impl StaticFile {
    /// A file that has not been read yet, and need not exist.
    pub fn new(path: PathBuf, source: SourceId) -> Self {
        Self { path, source, last: None }
    }

    /// Reads the file. `None`: it is as it was the last time.
    pub fn load(&mut self) -> Option<Report> {
        let report = self.read();
        // A long file took many times what is left of it.
        memory::give_back();
        report
    }

    fn read(&mut self) -> Option<Report> {
        let read = std::fs::read_to_string(&self.path);
        let content = match &read {
            Ok(text) => Content::Text(fingerprint(text)),
            Err(error) => Content::Unreadable(error.kind()),
        };
        if self.last.as_ref() == Some(&content) {
            return None;
        }
        self.last = Some(content);
        let path = self.path.clone();
        let outcome = match read {
            Ok(text) => services::parse(&text).map_err(|faults| SourceError::Invalid { path, faults }),
            Err(source) => Err(SourceError::Read { path, source }),
        };
        Some(Report { source: self.source, outcome, still: None })
    }

    /// As [`StaticFile::load`], without keeping others waiting.
    async fn load_aside(mut self) -> Option<(Self, Option<Report>)> {
        // Fails only while the runtime is being stopped.
        tokio::task::spawn_blocking(move || {
            let report = self.load();
            (self, report)
        })
        .await
        .ok()
    }

    /// Sends a report for each change, until nobody listens.
    pub async fn watch(mut self, reports: mpsc::Sender<Report>) {
        let (noticed, mut changes) = watch::channel(());
        let mut watcher = match notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.map_or(true, |event| concerns(&event)) {
                noticed.send_replace(());
            }
        }) {
            Ok(watcher) => watcher,
            Err(source) => {
                self.blind(source, &reports).await;
                return;
            }
        };
        let mut watched = BTreeSet::new();
        loop {
            // Watches first, then a look: what changes in between is noticed by the watch.
            if let Err(source) = follow(&mut watcher, &mut watched, &self.path) {
                tracing::debug!(path = %self.path.display(), error = %source, "a directory of the services file is not watched");
            }
            let Some((file, report)) = self.load_aside().await else { return };
            self = file;
            if let Some(report) = report {
                if reports.send(report).await.is_err() {
                    return;
                }
                tokio::spawn(forget_last());
            }
            let look = Instant::now() + LOOK;
            tokio::select! {
                noticed = timeout_at(look, changes.changed()) => if let Ok(Err(_)) = noticed {
                    // The watcher's thread is gone.
                    tokio::time::sleep_until(look).await;
                },
                () = reports.closed() => return,
            }
            settle(&mut changes).await;
        }
    }

    /// Without inotify the file is looked at now and then.
    async fn blind(mut self, source: notify::Error, reports: &mpsc::Sender<Report>) {
        let error = SourceError::Watch { path: self.path.clone(), source };
        if reports.send(Report { source: self.source, outcome: Err(error), still: None }).await.is_err() {
            return;
        }
        loop {
            tokio::time::sleep(LOOK).await;
            let Some((file, report)) = self.load_aside().await else { return };
            self = file;
            if let Some(report) = report {
                if reports.send(report).await.is_err() {
                    return;
                }
                tokio::spawn(forget_last());
            }
        }
    }
}

/// What the last reading made is let go of by everybody when the new one has been looked at. It was as large.
async fn forget_last() {
    tokio::time::sleep(LOOKED_AT).await;
    // Fails only while the runtime is being stopped.
    drop(tokio::task::spawn_blocking(memory::give_back).await);
}

fn fingerprint(text: &str) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.as_ref());
    bytes
}

/// Whether an event may mean new content that is complete. A file that is being written is not: it will be closed.
fn concerns(event: &notify::Event) -> bool {
    match &event.kind {
        // A link is complete when it is there, a file that was just created is still empty.
        EventKind::Create(CreateKind::File) => event
            .paths
            .iter()
            .any(|path| path.symlink_metadata().is_ok_and(|found| found.is_symlink() || found.len() > 0)),
        EventKind::Access(AccessKind::Close(AccessMode::Write))
        | EventKind::Modify(ModifyKind::Name(_) | ModifyKind::Metadata(_) | ModifyKind::Any)
        | EventKind::Create(_)
        | EventKind::Remove(_)
        | EventKind::Any
        | EventKind::Other => true,
        EventKind::Access(_) | EventKind::Modify(_) => false,
    }
}

/// Waits for the end of a burst of changes.
async fn settle(changes: &mut watch::Receiver<()>) {
    let end = Instant::now() + SETTLE;
    while Instant::now() < end {
        let quiet = (Instant::now() + QUIET).min(end);
        if !matches!(timeout_at(quiet, changes.changed()).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// Makes `watched` the directories that now lead to `path`.
fn follow(watcher: &mut RecommendedWatcher, watched: &mut BTreeSet<PathBuf>, path: &Path) -> notify::Result<()> {
    let wanted = directories(path);
    for gone in watched.difference(&wanted) {
        // It may have been removed, and its watch with it.
        watcher.unwatch(gone).ok();
    }
    watched.retain(|known| wanted.contains(known));
    for directory in wanted {
        // Again also for those known: the name may stand for another directory by now.
        watcher.watch(&directory, RecursiveMode::NonRecursive)?;
        watched.insert(directory);
    }
    Ok(())
}

/// The directories in which something must change before `path` can lead to other content: the parent of each link
/// on the way and of the file itself, and where one is missing, its nearest ancestor that exists.
fn directories(path: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut next = Some(std::path::absolute(path).unwrap_or_else(|_| path.into()));
    for _ in 0..LINKS {
        let Some(current) = next.take() else { break };
        let mut walked = PathBuf::new();
        let mut parts = current.components();
        while let Some(part) = parts.next() {
            let parent = walked.clone();
            walked.push(part);
            if walked.symlink_metadata().is_err() {
                found.insert(parent);
                break;
            }
            if let Ok(target) = std::fs::read_link(&walked) {
                // `join` keeps an absolute target as it is.
                next = Some(parent.join(target).join(parts.as_path()));
                found.insert(parent);
                break;
            }
            if parts.as_path().as_os_str().is_empty() {
                found.insert(parent);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests;
