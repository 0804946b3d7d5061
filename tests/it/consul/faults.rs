//! What a real Consul does not do on command: garbage, silence, an index that runs backwards or is missing.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use mesh_tests::until::until;

use super::discovery::Running;

const LIMIT: Duration = Duration::from_secs(20);
const WORLD: &str = r#"[{"Node":{"Address":"10.0.0.1"},"Service":{"ID":"w","Port":80},"Checks":[]}]"#;

/// What the double answers.
#[derive(Clone, Debug)]
struct Script {
    /// `None`: no such header.
    index: Option<u64>,
    names: &'static str,
    health: &'static str,
    /// Whether an ACL has kept something of that back.
    filtered: bool,
    /// Whether an answer to a blocking question is kept back.
    blocks: bool,
    /// Whether nothing at all is answered.
    silent: bool,
}

/// A loopback server that answers by a script, and remembers what it was asked.
struct Double {
    addr: SocketAddr,
    shared: Arc<Mutex<(Script, Vec<String>)>>,
}

impl Double {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let script = Script {
            index: Some(7),
            names: r#"{"world":[]}"#,
            health: WORLD,
            filtered: false,
            blocks: true,
            silent: false,
        };
        let shared = Arc::new(Mutex::new((script, Vec::new())));
        let double = Self { addr: listener.local_addr()?, shared: shared.clone() };
        // It ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                // A client that goes away is its own business.
                thread::spawn(move || serve(stream, &shared).ok());
            }
        });
        Ok(double)
    }

    fn running(&self) -> Result<Running> {
        self.running_with("")
    }

    /// With these lines in `[discovery.consul]` besides.
    fn running_with(&self, more: &str) -> Result<Running> {
        Running::start(&format!("http://{}", self.addr), &format!("wait = \"1s\"\n{more}"))
    }

    fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.shared.lock().unwrap_or_else(PoisonError::into_inner).0);
    }

    /// What was asked for since the last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.lock().unwrap_or_else(PoisonError::into_inner).1)
    }
}

fn serve(mut stream: TcpStream, shared: &Mutex<(Script, Vec<String>)>) -> std::io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    loop {
        let mut request = String::new();
        if input.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut header = String::new();
        while input.read_line(&mut header)? > 2 {
            header.clear();
        }
        let began = Instant::now();
        let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let asked = target.split('&').find_map(|part| part.strip_prefix("index=")).and_then(|index| index.parse().ok());
        let script = || shared.lock().unwrap_or_else(PoisonError::into_inner).0.clone();
        shared.lock().unwrap_or_else(PoisonError::into_inner).1.push(target.clone());
        while script().silent
            || script().blocks && asked == script().index && asked.is_some() && began.elapsed() < Duration::from_secs(1)
        {
            thread::sleep(Duration::from_millis(5));
        }
        let script = script();
        let (body, filtered) = match target.split('?').next() {
            Some("/v1/catalog/services") => (script.names, script.names == "{}" && script.filtered),
            Some(path) if path.starts_with("/v1/health/state/") => ("[]", false),
            _ => (script.health, script.filtered),
        };
        let index = script.index.map(|index| format!("X-Consul-Index: {index}\r\n")).unwrap_or_default();
        let filtered = if filtered { "X-Consul-Results-Filtered-By-ACLs: true\r\n" } else { "" };
        write!(stream, "HTTP/1.1 200 OK\r\n{index}{filtered}Content-Length: {}\r\n\r\n{body}", body.len())?;
    }
}

#[test]
fn garbage_changes_nothing() -> Result<()> {
    let double = Double::start()?;
    let running = double.running()?;
    let world: &[(&str, &[&str])] = &[("world", &["80 10.0.0.1:80 100"])];
    running.await_seen(world)?;
    for (names, health) in [("<html>", WORLD), (r#"{"world":[]}"#, "{}"), ("{}", WORLD), ("", "")] {
        double.change(|script| {
            (script.names, script.health) = (names, health);
            script.index = script.index.map(|index| index + 1);
        });
        until(LIMIT, "it is noticed", || Ok(running.error().map(|_error| ()).ok_or(names)))?;
        running.await_seen(world)?;
        double.change(|script| {
            (script.names, script.health) = (r#"{"world":[]}"#, WORLD);
            script.index = script.index.map(|index| index + 1);
        });
        until(LIMIT, "all is well again", || Ok(running.error().map_or(Ok(()), Err)))?;
    }
    Ok(())
}

#[test]
fn an_index_that_goes_back_is_not_asked_for_again() -> Result<()> {
    let double = Double::start()?;
    let running = double.running()?;
    running.await_seen(&[("world", &["80 10.0.0.1:80 100"])])?;
    until(LIMIT, "it blocks", || {
        Ok(if double.asked().iter().any(|asked| asked.contains("index=7")) { Ok(()) } else { Err("") })
    })?;
    double.change(|script| script.index = Some(3));
    until(LIMIT, "it asks from the beginning and goes on from there", || {
        let asked = double.asked();
        let list: Vec<_> = asked.iter().filter(|asked| asked.contains("catalog")).collect();
        Ok(if list.iter().any(|asked| asked.contains("index=3")) { Ok(()) } else { Err(format!("{list:?}")) })
    })?;
    thread::sleep(Duration::from_millis(1200));
    ensure!(!double.asked().iter().any(|asked| asked.contains("index=7")), "the old index is forgotten");
    running.await_seen(&[("world", &["80 10.0.0.1:80 100"])])
}

#[test]
fn a_server_that_does_not_block_is_not_asked_without_end() -> Result<()> {
    let double = Double::start()?;
    double.change(|script| (script.index, script.blocks) = (None, false));
    let running = double.running()?;
    running.await_seen(&[("world", &["80 10.0.0.1:80 100"])])?;
    double.asked();
    // A span of time is what is measured here.
    thread::sleep(Duration::from_secs(4));
    let asked = double.asked().len();
    // Two queries, two in a second each, and what is left of ten at the beginning.
    ensure!((4..=2 * (10 + 4 * 2)).contains(&asked), "{asked} questions in four seconds");
    Ok(())
}

#[test]
fn silence_is_noticed() -> Result<()> {
    let double = Double::start()?;
    let running = double.running()?;
    running.await_seen(&[("world", &["80 10.0.0.1:80 100"])])?;
    double.change(|script| (script.silent, script.index) = (true, Some(8)));
    until(LIMIT * 2, "an error", || {
        let error = running.error().unwrap_or_default();
        Ok(if error.contains("did not answer") { Ok(()) } else { Err(error) })
    })?;
    running.await_seen(&[("world", &["80 10.0.0.1:80 100"])])?;
    double.change(|script| script.silent = false);
    until(LIMIT * 2, "all is well again", || Ok(running.error().map_or(Ok(()), Err)))
}

const TWO: &str = r#"{"other":[],"world":[]}"#;
const BOTH: &[(&str, &[&str])] = &[("other", &["80 10.0.0.1:80 100"]), ("world", &["80 10.0.0.1:80 100"])];

/// One of them has a watch, the other is swept.
#[test]
fn instances_that_an_acl_hides_take_nothing_away_from_a_swept_service_either() -> Result<()> {
    for watches in ["watches = 1", "watches = 2"] {
        let double = Double::start()?;
        double.change(|script| script.names = TWO);
        let running = double.running_with(watches)?;
        running.await_seen(BOTH)?;
        double.asked();
        double.change(|script| (script.health, script.filtered, script.index) = ("[]", true, Some(8)));
        running.await_error("Consul hides services")?;
        let mut seen = Vec::new();
        until(LIMIT, "both have been asked for, and the answers read", || {
            seen.extend(double.asked());
            let count = |name: &str| seen.iter().filter(|asked| asked.contains(&format!("/service/{name}?"))).count();
            // The second question comes after the first answer.
            Ok(if count("other") > 1 && count("world") > 1 { Ok(()) } else { Err(format!("{seen:?}")) })
        })?;
        running.await_seen(BOTH)?;
        double.asked();
        // A span of time is what is measured here: a swept service is asked for again, and not without end.
        thread::sleep(Duration::from_secs(3));
        let asked = double.asked().iter().filter(|asked| asked.contains("/service/world?")).count();
        let least = usize::from(watches == "watches = 1");
        ensure!((least..=6).contains(&asked), "{asked} questions in three seconds");
        double.change(|script| (script.health, script.filtered, script.index) = (WORLD, false, Some(9)));
        until(LIMIT, "all is well again", || Ok(running.error().map_or(Ok(()), Err)))?;
        running.await_seen(BOTH)?;
        // Not hidden: there are none.
        double.change(|script| (script.health, script.index) = ("[]", Some(10)));
        running.await_seen(&[("other", &[]), ("world", &[])])?;
    }
    Ok(())
}

/// Consul's own servers are in the namespace `default`: another one may have no service at all.
#[test]
fn a_namespace_may_be_empty() -> Result<()> {
    let double = Double::start()?;
    let running = double.running_with("namespace = \"team-a\"")?;
    let world: &[(&str, &[&str])] = &[("world", &["80 10.0.0.1:80 100"])];
    running.await_seen(world)?;
    let asked = double.asked();
    ensure!(asked.len() >= 2 && asked.iter().all(|asked| asked.contains("ns=team-a")), "{asked:?}");
    let names = |names, filtered| {
        double.change(|script| {
            (script.names, script.filtered) = (names, filtered);
            script.index = script.index.map(|index| index + 1);
        });
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let check = |more: &str| {
        let config = super::discovery::configured(&format!("address = \"http://{}\"\n{more}", double.addr))?;
        anyhow::Ok(runtime.block_on(mesh_agent::discovery::consul::check::check(config)))
    };
    names("{}", false);
    running.await_seen(&[])?;
    ensure!(running.error().is_none(), "{:?}", running.error());
    let said = check("namespace = \"team-a\"")?;
    ensure!(said.as_ref().is_ok_and(|said| said.contains("0 of 0 services are wanted")), "{said:?}");
    for with_servers in ["", "namespace = \"default\""] {
        ensure!(check(with_servers)?.is_err(), "{with_servers}: Consul itself is missing");
    }
    names(r#"{"world":[]}"#, false);
    running.await_seen(world)?;
    // Emptied by an ACL.
    names("{}", true);
    running.await_error("Consul hides services")?;
    running.await_seen(world)?;
    ensure!(check("namespace = \"team-a\"")?.is_err(), "it is hidden");
    Ok(())
}
