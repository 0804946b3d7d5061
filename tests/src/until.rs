//! Waiting for something to become true, and running many checks on one expensive set-up.
//!
//! It must not know what is waited for.

use std::{
    fmt::Display,
    io::{self, Write as _},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Asks every few milliseconds until the answer is good; the error holds the last bad one.
///
/// # Errors
/// The limit has passed, or asking failed.
pub fn until<T, E: Display>(limit: Duration, what: &str, mut ask: impl FnMut() -> Result<Result<T, E>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match ask()? {
            Ok(good) => return Ok(good),
            Err(bad) if Instant::now() > deadline => bail!("not within {limit:?}: {what}; last: {bad}"),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Named checks on one set-up: all run, and each says how it went.
#[derive(Debug, Default)]
pub struct Checks {
    failed: Vec<String>,
}

impl Checks {
    /// Runs one.
    pub fn run(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        let began = Instant::now();
        let done = check();
        let verdict = if done.is_ok() { "ok" } else { "FAILED" };
        let said = format!("      {name} … {verdict} ({:.1} s)\n", began.elapsed().as_secs_f32());
        // A closed stderr is nobody's fault.
        drop(io::stderr().write_all(said.as_bytes()));
        if let Err(error) = done {
            self.failed.push(format!("{name}: {error:#}"));
        }
    }

    /// # Errors
    /// One of them failed.
    pub fn done(self) -> Result<()> {
        if self.failed.is_empty() { Ok(()) } else { bail!("{}", self.failed.join("\n\n")) }
    }
}
