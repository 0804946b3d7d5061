//! One agent per host: whoever starts waits until the one before has removed its programs and gone.
//!
//! Without this, an agent that still drains would in the end remove the programs that its successor has adopted. The
//! lock is the kernel's, so it goes with the process, however that ends. Must not know what the agent does.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tokio::time::Instant;

const LOOK: Duration = Duration::from_millis(50);

/// Held for as long as the agent runs.
#[derive(Debug)]
pub(super) struct Only(#[expect(dead_code, reason = "held, not read")] Flock<File>);

/// The agent is not the only one, or cannot know.
#[derive(Debug, thiserror::Error)]
pub enum OnlyError {
    #[error("another agent runs on this host, or is still stopping after {waited:?}: it holds {}; stop it first", .path.display())]
    Another { path: PathBuf, waited: Duration },
    #[error("cannot lock {}: may `host.state_dir` be written?", .path.display())]
    Lock { path: PathBuf, source: io::Error },
}

impl Only {
    /// Waits for at most `patience`, the time that another agent may need to stop.
    ///
    /// # Errors
    /// It does not stop, or the file cannot be made.
    pub(super) async fn wait(state_dir: &Path, patience: Duration) -> Result<Self, OnlyError> {
        let path = state_dir.join("agent.lock");
        let opened = fs::create_dir_all(state_dir)
            .and_then(|()| File::options().create(true).truncate(false).write(true).open(&path));
        let mut file = opened.map_err(|source| OnlyError::Lock { path: path.clone(), source })?;
        let deadline = Instant::now() + patience;
        let mut told = false;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self(lock)),
                Err((again, Errno::EWOULDBLOCK)) => file = again,
                Err((_, errno)) => return Err(OnlyError::Lock { path, source: errno.into() }),
            }
            if Instant::now() >= deadline {
                return Err(OnlyError::Another { path, waited: patience });
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(path = %path.display(), "another agent is still here; waiting until it has stopped");
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_next_agent_begins_when_the_last_has_gone() {
        let state = std::env::temp_dir().join(format!("ecs-mesh-only-{}", std::process::id()));
        let first = Only::wait(&state, Duration::ZERO).await.unwrap();
        let refused = Only::wait(&state, Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(refused, OnlyError::Another { .. }), "{refused}");
        let mut second = Box::pin(Only::wait(&state, Duration::from_secs(30)));
        assert!(tokio::time::timeout(LOOK * 2, &mut second).await.is_err(), "it waits");
        drop(first);
        second.await.unwrap();
        fs::remove_dir_all(state).unwrap();
    }
}
