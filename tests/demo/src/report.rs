//! What is printed: headings, and lines with a mark and a proof. It counts the false ones and decides nothing else.

use std::io::{IsTerminal as _, Write as _, stdin, stdout};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::interrupt;

/// Width of the column that says what is checked.
const WHAT: usize = 37;
/// Width of the column that gives the proof.
const PROOF: usize = 66;
/// How long anything may take that is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);
/// How often a pause looks for signals, in milliseconds.
const TICK: u16 = 50;

/// The printed page.
#[derive(Debug)]
pub(crate) struct Report {
    pause: bool,
    terminal: bool,
    colour: bool,
    steps: usize,
    lines: usize,
    wrong: usize,
    started: Instant,
}

impl Report {
    pub(crate) fn new(pause: bool) -> Self {
        let terminal = stdout().is_terminal();
        Self {
            pause,
            terminal,
            colour: terminal && std::env::var_os("NO_COLOR").is_none(),
            steps: 0,
            lines: 0,
            wrong: 0,
            started: Instant::now(),
        }
    }

    pub(crate) fn title(&self, text: &str) -> Result<()> {
        print(&format!("{}\n\n", self.paint("1", text)))
    }

    pub(crate) fn note(&self, text: &str) -> Result<()> {
        print(text)
    }

    /// Begins a step.
    pub(crate) fn step(&mut self, text: &str) -> Result<()> {
        if self.pause {
            self.wait_for_enter()?;
        }
        self.steps += 1;
        let heading = format!("{}  {text}", self.steps);
        print(&format!("\n{}\n", self.paint("1", &heading)))
    }

    /// Checks one line and goes on whatever comes out. Fails only when the demonstration is to end.
    pub(crate) fn line(
        &mut self,
        what: &str,
        check: impl FnOnce() -> Result<String>,
    ) -> Result<()> {
        match self.run(what, || Ok(((), check()?)))? {
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Checks one line that all the following build on.
    pub(crate) fn need<T>(
        &mut self,
        what: &str,
        check: impl FnOnce() -> Result<(T, String)>,
    ) -> Result<T> {
        // Why is on the page already.
        self.run(what, check)?
            .map_err(|_| anyhow!("cannot go on without \"{what}\" (see above)"))
    }

    fn run<T>(
        &mut self,
        what: &str,
        check: impl FnOnce() -> Result<(T, String)>,
    ) -> Result<Result<T>> {
        interrupt::check()?;
        if self.terminal {
            print(&format!("   … {what}"))?;
        }
        let outcome = check();
        if self.terminal {
            print("\r\x1b[K")?;
        }
        // A signal explains whatever else went wrong, and a child may have got it a moment before us.
        if outcome.is_err() {
            interrupt::sleep(Duration::from_millis(100))?;
        }
        interrupt::check()?;
        self.lines += 1;
        match outcome {
            Ok((value, proof)) => {
                self.print_line(true, what, &proof)?;
                Ok(Ok(value))
            }
            Err(error) => {
                self.wrong += 1;
                self.print_line(false, what, &format!("{error:#}"))?;
                Ok(Err(error))
            }
        }
    }

    fn print_line(&self, good: bool, what: &str, proof: &str) -> Result<()> {
        let mark = match (self.terminal, good) {
            (true, true) => self.paint("32", "✓"),
            (true, false) => self.paint("31;1", "✗"),
            (false, true) => "ok   ".to_owned(),
            (false, false) => "WRONG".to_owned(),
        };
        let indent = if self.terminal { 5 } else { 9 } + WHAT + 1;
        let wrapped = wrap(proof, PROOF).join(&format!("\n{:indent$}", ""));
        print(&format!("   {mark} {what:<WHAT$} {wrapped}\n"))
    }

    /// The last word: fails if any line was false.
    pub(crate) fn conclude(&self) -> Result<()> {
        let (lines, wrong) = (self.lines, self.wrong);
        ensure!(wrong == 0, "{wrong} of {lines} lines are false (see above)");
        let took = self.started.elapsed().as_secs_f64();
        let text = format!("All {lines} lines hold; {took:.1} s; everything is cleaned up.");
        print(&format!("\n{}\n", self.paint("1", &text)))
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn wait_for_enter(&self) -> Result<()> {
        print("\n   [Enter] ")?;
        let stdin = stdin();
        loop {
            interrupt::check()?;
            let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(TICK)) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => break,
                Err(error) => bail!("waiting for Enter: {error}"),
            }
        }
        let mut line = String::new();
        stdin.read_line(&mut line).context("waiting for Enter")?;
        Ok(())
    }
}

fn print(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("printing")
}

/// Breaks text at spaces, and keeps its own line breaks.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_proofs_are_broken_at_spaces() {
        assert_eq!(wrap("aa bb cc\ndd", 5), ["aa bb", "cc", "dd"]);
        assert_eq!(wrap("aaaaaaaa b", 5), ["aaaaaaaa", "b"]);
    }

    #[test]
    fn one_false_line_fails_the_whole() {
        let mut report = Report::new(false);
        report.line("true", || Ok("seen".to_owned())).unwrap();
        assert!(report.conclude().is_ok());
        report.line("false", || bail!("not seen")).unwrap();
        report.line("true again", || Ok("seen".to_owned())).unwrap();
        assert!(report.conclude().is_err());
    }
}
