//! Running a program under ptrace and killing it just before one of the system calls that could change something. Knows
//! nothing of the program.

use std::process::Command;

use anyhow::{Context as _, Result, bail};
use culvert_lab::Ns;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was killed when it was about to take the step of that number (counted from 1).
    Killed(usize),
    /// It ended by itself after this many steps, with this exit code.
    Ended {
        /// Steps it took.
        steps: usize,
        /// Its exit code.
        code: i32,
    },
}

/// A call that may change what others see: between two of these it makes no difference when a program is killed.
fn is_step(number: u64, first_argument: u64) -> bool {
    const BPF_READS: [u64; 9] = [1, 4, 7, 11, 12, 13, 14, 15, 30];
    match libc::c_long::try_from(number).unwrap_or(-1) {
        libc::SYS_bpf => !BPF_READS.contains(&first_argument),
        libc::SYS_write
        | libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_mkdir
        | libc::SYS_mkdirat
        | libc::SYS_rename
        | libc::SYS_renameat
        | libc::SYS_renameat2
        | libc::SYS_unlink
        | libc::SYS_unlinkat
        | libc::SYS_rmdir
        | libc::SYS_setns
        | libc::SYS_flock => true,
        _ => false,
    }
}

/// Runs `command` in a namespace and kills it (SIGKILL) before its `last`th step, see `is_step`. Only its first thread is
/// watched.
pub fn run_until(ns: &Ns, command: Command, last: usize) -> Result<End> {
    // ptrace belongs to the thread that traces, and `run` gives us one of our own.
    ns.run(move || trace(command, last))
}

fn trace(mut command: Command, last: usize) -> Result<End> {
    use std::os::unix::process::CommandExt as _;
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    #[expect(
        unsafe_code,
        reason = "PTRACE_TRACEME is asked for between fork and exec"
    )]
    // SAFETY: one system call, nothing is allocated or locked.
    unsafe {
        command.pre_exec(|| ptrace::traceme().map_err(std::io::Error::from))
    };
    let child = command
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    let pid = Pid::from_raw(child.id().cast_signed());
    // The first stop is the exec's.
    let WaitStatus::Stopped(_, Signal::SIGTRAP) = waitpid(pid, None)? else {
        bail!("{command:?} did not stop at its exec");
    };
    ptrace::setoptions(
        pid,
        Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL,
    )?;
    let mut steps = 0;
    let mut entering = true;
    let mut deliver = None;
    loop {
        ptrace::syscall(pid, deliver.take())?;
        match waitpid(pid, None)? {
            WaitStatus::PtraceSyscall(_) => {
                if entering && about_to_step(pid)? {
                    steps += 1;
                    if steps == last {
                        ptrace::kill(pid)?;
                        while !matches!(
                            waitpid(pid, None)?,
                            WaitStatus::Signaled(..) | WaitStatus::Exited(..)
                        ) {}
                        return Ok(End::Killed(last));
                    }
                }
                entering = !entering;
            }
            WaitStatus::Stopped(_, signal) => deliver = Some(signal),
            WaitStatus::Exited(_, code) => return Ok(End::Ended { steps, code }),
            WaitStatus::Signaled(_, signal, _) => bail!("{command:?} died of {signal}"),
            _ => {}
        }
    }
}

/// Whether the system call at whose entry the process stands is a step.
fn about_to_step(pid: Pid) -> Result<bool> {
    let info = ptrace::syscall_info(pid).context("asking which system call it is")?;
    anyhow::ensure!(
        info.op == libc::PTRACE_SYSCALL_INFO_ENTRY,
        "not at the entry of a system call"
    );
    #[expect(
        unsafe_code,
        reason = "which member of the union counts is told by `op`"
    )]
    // SAFETY: `op` says entry, so the kernel filled in this member.
    let entry = unsafe { info.u.entry };
    Ok(is_step(entry.nr, entry.args[0]))
}
