//! A client and server that behaves as real ones do in their rarer moments: half-close, reset, stop reading, speak first.
//!
//! It runs inside the test containers, by role: `peer ROLE ARGUMENT…`. It must not know the mesh: names, ports, bytes.

use std::{
    env,
    io::{self, BufRead as _, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, ToSocketAddrs as _},
    os::fd::AsRawFd as _,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use mesh_lab::{load, serve};
use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;

const BLOCK: usize = 256 << 10;
/// Length of a POST's body.
const BODY: usize = 4;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match act(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("failed: {:?}: {error}", error.kind()));
            ExitCode::FAILURE
        }
    }
}

fn act(words: &[&str]) -> io::Result<()> {
    match *words {
        ["count", port] => listen(port, count),
        ["flood", port] => listen(port, |mut stream| {
            loop {
                stream.write_all(&[b'f'; BLOCK])?
            }
        }),
        ["resets", port] => listen(port, |mut stream| stream.read(&mut [0; 1]).and_then(|_| reset(&stream))),
        ["witness", port] => listen(port, witness),
        ["greets", port] => listen(port, greet),
        ["websocket", port] => listen(port, upgrade),
        ["hangs", port] => listen(port, |stream| BufReader::new(stream).read_until(0, &mut Vec::new()).map(drop)),
        ["leaves", port, octets] => {
            let octets = number(octets) as usize;
            listen(port, move |stream| leave(&stream, octets))
        }
        ["post", to, count] => post(to, number(count)),
        ["send", to, bytes] => send(&mut dial(to)?, number(bytes)),
        ["pause", to, millis] => pause(&mut dial(to)?, Duration::from_millis(number(millis))),
        ["await-reset", to] => {
            let mut stream = dial(to)?;
            stream.write_all(b"x")?;
            say(&ending(&mut stream));
            Ok(())
        }
        ["reset", to] => {
            let mut stream = dial(to)?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0; 1])?;
            reset(&stream)
        }
        ["greeting", to] => greeting(to),
        ["talk", to, count] => talk(to, number(count)),
        ["get", to] => get(dial(to)?),
        // What a rolling replacement is made of.
        ["serve", port, answer, "abrupt"] => serve::serve(number(port) as u16, answer, serve::Manner::Abrupt),
        ["load", to, rate, seconds] => {
            say(&load::load(to, number(rate) as u32, Duration::from_secs(number(seconds)))?.report());
            Ok(())
        }
        ["get-mapped", address, port] => get(dial_mapped(address, port)?),
        _ => Err(io::Error::other(format!("no such role: {words:?}"))),
    }
}

fn say(line: &str) {
    // Nobody listens: nobody misses it.
    writeln!(io::stdout(), "{line}").ok();
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|error| panic!("{text:?} is no number: {error}"))
}

fn listen(port: &str, each: impl Fn(TcpStream) -> io::Result<()> + Copy + Send + 'static) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, number(port) as u16))?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(error) = each(stream) {
                say(&format!("ended: {:?}", error.kind()));
            }
        });
    }
    Ok(())
}

fn dial(to: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to.to_socket_addrs()?.next().ok_or(io::ErrorKind::AddrNotAvailable)?)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// From a socket of IPv6 to an address of IPv4, as Java and Go do.
fn dial_mapped(address: &str, port: &str) -> io::Result<TcpStream> {
    let address: Ipv4Addr = address.parse().map_err(io::Error::other)?;
    let to = SocketAddrV6::new(address.to_ipv6_mapped(), number(port) as u16, 0, 0);
    let stream = TcpStream::connect(to)?;
    let peer = stream.peer_addr()?;
    if peer != SocketAddr::V6(SocketAddrV6::new(address.to_ipv6_mapped(), to.port(), 0, 0)) {
        return Err(io::Error::other(format!("asked for {to}, but the kernel says {peer}")));
    }
    Ok(stream)
}

fn reset(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

/// Reads to the end of the stream, and only then says how much there was.
fn count(mut stream: TcpStream) -> io::Result<()> {
    let (mut block, mut sum) = (vec![0; BLOCK], 0);
    loop {
        match stream.read(&mut block)? {
            0 => break,
            some => sum += some,
        }
    }
    writeln!(stream, "{sum}")
}

fn witness(mut stream: TcpStream) -> io::Result<()> {
    stream.read_exact(&mut [0; 1])?;
    stream.write_all(b"y")?;
    say(&ending(&mut stream));
    Ok(())
}

/// How the other end closed.
fn ending(stream: &mut TcpStream) -> String {
    match stream.read(&mut [0; 1]) {
        Ok(0) => "end of stream".to_owned(),
        Ok(_) => "data".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => "reset".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    }
}

/// Speaks first, as SMTP does.
fn greet(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"220 ready\r\n")?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    write!(stream, "250 {line}")
}

fn greeting(to: &str) -> io::Result<()> {
    let began = Instant::now();
    let mut stream = dial(to)?;
    let mut first = [0; 64];
    let read = stream.read(&mut first)?;
    say(&format!("{} {}", began.elapsed().as_millis(), String::from_utf8_lossy(&first[..read]).escape_debug()));
    Ok(())
}

fn send(stream: &mut TcpStream, bytes: u64) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(600)))?;
    let began = Instant::now();
    let block = vec![b's'; BLOCK];
    let mut left = bytes;
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK);
        stream.write_all(&block[..part])?;
        left -= part as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    say(&format!("{} {}", answer.trim(), began.elapsed().as_millis()));
    Ok(())
}

/// Reads nothing for a while, then a megabyte, which must have been kept.
fn pause(stream: &mut TcpStream, time: Duration) -> io::Result<()> {
    thread::sleep(time);
    stream.read_exact(&mut vec![0; 1 << 20])?;
    say("read");
    Ok(())
}

/// Lines of an HTTP head, without the last, empty one.
fn head(reader: &mut impl io::BufRead) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end() {
            "" => return Ok(lines),
            text => lines.push(text.to_owned()),
        }
    }
}

/// The other end of RFC 6455, section 1.3, whose example key and answer it uses; frames are echoed as they are.
fn upgrade(mut stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let lines = head(&mut reader)?;
    let is_upgrade = lines.iter().any(|line| line.eq_ignore_ascii_case("upgrade: websocket"));
    if !is_upgrade {
        return stream.write_all(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n");
    }
    stream.write_all(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
          Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
    )?;
    io::copy(&mut reader, &mut stream).map(drop)
}

/// Answers the first request of a connection. Of the second it reads so many octets when all of it is there, and closes.
/// Says what it has read whole.
fn leave(stream: &TcpStream, octets: usize) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let lines = head(&mut reader)?;
    let mut body = [0; BODY];
    reader.read_exact(&mut body)?;
    say(&format!("took {}", String::from_utf8_lossy(&body)));
    { stream }.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    // The next one is as long.
    let length = lines.iter().map(|line| line.len() + 2).sum::<usize>() + 2 + body.len();
    let mut next = vec![0; length];
    let there = recv(stream.as_raw_fd(), &mut next, MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL)?;
    if there == length {
        { stream }.read_exact(&mut next[..octets])?;
        say("left");
    }
    Ok(())
}

/// So many POSTs on one connection, one after the other; says how each was answered.
fn post(to: &str, count: u64) -> io::Result<()> {
    let mut stream = dial(to)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut statuses = Vec::new();
    for turn in 0..count {
        write!(stream, "POST / HTTP/1.1\r\nHost: {to}\r\nContent-Length: {BODY}\r\n\r\n{turn:0BODY$}")?;
        let lines = head(&mut reader)?;
        let field = |line: &String| Some(line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().to_owned());
        let length = lines.iter().find_map(field).map_or(0, |length| number(&length));
        io::copy(&mut (&mut reader).take(length), &mut io::sink())?;
        statuses.push(lines[0].split(' ').nth(1).unwrap_or("?").to_owned());
    }
    say(&statuses.join(" "));
    Ok(())
}

fn talk(to: &str, count: u64) -> io::Result<()> {
    let mut stream = dial(to)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    write!(
        stream,
        "GET /chat HTTP/1.1\r\nHost: {to}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )?;
    let lines = head(&mut reader)?;
    if !lines[0].starts_with("HTTP/1.1 101") || !lines.iter().any(|line| line.ends_with("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="))
    {
        return Err(io::Error::other(format!("no upgrade: {lines:?}")));
    }
    for number in 0..count {
        let frame = [&[0x81, 0x88][..], &number.to_be_bytes()[4..], &number.to_be_bytes()].concat();
        stream.write_all(&frame)?;
        let mut back = vec![0; frame.len()];
        reader.read_exact(&mut back)?;
        if back != frame {
            return Err(io::Error::other(format!("frame {number} came back as {back:?}")));
        }
    }
    say(&format!("{count} frames"));
    Ok(())
}

fn get(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: world\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    say(answer.split_once("\r\n\r\n").map_or(answer.as_str(), |(_, body)| body).trim());
    Ok(())
}
