//! The small measuring programs that no package has: an open loop of requests, connection times, round trips.
//!
//! It runs inside the tasks: `probe ROLE ARGUMENT…`, one line of figures on standard output. It must not know any
//! proxy. Plain blocking sockets, a thread each: nothing between the clock and the socket.

use std::{
    env,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use mesh_benches::registry;
use mesh_lab::{
    load,
    serve::{self, Manner},
};
use socket2::SockRef;

/// Connections that an open loop spreads its requests over.
const LANES: u32 = 16;

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let said = match *words {
        ["echo", port] => echo(port).map(|()| String::new()),
        ["await", to] => wait_for(to).map(|()| String::new()),
        ["pace", to, path, rate, seconds] => pace(to, path, rate, seconds),
        ["connect", to, count] => connect(to, count),
        ["trips", to, seconds] => trips(to, seconds),
        ["associate", to, count] => associate(to, count),
        ["question", to, count] => question(to, count),
        // What a rolling replacement is made of.
        ["serve", port, answer, "abrupt"] => serve(port, answer, Manner::Abrupt),
        ["serve", port, answer, late] => {
            number(late).and_then(|late| serve(port, answer, Manner::Late(Duration::from_millis(late.into()))))
        }
        ["load", to, rate, seconds] => number(rate).and_then(|rate| {
            let time = Duration::from_secs(number(seconds)?.into());
            load::load(to, rate, time).map(|outcome| outcome.report())
        }),
        ["first", to] => load::first(to, Duration::from_secs(20)).map(|at| at.to_string()),
        ["registry", url, count] => number(count).and_then(|count| registry::share(url, count)),
        ["seen", url, name, count] => number(count).and_then(|count| registry::seen(url, name, count)),
        _ => Err(io::Error::other(format!("no such role: {words:?}"))),
    };
    match said {
        Ok(line) => {
            writeln!(io::stdout(), "{line}").ok();
            ExitCode::SUCCESS
        }
        Err(error) => {
            writeln!(io::stderr(), "probe {words:?}: {error}").ok();
            ExitCode::FAILURE
        }
    }
}

fn serve(port: &str, answer: &str, manner: Manner) -> io::Result<String> {
    let port = u16::try_from(number(port)?).map_err(io::Error::other)?;
    serve::serve(port, answer, manner).map(|()| String::new())
}

fn number(text: &str) -> io::Result<u32> {
    text.parse().map_err(|error| io::Error::other(format!("{text:?} is no number: {error}")))
}

fn resolve(to: &str) -> io::Result<SocketAddr> {
    to.to_socket_addrs()?.next().ok_or_else(|| io::Error::other(format!("{to} has no address")))
}

fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

/// Every byte comes back.
fn echo(port: &str) -> io::Result<()> {
    let port = u16::try_from(number(port)?).map_err(io::Error::other)?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        thread::spawn(move || -> io::Result<()> {
            stream.set_nodelay(true)?;
            let mut buffer = [0; 16 << 10];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    length => stream.write_all(&buffer[..length])?,
                }
            }
        });
    }
    Ok(())
}

/// Until something accepts.
fn wait_for(to: &str) -> io::Result<()> {
    let to = resolve(to)?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match TcpStream::connect(to) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(io::Error::other(format!("{to}: {error}"))),
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Requests at a fixed rate, whether answers come or not. Each is timed from the moment it was due, so that a pause
/// counts against every request that it delays. Says: requests, then p50, p90, p99 and the longest in microseconds.
fn pace(to: &str, path: &str, rate: &str, seconds: &str) -> io::Result<String> {
    let at = resolve(to)?;
    let (rate, seconds) = (number(rate)?, number(seconds)?);
    let request = format!("GET {path} HTTP/1.1\r\nHost: {to}\r\n\r\n");
    let lanes: Vec<TcpStream> = (0..LANES).map(|_| dial(at)).collect::<io::Result<_>>()?;
    let step = Duration::from_secs(1) * LANES / rate;
    let each = rate * seconds / LANES;
    // The first answers of a connection are not steady state.
    let lanes = lanes.into_iter().map(|mut lane| {
        ask(&mut lane, request.as_bytes(), &mut Vec::new())?;
        Ok(lane)
    });
    let lanes: Vec<TcpStream> = lanes.collect::<io::Result<_>>()?;
    let begin = Instant::now() + Duration::from_millis(20);
    let mut times: Vec<Duration> = thread::scope(|scope| {
        let run = |(index, mut lane): (u32, TcpStream)| {
            let request = request.as_bytes();
            scope.spawn(move || -> io::Result<Vec<Duration>> {
                let mut times = Vec::with_capacity(each as usize);
                let mut buffer = Vec::with_capacity(4096);
                for turn in 0..each {
                    let due = begin + step * turn + step * index / LANES;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    ask(&mut lane, request, &mut buffer)?;
                    times.push(due.elapsed());
                }
                Ok(times)
            })
        };
        let lanes: Vec<_> = (0..).zip(lanes).map(run).collect();
        let joined = lanes.into_iter().map(|lane| lane.join().unwrap_or_else(|_| Err(io::Error::other("panicked"))));
        joined.collect::<io::Result<Vec<_>>>()
    })?
    .concat();
    times.sort_unstable();
    Ok(format!("{} {}", times.len(), quantiles(&times)))
}

/// One request and its whole answer.
fn ask(lane: &mut TcpStream, request: &[u8], answer: &mut Vec<u8>) -> io::Result<()> {
    lane.write_all(request)?;
    answer.clear();
    let mut chunk = [0; 4096];
    loop {
        let length = lane.read(&mut chunk)?;
        if length == 0 {
            return Err(io::Error::other("the connection ended before the answer"));
        }
        answer.extend_from_slice(&chunk[..length]);
        if is_whole(answer)? {
            return Ok(());
        }
    }
}

/// Whether an answer has all of its body, which has a length; only 200 is an answer.
fn is_whole(answer: &[u8]) -> io::Result<bool> {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(false) };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    if !head.starts_with("http/1.1 200") {
        return Err(io::Error::other(format!("answered {head:?}")));
    }
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length
        .and_then(|length| length.trim().parse().ok())
        .ok_or_else(|| io::Error::other(format!("no length in {head:?}")))?;
    Ok(answer.len() >= end + 4 + length)
}

/// Times `connect()` alone.
fn connect(to: &str, count: &str) -> io::Result<String> {
    let at = resolve(to)?;
    let mut times = Vec::new();
    for _ in 0..number(count)? {
        let began = Instant::now();
        let stream = TcpStream::connect(at)?;
        times.push(began.elapsed());
        // Without a reset the ports of this address would be used up.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    times.sort_unstable();
    Ok(format!("{} {}", times.len(), quantiles(&times)))
}

/// Times `connect()` of datagram sockets, which sends nothing.
fn associate(to: &str, count: &str) -> io::Result<String> {
    let at = resolve(to)?;
    let mut times = Vec::new();
    for _ in 0..number(count)? {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let began = Instant::now();
        socket.connect(at)?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(format!("{} {}", times.len(), quantiles(&times)))
}

/// Times `sendto()` of a DNS question, which waits for nothing; its answer is awaited before the next.
fn question(to: &str, count: &str) -> io::Result<String> {
    /// RFC 1035, section 4: who has the A record of `near`?
    const QUESTION: &[u8] = b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04near\x00\x00\x01\x00\x01";
    let at = resolve(to)?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut times = Vec::new();
    let mut answer = [0; 512];
    for _ in 0..number(count)? {
        let began = Instant::now();
        socket.send_to(QUESTION, at)?;
        times.push(began.elapsed());
        socket.recv_from(&mut answer)?;
    }
    times.sort_unstable();
    Ok(format!("{} {}", times.len(), quantiles(&times)))
}

/// One byte there and back, again and again on one connection.
fn trips(to: &str, seconds: &str) -> io::Result<String> {
    let mut stream = dial(resolve(to)?)?;
    let mut byte = [0];
    let mut times = Vec::new();
    let end = Instant::now() + Duration::from_secs(number(seconds)?.into());
    while Instant::now() < end {
        let began = Instant::now();
        stream.write_all(b"x")?;
        stream.read_exact(&mut byte)?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(format!("{} {}", times.len(), quantiles(&times)))
}

fn quantiles(sorted: &[Duration]) -> String {
    let at = |permille: usize| {
        let index = (sorted.len() * permille / 1000).min(sorted.len().saturating_sub(1));
        sorted.get(index).copied().unwrap_or_default().as_nanos() as f64 / 1000.0
    };
    format!("{:.2} {:.2} {:.2} {:.2}", at(500), at(900), at(990), at(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_when_its_body_is() {
        let whole = |text: &str| is_whole(text.as_bytes()).ok();
        assert_eq!(whole("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"), Some(true));
        assert_eq!(whole("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab"), Some(false));
        assert_eq!(whole("HTTP/1.1 200 OK\r\nContent-Le"), Some(false));
        assert_eq!(whole("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"), None);
        assert_eq!(whole("HTTP/1.1 200 OK\r\n\r\n"), None);
    }

    #[test]
    fn quantiles_of_a_few() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_micros).collect();
        assert_eq!(quantiles(&times), "51.00 91.00 100.00 100.00");
        assert_eq!(quantiles(&[]), "0.00 0.00 0.00 0.00");
    }
}
