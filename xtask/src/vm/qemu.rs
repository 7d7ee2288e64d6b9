//! Runs a guest in QEMU: emulated, without network or disk, ended by force when it takes too long. It passes on what
//! the guest says and understands none of it.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::kernels::Kernel;
use crate::cmd::{command, run, show};

/// Kernel command line. A guest on a busy machine must not be taken for broken hardware (`no_timer_check`, no
/// watchdogs); any oops ends it at once (`oops=panic panic=-1`, with QEMU's `-no-reboot`); warnings are shown.
const COMMAND_LINE: &str = "console=ttyS0 loglevel=5 maxcpus=1 panic=-1 oops=panic no_timer_check nowatchdog \
                            rcupdate.rcu_cpu_stall_suppress=1 mitigations=off";

/// The console on the terminal, and nothing on the second port.
const INTERACTIVE: [&str; 4] = ["-serial", "mon:stdio", "-serial", "null"];

/// How a guest ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// By itself: switched off or panicked.
    Stopped,
    /// It took longer than it may.
    Killed,
}

/// The files of a run.
pub(super) struct Files<'a> {
    pub(super) initramfs: &'a Path,
    /// Gets what the guest's programs print.
    pub(super) log: &'a Path,
    /// Gets the kernel's messages and the programs' standard error.
    pub(super) console: &'a Path,
}

/// Boots a kernel and hands each line that arrives on the second serial port to `each`.
pub(super) fn watch(
    kernel: &Kernel,
    files: &Files<'_>,
    limit: Duration,
    mut each: impl FnMut(&str),
) -> Result<End> {
    let deadline = Instant::now() + limit;
    let mut log =
        File::create(files.log).with_context(|| format!("cannot write {}", files.log.display()))?;
    let console = format!("file:{}", files.console.display());
    let mut command = machine(kernel, files.initramfs);
    command.args(["-monitor", "none", "-serial", &console, "-serial", "stdio"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut qemu = Running(
        command
            .spawn()
            .with_context(|| format!("cannot run `{}`", show(&command)))?,
    );

    let output = qemu.0.stdout.take().context("QEMU has no output")?;
    let (send, lines) = mpsc::channel();
    let reader = thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n') {
            let Ok(line) = line else { break };
            if send.send(line).is_err() {
                break;
            }
        }
    });
    let end = loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line);
                let line = line.trim_end_matches('\r');
                writeln!(log, "{line}")
                    .with_context(|| format!("cannot write {}", files.log.display()))?;
                each(line);
            }
            Err(RecvTimeoutError::Timeout) => {
                qemu.0.kill().context("cannot end QEMU")?;
                break End::Killed;
            }
            Err(RecvTimeoutError::Disconnected) => break End::Stopped,
        }
    };
    // A QEMU that closed its output is on its way out.
    let status = qemu.0.wait().context("cannot wait for QEMU")?;
    if reader.join().is_err() {
        bail!("reading QEMU's output failed");
    }
    if end == End::Stopped && !status.success() {
        bail!("`{}` failed: {status}", show(&command));
    }
    Ok(end)
}

/// Boots a kernel with the terminal as its console.
pub(super) fn interactive(kernel: &Kernel, initramfs: &Path) -> Result<()> {
    let mut command = machine(kernel, initramfs);
    run(command.args(INTERACTIVE))
}

/// The command line of [`interactive`], for people.
pub(super) fn shown(kernel: &Kernel, initramfs: &Path) -> String {
    show(machine(kernel, initramfs).args(INTERACTIVE))
}

/// `-accel kvm` hangs on nested virtual machines, which test machines often are; emulation works everywhere, and a boot
/// takes seconds. What QEMU 7.2 emulates wrongly is kept away from the guest:
///
/// - `cmpxchg16b` leaves an operand in the flags register, and the kernel's allocator uses it all the time: one boot of
///   Linux 6.12 in three died of it. Without the feature bit (`-cx16`) the allocator takes a lock instead.
/// - With two processors in two threads, a breakpoint set while code is patched can outlive the patch (`Oops: int3`);
///   attaching programs patches code. With both in one thread a slice is 100 ms. So the guest has two and starts one
///   (`maxcpus=1`), which keeps per-CPU maps as wide as on other machines.
///
/// A processor model that is the same in all versions of QEMU, and has what TLS wants (AES, RDRAND).
fn machine(kernel: &Kernel, initramfs: &Path) -> Command {
    // QEMU must not outlive us, however we end.
    let mut command = command("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    command.args(["-accel", "tcg", "-cpu", "Westmere,+rdrand,-cx16"]);
    command.args(["-m", "1024", "-smp", "2"]);
    command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    command
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs);
    command.args(["-append", COMMAND_LINE]);
    command
}

/// A child that does not outlive its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // After a regular wait both do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
