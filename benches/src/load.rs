//! The work that is done through every subject, by programs that a user would take too, and what it yields.
//!
//! It knows load generators and what they print. It must not know what is between them and the server.

use anyhow::{Context as _, Result, ensure};
use mesh_lab::Cluster;
use serde_json::Value;

use crate::topology::{Pair, Seat};

/// Connections of the HTTP work; the one with large answers has four.
const CONNECTIONS: &str = "64";
/// Requests per second of the open loop.
pub const PACE: u32 = 2000;

/// Connections of one turn of `connect`.
const CONNECTS: u32 = 400;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// HTTP/1.1, 64 connections kept alive, small answers, as fast as it goes.
    Http,
    /// HTTP/1.1 at a fixed rate, timed from when each request was due.
    Paced,
    /// HTTP/1.1, four connections, 10 MB answers.
    Large,
    /// HTTP/1.1, a new connection for each request.
    Fresh,
    /// HTTP/2, eight connections with eight streams each, small unary calls.
    Grpc,
    /// Two TCP streams.
    Bulk,
    /// One byte there and back.
    Trips,
    /// Nothing but `connect()`.
    Connect,
}

/// Where a subject is reached from the client's task.
#[derive(Clone, Debug)]
pub struct Target {
    pub http: String,
    pub http2: String,
    /// None of them where the subject carries no bytes but HTTP.
    pub bulk: Option<(String, u16)>,
    pub echo: Option<String>,
}

/// What one run of a work yielded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Operations per second: requests, or bytes for bulk.
    pub rate: f64,
    /// Operations in all.
    pub operations: f64,
    /// Microseconds.
    pub p50: Option<f64>,
    pub p99: Option<f64>,
}

impl Work {
    pub const ALL: [Self; 8] =
        [Self::Http, Self::Paced, Self::Large, Self::Fresh, Self::Grpc, Self::Bulk, Self::Trips, Self::Connect];

    /// As in the names of figures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Http => "http1",
            Self::Paced => "paced",
            Self::Large => "large",
            Self::Fresh => "fresh",
            Self::Grpc => "grpc",
            Self::Bulk => "bulk",
            Self::Trips => "trips",
            Self::Connect => "connect",
        }
    }

    /// For headings.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Http => "HTTP/1.1, 64 connections, 100-byte answers",
            Self::Paced => "HTTP/1.1 at 2,000 requests per second (open loop)",
            Self::Large => "HTTP/1.1, 4 connections, 10 MB answers",
            Self::Fresh => "HTTP/1.1, a new TCP connection per request",
            Self::Grpc => "HTTP/2 unary calls (gRPC shape), 8 connections of 8 streams",
            Self::Bulk => "Bulk TCP, 2 streams",
            Self::Trips => "One byte there and back",
            Self::Connect => "connect() alone",
        }
    }

    /// A rate in the unit that people use for it.
    #[must_use]
    pub fn rate(self, rate: f64) -> (f64, &'static str) {
        if self == Self::Bulk { (rate * 8.0 / 1e9, "Gbit/s") } else { (rate, "1/s") }
    }

    /// CPU microseconds for one operation in the unit that people use for it.
    #[must_use]
    pub fn cost(self, micros: f64) -> (f64, &'static str) {
        if self == Self::Bulk { (micros * 1e6, "ms/GB") } else { (micros, "us/op") }
    }

    /// Whether the rate says anything: an open loop has the rate that it was given.
    #[must_use]
    pub fn is_a_race(self) -> bool {
        !matches!(self, Self::Paced | Self::Trips | Self::Connect)
    }

    /// Does it for `seconds` from a client of a pair.
    ///
    /// # Errors
    /// A request failed, or the generator said nothing that can be read: then there is no figure at all.
    pub fn run(
        self,
        cluster: &Cluster,
        (pair, client): (&Pair, Seat),
        target: &Target,
        seconds: u32,
    ) -> Result<Sample> {
        let ask = |argv: &[&str]| pair.ask(cluster, client, argv);
        let time = seconds.to_string();
        let said = match self {
            Self::Http => ask(&["wrk", "-t2", "-c", CONNECTIONS, "-d", &time, &format!("http://{}/", target.http)]),
            Self::Large => ask(&["wrk", "-t1", "-c4", "-d", &time, &format!("http://{}/large", target.http)]),
            Self::Fresh => {
                let url = format!("http://{}/", target.http);
                ask(&["wrk", "-t2", "-c", CONNECTIONS, "-d", &time, "-H", "Connection: close", &url])
            }
            Self::Paced => ask(&["probe", "pace", &target.http, "/", &PACE.to_string(), &time]),
            Self::Grpc => ask(&[
                "h2load",
                "-c8",
                "-m8",
                "-D",
                &time,
                "-d",
                "/etc/nsswitch.conf",
                "-H",
                "content-type: application/grpc",
                "-H",
                "te: trailers",
                &format!("http://{}/bench.Hello/Say", target.http2),
            ]),
            Self::Bulk => {
                let (host, port) = target.bulk.as_ref().context("this subject carries no bytes but HTTP")?;
                ask(&["iperf3", "-J", "-P2", "-t", &time, "-c", host, "-p", &port.to_string()])
            }
            Self::Trips => ask(&["probe", "trips", echo(target)?, "1"]),
            Self::Connect => ask(&["probe", "connect", &target.http, &CONNECTS.to_string()]),
        };
        let said = said.with_context(|| format!("{} did not run", self.name()))?;
        let sample = match self {
            Self::Http | Self::Large | Self::Fresh => wrk(&said),
            Self::Paced => probe(&said, seconds),
            Self::Trips | Self::Connect => probe(&said, 1),
            Self::Grpc => h2load(&said),
            Self::Bulk => iperf(&said),
        };
        sample.with_context(|| format!("{} said:\n{said}", self.name()))
    }
}

fn echo(target: &Target) -> Result<&str> {
    target.echo.as_deref().context("this subject carries no bytes but HTTP")
}

fn wrk(said: &str) -> Result<Sample> {
    for fault in ["Socket errors", "Non-2xx"] {
        let line = said.lines().map(str::trim).find(|line| line.starts_with(fault));
        ensure!(line.is_none(), "wrk counted failures: {}", line.unwrap_or_default());
    }
    let rate = number_after(said, "Requests/sec:").context("wrk gave no rate")?;
    let done = said.lines().find_map(|line| line.trim().split_once(" requests in ")).context("wrk gave no count")?;
    Ok(Sample { rate, operations: done.0.parse().context("wrk's count is no number")?, ..Sample::default() })
}

fn h2load(said: &str) -> Result<Sample> {
    // requests: 100 total, 100 started, 100 done, 100 succeeded, 0 failed, 0 errored, 0 timeout
    let line = said.lines().find(|line| line.starts_with("requests:")).context("h2load gave no counts")?;
    let count = |what: &str| -> Option<f64> {
        let field = line.trim_start_matches("requests:").split(',').find(|field| field.ends_with(what))?;
        field.split_whitespace().next()?.parse().ok()
    };
    let (done, succeeded) = (count("done").context("h2load: done")?, count("succeeded").context("h2load: succeeded")?);
    let failed = count("failed").unwrap_or(1.0) + count("errored").unwrap_or(1.0) + count("timeout").unwrap_or(1.0);
    ensure!(done > 0.0 && succeeded >= done && failed == 0.0, "h2load counted failures: {line}");
    // finished in 2.00s, 12345.67 req/s, 1.23MB/s
    let line = said.lines().find(|line| line.starts_with("finished in")).context("h2load gave no rate")?;
    let rate = line.split(',').find_map(|field| field.trim().strip_suffix(" req/s")?.parse().ok());
    Ok(Sample { rate: rate.context("h2load's rate is no number")?, operations: done, ..Sample::default() })
}

fn iperf(said: &str) -> Result<Sample> {
    let all: Value = serde_json::from_str(said).context("iperf3 wrote no JSON")?;
    let sum = &all["end"]["sum_received"];
    let (bits, bytes) = (sum["bits_per_second"].as_f64(), sum["bytes"].as_f64());
    let (bits, bytes) = bits.zip(bytes).context("iperf3 received nothing")?;
    ensure!(bytes > 0.0, "iperf3 received nothing");
    Ok(Sample { rate: bits / 8.0, operations: bytes, ..Sample::default() })
}

/// `COUNT P50 P90 P99 MOST`
fn probe(said: &str, seconds: u32) -> Result<Sample> {
    let fields: Vec<f64> = said.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    let &[count, p50, _, p99, _] = fields.as_slice() else { anyhow::bail!("not five numbers") };
    ensure!(count > 0.0, "nothing was measured");
    Ok(Sample { rate: count / f64::from(seconds), operations: count, p50: Some(p50), p99: Some(p99) })
}

fn number_after(text: &str, key: &str) -> Option<f64> {
    text.lines().find_map(|line| line.trim().strip_prefix(key)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 3s test @ http://10.0.0.1/\n  2 threads and 64 connections\n  Thread Stats   Avg\n  \
                       121212 requests in 3.00s, 29.00MB read\nRequests/sec:  40404.04\nTransfer/sec:  9.6MB\n";

    #[test]
    fn wrk_is_read() {
        let sample = wrk(WRK).expect("it has all");
        assert_eq!((sample.rate, sample.operations), (40_404.04, 121_212.0));
    }

    #[test]
    fn a_rate_with_failures_is_no_rate() {
        for fault in ["  Socket errors: connect 0, read 3, write 0, timeout 0\n", "  Non-2xx or 3xx responses: 12\n"] {
            assert!(wrk(&format!("{WRK}{fault}")).is_err(), "{fault}");
        }
    }

    #[test]
    fn h2load_is_read() {
        let said = "finished in 3.00s, 23456.78 req/s, 3.10MB/s\n\
                    requests: 70370 total, 70434 started, 70370 done, 70370 succeeded, 0 failed, 0 errored, 0 timeout\n";
        assert_eq!(h2load(said).expect("it has all").rate, 23_456.78);
        assert!(h2load(&said.replace("0 failed", "4 failed")).is_err());
        assert!(h2load(&said.replace("70370 done", "0 done")).is_err());
    }

    #[test]
    fn iperf_is_read() {
        let said = r#"{"end":{"sum_received":{"bytes":3000,"bits_per_second":8000.0}}}"#;
        assert_eq!(iperf(said).expect("it has all").rate, 1000.0);
        assert!(iperf(r#"{"error":"unable to connect"}"#).is_err());
    }

    #[test]
    fn probe_is_read() {
        let sample = probe("6000 104.00 200.10 310.50 1000.00\n", 3).expect("it has all");
        assert_eq!((sample.rate, sample.p50, sample.p99), (2000.0, Some(104.0), Some(310.5)));
        assert!(probe("0 0 0 0 0", 3).is_err());
    }
}
