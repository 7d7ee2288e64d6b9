//! Ctrl-C and its like: turns signals into a flag that everything that waits looks at, so that the demonstration ends by
//! returning and its guards clean up.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{SigSet, Signal};

/// Zero until a signal came.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// How often a wait looks again.
const TICK: Duration = Duration::from_millis(5);

/// Blocks the signals in this thread and all it will start, and waits for them in one of its own.
pub(crate) fn install() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("blocking signals")?;
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            if CAUGHT.swap(signal as i32, Ordering::SeqCst) != 0 {
                // Asked twice: whatever cleaning up waits for, the next lab sweeps what is left now.
                std::process::exit(exit_code(signal).into());
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .context("starting a thread")?;
    Ok(())
}

/// The signal that came, if one did.
pub(crate) fn caught() -> Option<Signal> {
    Signal::try_from(CAUGHT.load(Ordering::SeqCst)).ok()
}

/// What a shell would report for it.
pub(crate) fn exit_code(signal: Signal) -> u8 {
    u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)
}

/// Fails once a signal came.
pub(crate) fn check() -> Result<()> {
    match caught() {
        Some(signal) => bail!("interrupted by {signal}"),
        None => Ok(()),
    }
}

/// Asks until there is an answer. Fails with what was seen last when it takes too long, and at once when a signal came.
pub(crate) fn wait_for<T>(
    timeout: Duration,
    mut ask: impl FnMut() -> Result<Result<T, String>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        check()?;
        match ask()? {
            Ok(answer) => return Ok(answer),
            Err(seen) if started.elapsed() > timeout => bail!("not within {timeout:?}: {seen}"),
            Err(_) => std::thread::sleep(TICK),
        }
    }
}

/// Lets time pass.
pub(crate) fn sleep(time: Duration) -> Result<()> {
    let started = Instant::now();
    while started.elapsed() < time {
        check()?;
        std::thread::sleep(TICK.min(time.saturating_sub(started.elapsed())));
    }
    Ok(())
}
