//! Programs run in a namespace of the lab: started, watched, ended. None outlives its guard or the test process.
#![expect(
    unsafe_code,
    reason = "the parent-death signal is set between fork and exec"
)]

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::Ns;
use crate::creds::Creds;
use crate::lab::keep;
use crate::ns::Place;
use crate::pidns::Inside;

/// How much of its output a program that is dropped in a failing test shows.
const TAIL: usize = 30;
/// How long the kernel may take to end a killed process.
const KILL: Duration = Duration::from_secs(10);

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    name: String,
    pid: Pid,
    stdout: PathBuf,
    stderr: PathBuf,
    end: Arc<End>,
}

#[derive(Debug, Default)]
struct End {
    status: Mutex<Option<ExitStatus>>,
    changed: Condvar,
}

impl Ns {
    /// Starts a program here, in the lab's cgroup. Its output goes to files, its input is empty.
    pub fn spawn(&self, command: Command) -> Result<Child> {
        self.spawn_as(Creds::Root, command)
    }

    /// Starts a program as somebody.
    pub fn spawn_as(&self, creds: Creds, command: Command) -> Result<Child> {
        Child::start(self, Place::Lab, None, creds, command)
    }

    /// Runs a program here, in the lab's cgroup, to its end.
    pub fn output(&self, command: Command) -> Result<Output> {
        self.output_as(Creds::Root, command)
    }

    /// Runs a program as somebody to its end.
    pub fn output_as(&self, creds: Creds, mut command: Command) -> Result<Output> {
        die_with_parent(&mut command);
        self.run_as(creds, || command.output())
            .with_context(|| format!("running {command:?} in {}", self.name()))
    }
}

impl Child {
    pub(crate) fn start(
        ns: &Ns,
        place: Place,
        pids: Option<Inside>,
        creds: Creds,
        mut command: Command,
    ) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let base = Path::new(&program)
            .file_name()
            .map_or(program.clone(), |base| base.to_string_lossy().into_owned());
        let name = format!("{base} in {}", ns.name());
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let file = |kind: &str| ns.scratch().join(format!("{serial}-{base}.{kind}"));
        let (stdout, stderr) = (file("out"), file("err"));
        let create = |path: &Path| {
            File::create(path).with_context(|| format!("creating {}", path.display()))
        };
        command
            .stdin(Stdio::null())
            .stdout(create(&stdout)?)
            .stderr(create(&stderr)?);
        die_with_parent(&mut command);

        let end = Arc::new(End::default());
        let (to_end, ns) = (Arc::clone(&end), ns.clone());
        let (tell, told) = mpsc::channel();
        // The parent-death signal comes when the *thread* that forked ends: it stays until the process has.
        let waiter = move || {
            let started = ns
                .enter(place)
                .and_then(|()| pids.map_or(Ok(()), |pids| pids.enter()))
                .and_then(|()| creds.apply().with_context(|| format!("becoming {creds}")))
                .and_then(|()| {
                    command
                        .spawn()
                        .with_context(|| format!("starting {command:?}"))
                });
            // The handle would keep the namespace alive.
            drop(ns);
            match started {
                Ok(child) => {
                    let pid = pid_of(&child);
                    // Nobody listens when the caller has panicked meanwhile: then the process is not wanted either.
                    if tell.send(Ok(pid)).is_err() {
                        let _ended = kill(pid, Signal::SIGKILL);
                    }
                    to_end.wait_for(child);
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        };
        std::thread::Builder::new()
            .name(format!("wait {base}"))
            .spawn(waiter)
            .context("starting a thread")?;
        let pid = told
            .recv()
            .context("the thread that starts a process died")??;
        Ok(Self {
            name,
            pid,
            stdout,
            stderr,
            end,
        })
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Sends a signal; one to a process that has ended is lost.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // While the lock is held and there is no status, the process has not been reaped: the number is still its own.
        let status = self
            .end
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if status.is_some() {
            return Ok(());
        }
        kill(self.pid, signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Asks it to end (SIGTERM).
    pub fn term(&self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait(KILL).map(drop)
    }

    /// How it ended, or `None` while it runs.
    pub fn status(&self) -> Option<ExitStatus> {
        *self
            .end
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its end.
    pub fn wait(&self, timeout: Duration) -> Result<ExitStatus> {
        let status = self
            .end
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (status, _) = self
            .end
            .changed
            .wait_timeout_while(status, timeout, |status| status.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        status.with_context(|| {
            format!(
                "{} has not ended within {timeout:?}\n{}",
                self.name,
                self.tail()
            )
        })
    }

    /// What it has printed.
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// What it has printed to stderr.
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// Waits until it has printed something to either. Fails at once when it ends without.
    pub fn wait_for_output(&self, text: &str, timeout: Duration) -> Result<()> {
        let started = Instant::now();
        loop {
            // Asked for before reading: what it printed at its very end counts.
            let ended = self.status();
            if self.stdout().contains(text) || self.stderr().contains(text) {
                return Ok(());
            }
            if let Some(status) = ended {
                bail!(
                    "{} ended ({status}) without printing {text:?}\n{}",
                    self.name,
                    self.tail()
                );
            }
            ensure!(
                started.elapsed() < timeout,
                "{} has not printed {text:?} within {timeout:?}\n{}",
                self.name,
                self.tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn tail(&self) -> String {
        let mut text = String::new();
        for (kind, output) in [("stdout", self.stdout()), ("stderr", self.stderr())] {
            let lines: Vec<&str> = output.lines().collect();
            for line in lines.iter().skip(lines.len().saturating_sub(TAIL)) {
                text.push_str(&format!("  {kind}: {line}\n"));
            }
        }
        text
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} (pid {}):\n{}", self.name, self.pid, self.tail());
        }
        if !keep()
            && let Err(error) = self.kill()
        {
            eprintln!("{error:?}");
        }
    }
}

impl End {
    fn wait_for(&self, mut child: std::process::Child) {
        // Wait without reaping first: reaping under the lock keeps `signal` from hitting a stranger with the same number.
        while waitid(
            Id::Pid(pid_of(&child)),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT,
        ) == Err(nix::errno::Errno::EINTR)
        {}
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        *status = child.wait().ok();
        self.changed.notify_all();
    }
}

/// Lets the kernel kill the program when the test process dies, however that happens.
fn die_with_parent(command: &mut Command) {
    if keep() {
        return;
    }
    let set = || nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from);
    // SAFETY: between fork and exec only one system call is made, nothing is allocated or locked.
    unsafe { command.pre_exec(set) };
}

fn pid_of(child: &std::process::Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

fn read(path: &Path) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}
