//! Notices files and directories as they appear: docker's namespaces, and cgroups of containers about to start.
//!
//! Knows paths only.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

/// What appeared and was not yet looked at. What does not fit is found by the next full list.
const QUEUE: usize = 1024;

/// A set of watched directories.
pub struct Notice {
    watcher: Option<RecommendedWatcher>,
    watched: BTreeSet<PathBuf>,
    /// Whatever was created in a watched directory.
    pub created: mpsc::Receiver<PathBuf>,
}

impl Notice {
    /// Watches nothing yet. Without inotify it never will, and says so once.
    pub fn open() -> Self {
        let (sender, created) = mpsc::channel(QUEUE);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if let Ok(event) = event
                && let EventKind::Create(_) = event.kind
            {
                for path in event.paths {
                    sender.try_send(path).ok();
                }
            }
        });
        let watcher = match watcher {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "no inotify: tasks are armed only after they have started; raise \
                    fs.inotify.max_user_instances");
                None
            }
        };
        Self { watcher, watched: BTreeSet::new(), created }
    }

    /// Watches exactly these directories, or the nearest ancestor of one that does not exist yet. `true`: some are
    /// newly watched, and what lies in them may have appeared before.
    pub fn watch(&mut self, directories: impl IntoIterator<Item = PathBuf>) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        let wanted: BTreeSet<PathBuf> = directories.into_iter().filter_map(|path| existing(&path)).collect();
        for gone in self.watched.difference(&wanted) {
            // A removed directory took its watch with it.
            watcher.unwatch(gone).ok();
        }
        let new: Vec<PathBuf> = wanted.difference(&self.watched).cloned().collect();
        self.watched.retain(|path| wanted.contains(path));
        for path in &new {
            match watcher.watch(path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.watched.insert(path.clone());
                }
                Err(error) => tracing::debug!(path = %path.display(), %error, "directory not watched"),
            }
        }
        !new.is_empty()
    }
}

fn existing(path: &Path) -> Option<PathBuf> {
    path.ancestors().find(|path| path.is_dir()).map(Path::to_path_buf)
}
