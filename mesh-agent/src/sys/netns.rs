//! Network namespaces: a handle that names one, and a guard that is inside it.
//!
//! Knows nothing of tasks; a namespace is a file here.

use std::{
    cell::RefCell,
    fs::File,
    io,
    marker::PhantomData,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    rc::Rc,
};

use nix::sched::{CloneFlags, setns};

/// Something about a namespace failed.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("cannot open network namespace {path}: the task may have gone")]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot enter network namespace {path}: CAP_SYS_ADMIN is needed")]
    Enter { path: PathBuf, source: io::Error },
    #[error("cannot read the cookie of network namespace {path}: SO_NETNS_COOKIE needs Linux 5.14")]
    Cookie { path: PathBuf, source: io::Error },
}

/// An open network namespace. Holding it keeps the namespace alive.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
    cookie: u64,
}

thread_local! {
    /// The namespace that the thread is in whenever nothing of ours is on its stack, if it is to be kept open ([`keep_home`]).
    /// `None` while the thread is away.
    static HOME: RefCell<Option<Rc<File>>> = const { RefCell::new(None) };
}

/// The calling thread is inside a namespace until this is dropped. Not `Send`: it belongs to its thread, and must
/// never live across an await.
pub struct Inside {
    back: Rc<File>,
    is_home: bool,
    not_send: PhantomData<*const ()>,
}

/// For a thread that enters namespaces all the time and never leaves its own otherwise: that one stays open, as opening it takes
/// longer than entering another and returning. One that cannot be opened now is opened each time.
pub fn keep_home() {
    HOME.set(here().ok().map(Rc::new));
}

fn here() -> io::Result<File> {
    File::open("/proc/thread-self/ns/net")
}

impl Netns {
    /// Opens the namespace that `path` names, such as `/run/docker/netns/x` or `/proc/1/ns/net`.
    ///
    /// # Errors
    /// The file cannot be opened or is no network namespace, or the process may not enter it.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let file = File::open(path).map_err(|source| NetnsError::Open { path: path.into(), source })?;
        let mut netns = Self { file, path: path.into(), cookie: 0 };
        netns.cookie = netns
            .run(super::socket::netns_cookie)?
            .map_err(|source| NetnsError::Cookie { path: path.into(), source })?;
        Ok(netns)
    }

    /// The kernel's number for this namespace, as BPF's `bpf_get_netns_cookie` shows it.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The file that it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` with the calling thread inside the namespace. Sockets made there stay there.
    ///
    /// # Errors
    /// The namespace cannot be entered; `work` has not run.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let _inside = self.enter()?;
        Ok(work())
    }

    fn enter(&self) -> Result<Inside, NetnsError> {
        let enter = |source: io::Error| NetnsError::Enter { path: self.path.clone(), source };
        // Who is away already returns to where it is now.
        let home = HOME.with_borrow(Clone::clone);
        let is_home = home.is_some();
        let back = match home {
            Some(home) => home,
            None => Rc::new(here().map_err(enter)?),
        };
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| enter(e.into()))?;
        HOME.take();
        Ok(Inside { back, is_home, not_send: PhantomData })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // A thread that cannot return would make every later socket in a stranger's namespace.
        if setns(self.back.as_fd(), CloneFlags::CLONE_NEWNET).is_err() {
            std::process::abort();
        }
        if self.is_home {
            HOME.set(Some(self.back.clone()));
        }
    }
}
