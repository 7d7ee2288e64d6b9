//! `cargo xtask test vm`: Culvert on kernels other than this machine's, in emulated guests with nothing in them but
//! static binaries. This file says what is expected of each kernel and reports; the parts do the work.

mod binaries;
mod cpio;
mod initramfs;
mod kernels;
mod mirror;
mod modules;
mod qemu;
mod transcript;

use std::{
    fs, panic,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

use self::{
    binaries::Binaries,
    initramfs::{Step, Work, quote},
    kernels::{Kernel, Role, SERIES, Series},
    qemu::{End, Files},
    transcript::{Transcript, kernel_complaints},
};
use crate::project::Project;

/// Emulation on a busy machine is some thirty times slower than the machine; a guest that is still running after this
/// hangs.
const TIME_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Cases that must have run: a test that was renamed or dropped must not turn into a pass.
const REQUIRED: [&str; 8] = [
    "load",
    "outbound",
    "inbound",
    "self_call",
    "closed_port",
    "device_bound",
    "detach",
    "dns_is_answered",
];

/// Of the tests of lookups, those that hang on how the kernel treats datagrams: what names its own source or interface,
/// many in one call, what passes for an answer, sockets that connect again or are bound to a device. They need no program
/// but ours.
const LOOKUPS: [&str; 7] = [
    "forged::",
    "interface::",
    "many::",
    "several::messages_that_name_their_source",
    "sockets::a_socket_that_connects_again",
    "sockets::bound_to_a_device",
    "switching::sockets_that_were_redirected",
];

/// What 5.10 lacks. The refusal has to name one.
const MISSING_ON_5_10: [&str; 3] = ["netns cookie", "netns_cookie", "ingress_ifindex"];

/// Options of `test vm`.
#[derive(clap::Parser)]
#[command(name = "cargo xtask test vm", no_binary_name = true)]
struct Args {
    /// Only this kernel series; may be given more than once [possible values: 6.1, 6.12, 5.10]
    #[arg(long = "kernel", value_name = "SERIES", value_parser = series, hide_possible_values = true)]
    kernels: Vec<&'static Series>,
    /// Keep the initramfs and print the command that boots it
    #[arg(long)]
    keep: bool,
    /// Boot into a shell instead of running tests; leave it with `exit`
    #[arg(long)]
    shell: bool,
    /// Run only tests with one of these words in their name
    filters: Vec<String>,
}

fn series(name: &str) -> Result<&'static Series, String> {
    let known = || {
        SERIES
            .iter()
            .map(|series| series.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    SERIES
        .iter()
        .find(|series| series.name == name)
        .ok_or_else(|| format!("the kernels that are tried are {}", known()))
}

/// Runs the verb with the arguments after `test vm`.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => error.exit(),
    };
    let project = Project::find();
    let binaries = binaries::ensure(&project)?;
    let chosen = if args.kernels.is_empty() {
        SERIES.iter().collect()
    } else {
        args.kernels.clone()
    };
    let guests = chosen
        .into_iter()
        .map(|series| Guest::prepare(&project, &binaries, series, &args))
        .collect::<Result<Vec<_>>>()?;
    if args.shell {
        for guest in &guests {
            qemu::interactive(&guest.kernel, &guest.initramfs)?;
        }
        return Ok(());
    }
    let mut failed = Vec::new();
    // Each keeps one processor busy.
    let at_once = thread::available_parallelism().map_or(1, usize::from);
    for some in guests.chunks(at_once) {
        let judged: Vec<Result<Vec<String>>> = thread::scope(|scope| {
            let running: Vec<_> = some
                .iter()
                .map(|guest| scope.spawn(|| guest.judge(&args)))
                .collect();
            let ended = running.into_iter().map(thread::ScopedJoinHandle::join);
            ended
                .map(|end| end.unwrap_or_else(|panic| panic::resume_unwind(panic)))
                .collect()
        });
        for (guest, complaints) in some.iter().zip(judged) {
            let complaints = complaints?;
            if !complaints.is_empty() {
                guest.show_failure(&complaints);
                failed.push(guest.series.name);
            }
        }
    }
    if !failed.is_empty() {
        bail!("failed on Linux {}", failed.join(" and "));
    }
    Ok(())
}

/// A kernel with something to boot into.
struct Guest {
    series: &'static Series,
    kernel: Kernel,
    initramfs: PathBuf,
    log: PathBuf,
    console: PathBuf,
    keep: bool,
}

impl Guest {
    fn prepare(
        project: &Project,
        binaries: &Binaries,
        series: &'static Series,
        args: &Args,
    ) -> Result<Self> {
        let kernel = kernels::ensure(project, series)?;
        let dir = project.target.join("vm");
        let file = |suffix: &str| dir.join(format!("{}{suffix}", series.name));
        let unpacked = file(".modules");
        fs::create_dir_all(&unpacked)
            .with_context(|| format!("cannot create {}", unpacked.display()))?;
        let modules = modules::load_order(
            &kernel.modules,
            &modules::WANTED,
            &binaries.busybox,
            &unpacked,
        )?;
        fs::remove_dir_all(&unpacked)
            .with_context(|| format!("cannot remove {}", unpacked.display()))?;

        let work = if args.shell {
            Work::Shell
        } else {
            Work::Steps(steps(series.role, &args.filters))
        };
        let guest = Self {
            series,
            kernel,
            initramfs: file(".initramfs"),
            log: file(".log"),
            console: file(".console.log"),
            keep: args.keep,
        };
        initramfs::write(&guest.initramfs, binaries, &modules, &work)?;
        Ok(guest)
    }

    /// Boots, and says what is wrong with what happened.
    fn judge(&self, args: &Args) -> Result<Vec<String>> {
        let name = self.series.name;
        println!("{name}: booting Linux {}", self.kernel.release);
        let start = Instant::now();
        let mut transcript = Transcript::default();
        let files = Files {
            initramfs: &self.initramfs,
            log: &self.log,
            console: &self.console,
        };
        let end = qemu::watch(&self.kernel, &files, TIME_LIMIT, |line| {
            let was_up = transcript.is_up();
            if transcript.hear(line) {
                println!("{name}: {line}");
            } else if transcript.is_up() && !was_up {
                println!("{name}: booted in {:.1} s", start.elapsed().as_secs_f32());
            }
        })?;

        let mut complaints = transcript.gaps();
        if end == End::Killed {
            complaints.push(format!(
                "it was still running after {} s",
                TIME_LIMIT.as_secs()
            ));
        }
        let console = fs::read(&self.console)
            .with_context(|| format!("cannot read {}", self.console.display()))?;
        let console = String::from_utf8_lossy(&console);
        complaints.extend(kernel_complaints(&console).into_iter().map(str::to_owned));
        complaints.extend(expectations(
            self.series.role,
            &transcript,
            args.filters.is_empty(),
        ));
        Ok(complaints)
    }

    fn show_failure(&self, complaints: &[String]) {
        println!("--- the end of {}", self.console.display());
        println!("{}", tail(&self.console, 60));
        println!("--- Linux {}: FAILED", self.kernel.release);
        for complaint in complaints {
            println!("    {complaint}");
        }
        println!(
            "    all it said: {} and {}; to look inside: cargo xtask test vm --kernel {} --shell",
            self.log.display(),
            self.console.display(),
            self.series.name
        );
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.keep {
            println!(
                "kept: {}; boot it with\n    {}",
                self.initramfs.display(),
                qemu::shown(&self.kernel, &self.initramfs)
            );
        } else if let Err(error) = fs::remove_file(&self.initramfs) {
            eprintln!("cannot remove {}: {error}", self.initramfs.display());
        }
    }
}

/// What a guest is to run.
fn steps(role: Role, filters: &[String]) -> Vec<Step> {
    let step = |name, command: &str| Step {
        name,
        command: command.to_owned(),
    };
    let clean = || {
        step(
            "clean",
            "left=$(find /sys/fs/bpf -mindepth 1) && echo \"$left\" && test -z \"$left\"",
        )
    };
    match role {
        Role::Works => {
            let quoted = |words: &[&str]| -> String {
                words
                    .iter()
                    .map(|word| format!(" {}", quote(word)))
                    .collect()
            };
            let asked: Vec<&str> = filters.iter().map(String::as_str).collect();
            // Others of theirs need programs that a guest does not have.
            let lookups = match asked.is_empty() {
                true => quoted(&LOOKUPS),
                false => quoted(&asked) + " --skip clients:: --skip governed:: --skip place::",
            };
            // First with every default, as on a machine: the tests have a cgroup and a pin directory each.
            vec![
                step("preflight", "exec culvert preflight 2>&1"),
                step("load", "exec culvert load 2>&1"),
                step("unload", "exec culvert unload 2>&1"),
                clean(),
                step(
                    "tests",
                    &format!("exec /bin/vm-tests --test-threads=2{}", quoted(&asked)),
                ),
                step(
                    "lookups",
                    &format!("exec /bin/lookup-tests --test-threads=2{lookups}"),
                ),
            ]
        }
        Role::Refused => vec![
            step("preflight", "exec culvert preflight 2>&1"),
            step("load", "exec culvert load 2>&1"),
            clean(),
        ],
    }
}

/// What is wrong with what a guest ran.
fn expectations(role: Role, heard: &Transcript, unfiltered: bool) -> Vec<String> {
    match role {
        Role::Works => [
            heard.success_complaints("preflight", "culvert preflight failed"),
            heard.success_complaints("load", "culvert load failed"),
            heard.success_complaints("unload", "culvert unload failed"),
            heard.success_complaints("clean", "unload left something in bpffs"),
            ran(heard, unfiltered),
        ]
        .concat(),
        Role::Refused => [
            heard.refusal_complaints("preflight", &MISSING_ON_5_10),
            heard.refusal_complaints("load", &MISSING_ON_5_10),
            heard.success_complaints("clean", "the refused load left something in bpffs"),
        ]
        .concat(),
    }
}

/// What is wrong with the tests; a filter may leave one of the two binaries without any.
fn ran(heard: &Transcript, unfiltered: bool) -> Vec<String> {
    if unfiltered {
        let tests = heard.test_complaints("tests", &REQUIRED);
        return [tests, heard.test_complaints("lookups", &LOOKUPS)].concat();
    }
    let mut all = [
        heard.test_complaints("tests", &[]),
        heard.test_complaints("lookups", &[]),
    ];
    if all.iter().any(Vec::is_empty) {
        for complaints in &mut all {
            complaints.retain(|complaint| complaint != transcript::NO_TEST);
        }
    }
    all.concat()
}

fn tail(file: &Path, lines: usize) -> String {
    let content = fs::read(file).unwrap_or_default();
    let content = String::from_utf8_lossy(&content);
    let all: Vec<_> = content.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
