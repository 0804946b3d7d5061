//! A unix listener whose file only root can open, which replaces a dead predecessor's and goes when its owner goes.
//!
//! Must not know what is served.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
        net,
    },
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;
use tracing::warn;

use super::AdminError;

/// Removes the socket's file on drop, unless somebody else's has taken its place.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    made: (u64, u64),
}

impl SocketFile {
    /// Listens on `path`, mode 0600. A file on which nobody answers is replaced.
    pub(super) fn bind(path: &Path) -> Result<(UnixListener, Self), AdminError> {
        let failed = |source| AdminError::Socket { path: path.into(), source };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(AdminError::NotASocket { path: path.into() }),
            Ok(_) if net::UnixStream::connect(path).is_ok() => {
                return Err(AdminError::Answered { path: path.into() });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        // Made under another name and renamed, so that it is never there with a wider mode, and never not there.
        let draft = path.with_extension(format!("{}.new", std::process::id()));
        remove(&draft).map_err(failed)?;
        let listener = net::UnixListener::bind(&draft).map_err(failed)?;
        let finished = fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::symlink_metadata(&draft))
            .and_then(|made| fs::rename(&draft, path).map(|()| made));
        let made = match finished {
            Ok(made) => made,
            Err(error) => {
                remove(&draft).map_err(failed)?;
                return Err(failed(error));
            }
        };
        let file = Self { path: path.into(), made: (made.dev(), made.ino()) };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok((UnixListener::from_std(listener).map_err(failed)?, file))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.made);
        if ours && let Err(error) = remove(&self.path) {
            warn!(path = %self.path.display(), error = %error, "admin socket not removed");
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}
