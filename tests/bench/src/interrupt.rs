//! Ctrl-C as an answer to ask for: what was made is then removed by whoever made it, on the way out.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{SigSet, Signal};

static ASKED: AtomicBool = AtomicBool::new(false);

/// What a shell shows for a program ended by SIGINT.
pub(crate) const EXIT: u8 = 130;

/// Takes SIGINT and SIGTERM from now on. To be called before there is a second thread: others inherit the mask.
pub(crate) fn listen() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("blocking signals")?;
    let wait = move || {
        while signals.wait().is_ok() {
            if ASKED.swap(true, Ordering::Relaxed) {
                eprintln!("interrupted again: the next lab sweeps what is left");
                std::process::exit(i32::from(EXIT));
            }
            eprintln!("interrupted: cleaning up; once more ends it at once");
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .context("starting a thread")?;
    Ok(())
}

/// Whether somebody asked to stop.
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Fails once somebody asked to stop.
pub(crate) fn check() -> Result<()> {
    ensure!(!asked(), "interrupted");
    Ok(())
}
