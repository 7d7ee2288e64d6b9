//! `culvert agent`: settings, log, runtime; the daemon itself is [`culvert::daemon`].

use std::process::ExitCode;

use anyhow::Context as _;
use culvert::{
    admin::logging,
    config::{AgentArgs, Config, Environment, settings},
    daemon,
    kernel::{limits, memory, privileges},
};

use super::{
    Global,
    output::{columns, print},
};

/// Worker threads: the work is waiting, and each thread costs memory.
const WORKERS: usize = 2;
/// Threads for calls into the kernel, beside the pods worked on at once.
const SPARE_BLOCKING: usize = 4;

pub(super) fn run(global: &Global, args: &AgentArgs) -> anyhow::Result<ExitCode> {
    start(global, args).inspect_err(daemon::failed::tell)
}

fn start(global: &Global, args: &AgentArgs) -> anyhow::Result<ExitCode> {
    let loaded = Config::load(args, &Environment::of_process())?;
    if args.print_config {
        let all = settings(&loaded);
        print(
            global.output,
            &serde_json::json!({ "settings": all }),
            |_| {
                let mut rows = vec![["KEY", "VALUE", "FROM"].map(str::to_owned).to_vec()];
                rows.extend(
                    all.iter()
                        .map(|s| vec![s.key.to_owned(), s.value.clone(), s.from.to_string()]),
                );
                columns(&rows)
            },
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    let log = logging::start(&loaded.config.log_level, loaded.config.log_format)?;
    // Whoever started us may have blocked the signals that end us, and threads inherit that.
    nix::sys::signal::SigSet::empty()
        .thread_set_mask()
        .context("unblocking signals")?;
    match limits::raise_open_files() {
        Ok(files) => tracing::debug!(files, "files that may be open"),
        // With few pods it is enough as it is; with many the error that follows says it again.
        Err(error) => tracing::warn!(%error, "keeping the limit of open files"),
    }
    memory::share_one_heap();
    // Before there is a second thread: capabilities are each thread's own.
    privileges::drop_others()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(loaded.config.enrolment_concurrency.get() + SPARE_BLOCKING)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let ended = runtime.block_on(daemon::run(loaded, log));
    // What still blocks in the kernel is finished by the next agent.
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}
