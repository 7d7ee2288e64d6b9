//! The machine that is measured on, in a line that stands over every result.

/// Kernel, processors, and whether others are at work.
pub(crate) fn state(quick: bool) -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    let busy = load.parse::<f64>().is_ok_and(|load| load > 0.7);
    format!(
        "Linux {}, {cpus} processors, load {load} at the start{}{}",
        kernel.trim(),
        if busy {
            " (NOT QUIET: times are the machine's as well)"
        } else {
            ""
        },
        if quick { ", --quick" } else { "" },
    )
}
