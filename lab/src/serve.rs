//! A small HTTP/1.1 server that leaves in the ways in which real ones do, and says when what happened. It runs inside
//! tasks, as a role of the program that their image has.
//!
//! Lines on standard output are an event and the time of the machine's clock in nanoseconds: `began`, `listening`,
//! `told`, `flipped`, and in the end `last`, the last request that came; and `unanswered`, how many requests it has read
//! on connections that it had closed already, with `unanswered-posts`, those of them that may not be sent again. It must not
//! know who asks.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use nix::sys::{
    signal::SigSet,
    signal::Signal,
    socket::{self, MsgFlags},
};

/// How the server takes SIGTERM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Its listener and its idle connections close at once; what is under way is answered, and then it ends.
    Abrupt,
    /// It goes on as if nothing had happened, for so long.
    Late(Duration),
}

/// A request for this path is answered 503 after SIGUSR1.
pub const HEALTH: &str = "/healthz";
/// An answer takes so long, so that some are always under way.
const WORK: Duration = Duration::from_millis(5);
/// What is under way must have ended within this.
const PATIENCE: Duration = Duration::from_secs(8);

/// The clock that all processes of the machine share.
#[must_use]
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[derive(Default)]
struct Shared {
    /// Connections that wait for a request.
    idle: Mutex<HashMap<u64, TcpStream>>,
    open: Mutex<usize>,
    ended: Condvar,
    leaving: AtomicBool,
    ill: AtomicBool,
    last: AtomicU64,
    unanswered: AtomicU64,
    unanswered_posts: AtomicU64,
}

/// Serves `port` until SIGTERM, and then leaves. Every request but those for [`HEALTH`] is answered with `answer`.
///
/// # Errors
/// The port cannot be had.
pub fn serve(port: u16, answer: &str, manner: Manner) -> io::Result<()> {
    say("began", now());
    // In all threads, so that the first one hears of them.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGUSR1].into_iter().collect();
    signals.thread_block()?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    say("listening", now());
    let shared = Arc::new(Shared::default());
    let (accepting, at, text) = (listener.try_clone()?, shared.clone(), answer.to_owned());
    thread::spawn(move || {
        for (number, stream) in (0..).zip(accepting.incoming()) {
            // The listener has been closed.
            let Ok(stream) = stream else { return };
            *lock(&at.open) += 1;
            let (shared, text) = (at.clone(), text.clone());
            thread::spawn(move || {
                // A client that breaks off is its own business.
                converse(number, stream, &shared, &text).ok();
                lock(&shared.idle).remove(&number);
                *lock(&shared.open) -= 1;
                shared.ended.notify_all();
            });
        }
    });
    while signals.wait()? != Signal::SIGTERM {
        shared.ill.fetch_xor(true, Ordering::Relaxed);
        say("flipped", now());
    }
    say("told", now());
    if let Manner::Late(late) = manner {
        thread::sleep(late);
    }
    shared.leaving.store(true, Ordering::SeqCst);
    socket::shutdown(listener.as_raw_fd(), socket::Shutdown::Both)?;
    drop(listener);
    lock(&shared.idle).retain(|_, stream| {
        // A request that is there is under way, also if its thread has not woken up yet. One that comes after this is cut off.
        let asked = socket::recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        let asked = asked.is_ok_and(|length| length > 0);
        if !asked {
            // It may have ended by itself.
            stream.shutdown(Shutdown::Both).ok();
        }
        asked
    });
    let open = lock(&shared.open);
    drop(shared.ended.wait_timeout_while(open, PATIENCE, |open| *open > 0));
    say("last", shared.last.load(Ordering::Relaxed));
    say("unanswered", shared.unanswered.load(Ordering::Relaxed));
    say("unanswered-posts", shared.unanswered_posts.load(Ordering::Relaxed));
    Ok(())
}

fn converse(number: u64, stream: TcpStream, shared: &Shared, answer: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream.try_clone()?;
    loop {
        {
            let mut idle = lock(&shared.idle);
            if shared.leaving.load(Ordering::SeqCst) {
                return Ok(());
            }
            idle.insert(number, stream.try_clone()?);
        }
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let at = now();
        if lock(&shared.idle).remove(&number).is_none() {
            // It came just before the connection was closed, and nobody would hear of what it did (RFC 9112, section 9.6).
            shared.unanswered.fetch_add(1, Ordering::Relaxed);
            if line.starts_with("POST ") {
                shared.unanswered_posts.fetch_add(1, Ordering::Relaxed);
            }
            return Ok(());
        }
        let health = line.split(' ').nth(1) == Some(HEALTH);
        let mut length = 0;
        loop {
            line.clear();
            if reader.read_line(&mut line)? <= 2 {
                break;
            }
            let field = line.to_ascii_lowercase();
            if let Some(value) = field.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
        }
        io::copy(&mut (&mut reader).take(length), &mut io::sink())?;
        let ill = health && shared.ill.load(Ordering::Relaxed);
        if !health {
            shared.last.fetch_max(at, Ordering::Relaxed);
            thread::sleep(WORK);
        }
        let leaving = shared.leaving.load(Ordering::SeqCst);
        let status = if ill { "503 Service Unavailable" } else { "200 OK" };
        let close = if leaving { "Connection: close\r\n" } else { "" };
        write!(writer, "HTTP/1.1 {status}\r\n{close}Content-Length: {}\r\n\r\n{answer}", answer.len())?;
        if leaving {
            return Ok(());
        }
    }
}

fn say(event: &str, at: u64) {
    // Nobody listens: nobody misses it.
    writeln!(io::stdout(), "{event} {at}").ok();
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
