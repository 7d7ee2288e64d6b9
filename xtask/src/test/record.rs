//! A suite's command, run with what it prints going to the terminal and into a log, and counted on the way. It reads what
//! libtest prints and judges nothing.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::family;
use crate::cmd;

/// How long a suite's tests may take, what is compiled for them included. The longest takes half of it on two processors
/// that have nothing else to do; one that is still running then waits for something that does not come.
const LIMIT: Duration = Duration::from_secs(60 * 60);
/// How long after a command's end its last words are waited for. What it has left running holds the same pipe, so its end
/// is no sign.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// What it has left running may go on talking; nobody listens for longer.
const ENOUGH: Duration = Duration::from_secs(10);

/// Results of libtest, summed up.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) passed: u64,
    pub(super) failed: u64,
    pub(super) ignored: u64,
    /// Tests that failed.
    pub(super) names: BTreeSet<String>,
    /// Names of a list that may turn out to be something else.
    pub(super) listed: Vec<String>,
    /// Which tests run by now, as cargo names them.
    pub(super) binary: Option<String>,
    /// Tests that have been running for a minute, by libtest's own clock.
    pub(super) slow: BTreeSet<String>,
}

impl Tally {
    /// Takes in one line. Names come in the last list of failures before a result.
    fn read(&mut self, line: &str) {
        if let Some(test) = line.strip_prefix("test ")
            && let Some((name, what)) = test.split_once(' ')
        {
            if what.starts_with("has been running for over") {
                self.slow.insert(name.to_owned());
            } else if what.starts_with("... ") {
                self.slow.remove(name);
            }
        }
        if let Some(binary) = line.strip_prefix("     Running ") {
            self.binary = Some(binary.to_owned());
            self.slow.clear();
        } else if line == "failures:" {
            self.listed.clear();
        } else if let Some(name) = line.strip_prefix("    ") {
            self.listed.push(name.to_owned());
        } else if let Some(result) = line.strip_prefix("test result: ") {
            for (count, what) in [
                (&mut self.passed, " passed"),
                (&mut self.failed, " failed"),
                (&mut self.ignored, " ignored"),
            ] {
                *count += counted(result, what);
            }
            if result.starts_with("FAILED") {
                self.names.extend(self.listed.drain(..));
            }
            self.listed.clear();
            self.slow.clear();
        }
    }

    /// What ran last, for somebody who wants to know why it does not end.
    fn last(&self) -> String {
        let names: Vec<_> = self.slow.iter().map(String::as_str).collect();
        let names = match names[..] {
            [] => "no test that has been running for long".to_owned(),
            _ => names.join(", "),
        };
        match &self.binary {
            Some(binary) => format!("{names}, in {binary}"),
            None => names,
        }
    }
}

/// The number before a word: `ok. 5 passed; 0 failed; ..`.
fn counted(result: &str, what: &str) -> u64 {
    result
        .split(';')
        .find_map(|part| part.trim().strip_suffix(what)?.rsplit(' ').next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// The log of one suite.
pub(super) struct Record {
    log: File,
    limit: Duration,
    pub(super) path: PathBuf,
    pub(super) tally: Tally,
}

impl Record {
    /// Begins a log anew.
    pub(super) fn begin(path: &Path) -> Result<Self> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let log =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            log,
            limit: LIMIT,
            path: path.to_owned(),
            tally: Tally::default(),
        })
    }

    /// Runs a command to its end; failing is an error that names it. After [`LIMIT`] it is ended, with all it has started,
    /// and the error names what ran last.
    pub(super) fn run(&mut self, command: &mut Command) -> Result<()> {
        let shown = cmd::show(command);
        let (reader, writer) = io::pipe().context("cannot make a pipe")?;
        let (tell, lines) = mpsc::channel();
        let mut child = command
            .stdout(writer.try_clone().context("cannot clone a pipe")?)
            .stderr(writer)
            .spawn()
            .with_context(|| format!("cannot run `{shown}`"))?;
        // The command would keep our end of the pipe, and the reader with it.
        command.stdout(Stdio::inherit()).stderr(Stdio::inherit());
        std::thread::spawn(move || {
            let mut reader = BufReader::new(reader);
            let mut line = Vec::new();
            while reader
                .read_until(b'\n', &mut line)
                .is_ok_and(|read| read > 0)
            {
                if tell.send(std::mem::take(&mut line)).is_err() {
                    break;
                }
            }
        });
        let status = self
            .follow(&mut child, &lines)
            .with_context(|| format!("cannot wait for `{shown}`"))?;
        // Also of what it has been ended by.
        self.copy(&lines, Instant::now() + ENOUGH)?;
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("`{shown}` failed: {status}"),
            None => bail!(
                "`{shown}` was ended: it was still running after {} minutes; last: {}",
                self.limit.as_secs() / 60,
                self.tally.last()
            ),
        }
    }

    /// Copies what a command prints until it has ended, or has been ended (`None`) because it took too long.
    fn follow(
        &mut self,
        child: &mut Child,
        lines: &Receiver<Vec<u8>>,
    ) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + self.limit;
        loop {
            let told_all = !self.copy(lines, Instant::now() + LAST_WORDS)?;
            if let Some(status) = child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                family::end(child.id())?;
                child.wait()?;
                return Ok(None);
            }
            if told_all {
                std::thread::sleep(LAST_WORDS);
            }
        }
    }

    /// Copies lines until none come for a while or that moment has come (true), or none can come any more (false).
    fn copy(&mut self, lines: &Receiver<Vec<u8>>, until: Instant) -> Result<bool> {
        loop {
            match lines.recv_timeout(LAST_WORDS) {
                Ok(line) => {
                    io::stdout().write_all(&line).context("cannot print")?;
                    self.log
                        .write_all(&line)
                        .with_context(|| format!("cannot write {}", self.path.display()))?;
                    self.tally.read(String::from_utf8_lossy(&line).trim_end());
                }
                Err(RecvTimeoutError::Timeout) => return Ok(true),
                Err(RecvTimeoutError::Disconnected) => return Ok(false),
            }
            if Instant::now() >= until {
                return Ok(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 3 tests
test a::good ... ok
test a::bad ... FAILED
test a::odd ... ignored, needs a moon

failures:

---- a::bad stdout ----
    this is no name
thread 'a::bad' panicked

failures:
    a::bad

test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s

     Running tests/x.rs
    neither is this
test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.00s
";

    #[test]
    fn results_are_summed_up_and_failures_named() {
        let mut tally = Tally::default();
        for line in OUTPUT.lines() {
            tally.read(line);
        }
        assert_eq!((tally.passed, tally.failed, tally.ignored), (13, 1, 1));
        assert_eq!(tally.names, BTreeSet::from(["a::bad".to_owned()]));
    }

    #[test]
    fn what_a_command_prints_is_kept_and_its_failure_told() {
        let path = std::env::temp_dir().join(format!("culvert-record-{}", std::process::id()));
        let mut record = Record::begin(&path).unwrap();
        let mut good = Command::new("printf");
        good.arg("first\nlast words");
        record.run(&mut good).unwrap();
        let mut bad = Command::new("sh");
        bad.args(["-c", "echo said >&2; exit 3"]);
        let error = record.run(&mut bad).unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        let kept = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(kept == "first\nlast wordssaid\n", "{kept}");
    }

    #[test]
    fn what_takes_too_long_is_ended_with_all_it_has_started_and_named() {
        let path = std::env::temp_dir().join(format!("culvert-late-{}", std::process::id()));
        let mut record = Record::begin(&path).unwrap();
        record.limit = Duration::from_secs(3);
        // In a process group of its own, as servers of tests are, and never silent.
        let script = "echo '     Running tests/x.rs (x)'
            echo 'test a::done has been running for over 60 seconds'
            echo 'test a::hangs has been running for over 60 seconds'
            echo 'test a::done ... ok'
            setsid sleep 1000 & echo $!
            while :; do echo still here; sleep 0.5; done";
        let error = record.run(Command::new("sh").args(["-c", script]));
        let error = error.unwrap_err().to_string();
        let last = "; last: a::hangs, in tests/x.rs (x)";
        assert!(error.ends_with(last), "{error}");
        let said = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let sleeper = said.lines().nth(4).unwrap();
        let sleeper = Path::new("/proc").join(sleeper).join("cmdline");
        let line = fs::read_to_string(sleeper).unwrap_or_default();
        assert!(!line.contains("sleep"), "{line}");
    }

    #[test]
    fn what_a_command_leaves_running_does_not_hold_it_up() {
        let path = std::env::temp_dir().join(format!("culvert-left-{}", std::process::id()));
        let mut record = Record::begin(&path).unwrap();
        let started = std::time::Instant::now();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 30 & echo $!"]);
        record.run(&mut command).unwrap();
        assert!(started.elapsed() < Duration::from_secs(20));
        let sleeper = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        crate::cmd::run(Command::new("kill").arg(sleeper.trim())).unwrap();
    }
}
