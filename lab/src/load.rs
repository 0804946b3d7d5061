//! An open loop of requests that counts what fails, and goes on. It runs inside tasks, as a role of the program that their
//! image has.
//!
//! Plain blocking sockets, a thread each. It must not know who answers.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream, ToSocketAddrs as _},
    thread,
    time::{Duration, Instant},
};

/// Connections that the requests are spread over.
const LANES: u32 = 16;
const LIMIT: Duration = Duration::from_secs(10);
/// Of so many requests, one is a POST.
const POST_EACH: u32 = 4;

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// When each that was answered was due, and how long that took.
    pub times: Vec<Duration>,
    /// Why others failed: `GET` or `POST`, and the reason.
    pub failures: Vec<String>,
}

/// `rate` requests in a second to `to`, a name or an address with a port, each timed from the moment it was due.
///
/// # Errors
/// There is no such name.
pub fn load(to: &str, rate: u32, time: Duration) -> io::Result<Outcome> {
    let at = resolve(to)?;
    let begin = Instant::now() + Duration::from_millis(20);
    let step = Duration::from_secs(1) * LANES / rate.max(1);
    let mut all = Outcome::default();
    let outcomes: Vec<Outcome> = thread::scope(|scope| {
        let lane = |index: u32| scope.spawn(move || lane(at, to, begin + step * index / LANES, step, time, index));
        let lanes: Vec<_> = (0..LANES).map(lane).collect();
        lanes.into_iter().map(|lane| lane.join().unwrap_or_default()).collect()
    });
    for outcome in outcomes {
        all.times.extend(outcome.times);
        all.failures.extend(outcome.failures);
    }
    all.times.sort_unstable();
    Ok(all)
}

fn lane(at: SocketAddr, to: &str, first: Instant, step: Duration, time: Duration, index: u32) -> Outcome {
    let mut outcome = Outcome::default();
    let mut connection: Option<TcpStream> = None;
    let end = first + time;
    let mut due = first;
    let mut turn = index;
    while due < end {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let method = if turn.is_multiple_of(POST_EACH) { "POST" } else { "GET" };
        let done = connection.take().map_or_else(|| dial(at), Ok).and_then(|stream| ask(stream, to, method));
        match done {
            Ok(kept) => {
                outcome.times.push(due.elapsed());
                connection = kept;
            }
            Err(error) => outcome.failures.push(format!("{method}: {error}")),
        }
        due += step;
        turn += 1;
    }
    outcome
}

/// Until one request is answered well; the name is asked for anew each time. When that was, by the machine's clock.
///
/// # Errors
/// It never was.
pub fn first(to: &str, limit: Duration) -> io::Result<u64> {
    let deadline = Instant::now() + limit;
    loop {
        let done = resolve(to).and_then(dial).and_then(|stream| ask(stream, to, "GET"));
        match done {
            Ok(_) => return Ok(crate::serve::now()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn resolve(to: &str) -> io::Result<SocketAddr> {
    to.to_socket_addrs()?.next().ok_or_else(|| io::Error::other(format!("{to} has no address")))
}

fn dial(at: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&at, LIMIT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// One request and its whole answer; the connection, where it stays open.
fn ask(mut stream: TcpStream, to: &str, method: &str) -> io::Result<Option<TcpStream>> {
    let body = if method == "POST" { "Content-Length: 4\r\n\r\nbody" } else { "\r\n" };
    stream.write_all(format!("{method} / HTTP/1.1\r\nHost: {to}\r\n{body}").as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let length = stream.read(&mut chunk)?;
        if length == 0 {
            return Err(io::Error::other(format!("the connection ended after {} octets", answer.len())));
        }
        answer.extend_from_slice(&chunk[..length]);
        let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        if answer.len() < end + 4 + length {
            continue;
        }
        if !head.starts_with("http/1.1 200") {
            return Err(io::Error::other(format!("answered {}", String::from_utf8_lossy(&answer).escape_debug())));
        }
        let stays = !head.lines().any(|line| line == "connection: close");
        return Ok(stays.then_some(stream));
    }
}

impl Outcome {
    /// The response time that so many of a thousand stayed below.
    #[must_use]
    pub fn quantile(&self, permille: usize) -> Duration {
        let index = (self.times.len() * permille / 1000).min(self.times.len().saturating_sub(1));
        self.times.get(index).copied().unwrap_or_default()
    }

    /// `answered failed posts p50 p99 longest`, times in milliseconds, and a line for each reason. `posts` are those of the
    /// failed that were POSTs.
    #[must_use]
    pub fn report(&self) -> String {
        let at = |permille| self.quantile(permille).as_secs_f64() * 1e3;
        let (answered, failed) = (self.times.len(), self.failures.len());
        let posts = self.failures.iter().filter(|reason| reason.starts_with("POST")).count();
        let mut text = format!("{answered} {failed} {posts} {:.2} {:.2} {:.2}", at(500), at(990), at(1000));
        for reason in self.failures.iter().take(10) {
            text.push('\n');
            text.push_str(reason);
        }
        text
    }
}
