//! A thread that stays in one namespace and in the lab's cgroup and does what it is asked, so that entering is never part
//! of what is timed.

use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert_lab::Ns;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, gettid};

type Job = Box<dyn FnOnce() + Send>;

/// One such thread. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    jobs: mpsc::Sender<Job>,
    thread: Thread,
}

impl Worker {
    pub(crate) fn start(ns: &Ns) -> Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let thread = Thread::spawn(ns, move || {
            for job in inbox {
                job();
            }
        })?;
        Ok(Self { jobs, thread })
    }

    /// Has something done there and waits for it.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let (answer, outcome) = mpsc::channel();
        let job: Job = Box::new(move || {
            // Nobody is left to hear it when the caller is gone.
            let _gone = answer.send(work());
        });
        self.jobs.send(job).ok().context("a worker has ended")?;
        outcome.recv().context("a worker has panicked")
    }

    pub(crate) fn thread(&self) -> Thread {
        self.thread
    }
}

/// A thread of this process: where it runs and what it has used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Thread(Pid);

impl Thread {
    /// Starts one in the namespace and in the lab's cgroup; both are inherited from the thread that starts it.
    pub(crate) fn spawn(ns: &Ns, work: impl FnOnce() + Send + 'static) -> Result<Self> {
        let (tid, started) = mpsc::channel();
        ns.run(|| {
            std::thread::Builder::new()
                // What `perf report --sort comm` tells the ways by.
                .name(ns.name().to_owned())
                .spawn(move || {
                    // The receiver waits just below.
                    let _gone = tid.send(gettid());
                    work();
                })
        })
        .context("starting a thread")?;
        Ok(Self(started.recv().context("a thread ended at once")?))
    }

    /// Keeps it on one processor.
    pub(crate) fn pin(self, cpu: usize) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(cpu)
            .and_then(|()| sched_setaffinity(self.0, &set))
            .with_context(|| format!("keeping a thread on processor {cpu}"))
    }

    /// Processor time it has used.
    pub(crate) fn cpu(self) -> Result<Duration> {
        // The kernel's number for the clock of one thread: its id's complement, "per thread", "scheduler's".
        let clock = ClockId::from_raw((!self.0.as_raw() << 3) | 4 | 2);
        clock_gettime(clock)
            .map(Duration::from)
            .context("reading a thread's clock")
    }
}

/// Processors this process may run on.
pub(crate) fn cpus() -> Result<Vec<usize>> {
    let set = nix::sched::sched_getaffinity(Pid::from_raw(0)).context("asking for processors")?;
    Ok((0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect())
}
