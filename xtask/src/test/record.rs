//! A suite's command, run with what it prints going to the terminal and into a log, and counted on the way. It reads what
//! libtest prints and judges nothing.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// How long after a command's end its last words are waited for. What it has left running holds the same pipe, so its end
/// is no sign.
const LAST_WORDS: Duration = Duration::from_secs(1);

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
}

impl Tally {
    /// Takes in one line. Names come in the last list of failures before a result.
    fn read(&mut self, line: &str) {
        if line == "failures:" {
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
            path: path.to_owned(),
            tally: Tally::default(),
        })
    }

    /// Runs a command to its end; failing is an error that names it.
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
        let mut ended = None;
        while self.copy(&lines)? && ended.is_none() {
            ended = child
                .try_wait()
                .with_context(|| format!("cannot wait for `{shown}`"))?;
            if ended.is_some() {
                self.copy(&lines)?;
            }
        }
        let status = match ended {
            Some(status) => status,
            None => child
                .wait()
                .with_context(|| format!("cannot wait for `{shown}`"))?,
        };
        if !status.success() {
            bail!("`{shown}` failed: {status}");
        }
        Ok(())
    }

    /// Copies lines until none come for a while (true) or none can come any more (false).
    fn copy(&mut self, lines: &Receiver<Vec<u8>>) -> Result<bool> {
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
