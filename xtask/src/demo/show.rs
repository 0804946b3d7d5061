//! What the demo says on the terminal: numbered steps, what was seen, what it proves, and how long it took.
//!
//! It must not know what the steps are.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// The narrator.
#[derive(Debug)]
pub(super) struct Show {
    begun: Instant,
    step: u32,
    colour: bool,
}

impl Show {
    pub(super) fn new() -> Self {
        use std::io::IsTerminal as _;
        Self { begun: Instant::now(), step: 0, colour: std::io::stdout().is_terminal() }
    }

    /// Begins the next step.
    pub(super) fn step(&mut self, title: &str) {
        self.step += 1;
        let at = self.begun.elapsed().as_secs_f32();
        println!("\n{}", self.paint("1", &format!("{:>2}  {title}", self.step)));
        println!("{}", self.paint("2", &format!("    ({at:.1} s)")));
    }

    pub(super) fn number(&self) -> u32 {
        self.step
    }

    /// Something that happens.
    pub(super) fn note(&self, text: &str) {
        println!("    {text}");
    }

    /// A command as its user types it.
    pub(super) fn typed(&self, text: &str) {
        println!("    {}", self.paint("36", &format!("$ {text}")));
    }

    /// What a program said.
    pub(super) fn block(&self, text: &str) {
        for line in text.lines() {
            println!("      {line}");
        }
    }

    /// Something that was checked.
    pub(super) fn proved(&self, text: &str) {
        println!("    {} {text}", self.paint("32", "✔"));
    }

    /// Something that the viewer must know.
    pub(super) fn caution(&self, text: &str) {
        println!("    {} {text}", self.paint("33", "!"));
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Asks again until there is an answer.
///
/// # Errors
/// There is none in time: the error says what was awaited and the last thing heard.
pub(super) fn until<T>(limit: Duration, what: &str, mut ask: impl FnMut() -> Result<Result<T, String>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match ask()? {
            Ok(answer) => return Ok(answer),
            Err(heard) if Instant::now() > deadline => bail!("{what}: not within {limit:?}; last: {heard}"),
            Err(_not_yet) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Milliseconds with one digit, for people.
pub(super) fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
