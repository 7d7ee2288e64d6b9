//! One server process: started with its log in a file, watched, ended. It knows processes by number and start time, so
//! that a number that went to somebody else is never sent a signal.
#![expect(
    unsafe_code,
    reason = "the parent-death signal is set between fork and exec"
)]

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// How long the kernel may take to end a killed process on a loaded machine.
const KILL: Duration = Duration::from_secs(30);
/// How long a program in front may take to start the one behind it.
const START: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// Lines of a log that an error shows.
const TAIL: usize = 15;

/// When a server ends at the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Lifetime {
    /// With this process, however that ends.
    WithUs,
    /// When somebody ends it.
    OnItsOwn,
}

/// A server that was started, by this process or by another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Server {
    name: String,
    pid: i32,
    start_time: u64,
    /// It leads a process group, all of which is meant.
    #[serde(default)]
    group: bool,
    log: PathBuf,
}

impl Server {
    /// Starts a program; what it prints goes to `dir/name.log`, behind what is there.
    pub(crate) fn start(
        dir: &Path,
        name: &str,
        mut command: Command,
        lifetime: Lifetime,
    ) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("making {}", log.display()))?;
        let second = file.try_clone().context("cloning a file")?;
        command.stdin(Stdio::null()).stdout(file).stderr(second);
        match lifetime {
            Lifetime::WithUs => die_with_parent(&mut command),
            // Ctrl-C on the terminal is not for it.
            Lifetime::OnItsOwn => drop(command.process_group(0)),
        }
        let (tell, told) = mpsc::channel();
        let keeper = move || {
            let started = command
                .spawn()
                .with_context(|| format!("starting {command:?}"));
            match started {
                Ok(mut child) => {
                    let pid = child.id().cast_signed();
                    let _nobody_listens = tell.send(Ok(pid));
                    // Reaps it. The parent-death signal comes when this thread ends, so it stays until then.
                    let _status = child.wait();
                }
                Err(error) => {
                    let _nobody_listens = tell.send(Err(error));
                }
            }
        };
        std::thread::Builder::new()
            .name(format!("wait {name}"))
            .spawn(keeper)
            .context("starting a thread")?;
        let pid = told
            .recv()
            .context("the thread that starts a server died")??;
        Ok(Self {
            name: name.to_owned(),
            pid,
            // One that has ended already has none, and is not alive.
            start_time: start_time(pid).unwrap_or_default(),
            group: false,
            log,
        })
    }

    /// The one program that this one has started, which is what was meant: `nsenter` and `unshare` stay in front of it.
    pub(crate) fn behind(&self) -> Result<Self> {
        let list = format!("/proc/{0}/task/{0}/children", self.pid);
        let mut pid = None;
        self.wait_until("it starts its program", START, || {
            pid = fs::read_to_string(&list)
                .ok()
                .and_then(|text| text.split(' ').next()?.parse().ok());
            pid.is_some()
        })?;
        let pid = pid.context("no program")?;
        Ok(Self {
            pid,
            start_time: start_time(pid).unwrap_or_default(),
            ..self.clone()
        })
    }

    /// What it is called.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The same, when it leads a process group: signals go to all of it, and it has ended when all have.
    pub(crate) fn with_group(self) -> Self {
        Self {
            group: true,
            ..self
        }
    }

    /// Its process number as this machine counts.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it runs.
    pub(crate) fn alive(&self) -> bool {
        self.start_time != 0 && start_time(self.pid) == Some(self.start_time)
    }

    /// Sends a signal; one to a server that has ended is lost.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        if self.alive() {
            let whom = if self.group { -self.pid } else { self.pid };
            kill(Pid::from_raw(whom), signal)
                .with_context(|| format!("sending {signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// Ends it by force and waits until it is gone.
    pub(crate) fn kill(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_for_end()
    }

    /// Waits until it is gone.
    pub(crate) fn wait_for_end(&self) -> Result<()> {
        let started = Instant::now();
        let group = || self.group && kill(Pid::from_raw(-self.pid), None).is_ok();
        while self.alive() || group() {
            ensure!(
                started.elapsed() < KILL,
                "{} (pid {}) does not end",
                self.name,
                self.pid
            );
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until something holds; fails at once when the server ends before.
    pub(crate) fn wait_until(
        &self,
        what: &str,
        timeout: Duration,
        mut holds: impl FnMut() -> bool,
    ) -> Result<()> {
        let started = Instant::now();
        loop {
            let alive = self.alive();
            if holds() {
                return Ok(());
            }
            if !alive {
                bail!("{} ended before {what}\n{}", self.name, self.tail());
            }
            if started.elapsed() > timeout {
                bail!(
                    "{}: {what}: not within {timeout:?}\n{}",
                    self.name,
                    self.tail()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// The end of what it printed.
    pub(crate) fn tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let from = lines.len().saturating_sub(TAIL);
        format!(
            "{}:\n  {}",
            self.log.display(),
            lines.get(from..).unwrap_or_default().join("\n  ")
        )
    }
}

/// When a process started, in ticks since boot; `None` when there is none, or only what is left to be reaped.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    start_time_in(&stat)
}

fn start_time_in(stat: &str) -> Option<u64> {
    // The program's name may hold blanks and parentheses.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    let threads: u32 = fields.nth(16)?.parse().ok()?;
    // The first thread may be gone while others still hold the program's sockets.
    if state == "X" || (state == "Z" && threads <= 1) {
        return None;
    }
    fields.nth(1)?.parse().ok()
}

/// Lets the kernel kill the program when this process dies, however that happens.
fn die_with_parent(command: &mut Command) {
    let set = || nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from);
    // SAFETY: between fork and exec only one system call is made, nothing is allocated or locked.
    unsafe { command.pre_exec(set) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_time_is_found_behind_an_odd_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 2";
        assert_eq!(start_time_in(stat), Some(4242));
        assert_eq!(start_time_in(&stat.replace(" S ", " Z ")), None);
        let others = stat
            .replace(" S ", " Z ")
            .replace(" 20 0 1 0 ", " 20 0 9 0 ");
        assert_eq!(start_time_in(&others), Some(4242));
        assert_eq!(start_time_in(""), None);
    }
}
