//! What came out of a run of tests: the runner's own counts, what was skipped, and the figures that were measured.
//! It reads lines and knows no test; the same lines come from cargo here and from a virtual machine's console.

use std::io::{self, BufRead, BufReader, Read};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Everything that the steps of a run had to say.
#[derive(Debug, Default, PartialEq)]
pub struct Report {
    passed: u64,
    failed: u64,
    ignored: u64,
    measured: u64,
    filtered: u64,
    /// Tests that said they could not run here.
    skipped: Vec<String>,
    /// `name value unit`.
    figures: Vec<String>,
    /// Steps that went wrong, one line each.
    faults: Vec<String>,
}

impl Report {
    /// Runs one step to its end, showing and reading what it prints. A failed test is remembered, not returned.
    ///
    /// # Errors
    /// When the command cannot be started at all.
    pub fn step(&mut self, name: &str, mut command: Command) -> Result<()> {
        println!("\n== {name}");
        let (reader, writer) = io::pipe().context("cannot make a pipe")?;
        let began = Instant::now();
        command.stdout(writer.try_clone().context("cannot share a pipe")?).stderr(writer);
        let mut child = command.spawn().with_context(|| format!("cannot start the {name}"))?;
        // The command holds the pipe's other end: while it lives here too, the end never comes.
        drop(command);
        let own = Self::read(reader, |line| println!("{line}"))?;
        let status = child.wait().with_context(|| format!("cannot wait for the {name}"))?;
        let failed = own.failed;
        self.add(own);
        if !status.success() {
            self.fault(&format!("{name}: {failed} failed, {status}"));
        }
        println!("== {name}: {:.1} s", began.elapsed().as_secs_f64());
        Ok(())
    }

    /// As `step`, for a step that must have tests: none at all is a fault.
    pub fn step_with_tests(&mut self, name: &str, command: Command) -> Result<()> {
        let before = self.ran();
        self.step(name, command)?;
        if self.ran() == before && self.faults.is_empty() {
            self.fault(&format!("{name}: no test belongs to it"));
        }
        Ok(())
    }

    /// Reads every line of `from`, giving each to `show`.
    pub fn read(from: impl Read, mut show: impl FnMut(&str)) -> Result<Self> {
        let mut report = Self::default();
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).context("cannot read what the tests say")? > 0 {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            show(text);
            report.line(text);
            line.clear();
        }
        Ok(report)
    }

    /// The same, with the place where it was found named in every skip and figure.
    pub fn found_on(mut self, place: &str) -> Self {
        for line in self.skipped.iter_mut().chain(&mut self.figures) {
            line.insert_str(0, place);
        }
        self
    }

    /// Joins what another run had to say.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.measured += other.measured;
        self.filtered += other.filtered;
        self.skipped.extend(other.skipped);
        self.figures.extend(other.figures);
        self.faults.extend(other.faults);
    }

    /// How many tests really ran.
    pub fn ran(&self) -> u64 {
        self.passed + self.failed
    }

    /// How many tests failed.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Says now, and again at the end, that something did not run.
    pub fn skip(&mut self, what: &str) {
        println!("\nSKIPPED {what}");
        self.skipped.push(what.to_owned());
    }

    /// Remembers a measured figure.
    pub fn figure(&mut self, name: &str, value: f64, unit: &str) {
        self.figures.push(format!("{name} {value:.3} {unit}"));
    }

    /// Remembers that a step went wrong.
    pub fn fault(&mut self, what: &str) {
        println!("\nFAILED {what}");
        self.faults.push(what.to_owned());
    }

    /// Prints what must be seen last; the very last line is the sum, in the test runner's own form.
    /// False when anything failed.
    pub fn finish(self, took: Duration) -> bool {
        self.show_findings();
        let good = self.failed == 0 && self.faults.is_empty();
        println!(
            "test result: {}. {} passed; {} failed; {} ignored; {} measured; {} filtered out; finished in {:.2}s",
            if good { "ok" } else { "FAILED" },
            self.passed,
            self.failed,
            self.ignored,
            self.measured,
            self.filtered,
            took.as_secs_f64()
        );
        good
    }

    /// As `finish`, for a run that measured and tested nothing.
    pub fn finish_figures(&self) -> bool {
        self.show_findings();
        self.faults.is_empty()
    }

    fn show_findings(&self) {
        println!();
        for skipped in &self.skipped {
            println!("SKIPPED {skipped}");
        }
        for fault in &self.faults {
            println!("FAILED {fault}");
        }
        for figure in &self.figures {
            println!("{figure}");
        }
    }

    /// Reads one line; lines that mean nothing to us are most of them.
    fn line(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.counts(counts);
        } else if let Some(figure) = line.strip_prefix("FIGURE ") {
            self.figures.push(figure.to_owned());
        } else if let Some(skipped) = line.strip_prefix("SKIPPED ") {
            self.skipped.push(skipped.to_owned());
        }
    }

    /// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s`
    fn counts(&mut self, counts: &str) {
        let Some((_, counts)) = counts.split_once(". ") else { return };
        for count in counts.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                "measured" => self.measured += number,
                "filtered out" => self.filtered += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Report;

    #[test]
    fn lines_of_several_runs_are_added_up() {
        let said = "running 2 tests\r\n\
            test a ... ok\r\n\
            SKIPPED kernel::b: needs the kernel tier, but no\r\n\
            test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s\r\n\
            FIGURE vm.boot 2.5 s\n\
            test result: FAILED. 1 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let report = Report::read(said.as_bytes(), |_| {}).expect("memory does not fail");
        let expected = Report {
            passed: 3,
            failed: 3,
            ignored: 1,
            measured: 0,
            filtered: 7,
            skipped: vec!["kernel::b: needs the kernel tier, but no".to_owned()],
            figures: vec!["vm.boot 2.5 s".to_owned()],
            faults: vec![],
        };
        assert_eq!(report, expected);
    }
}
