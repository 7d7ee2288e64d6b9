//! A ztunnel that is about to run out of file descriptors is said to be, before pods get stuck.

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{eventually, governed::Governed};

/// Sets how many files a process may have open: as many as are asked for, or as it can be given.
#[expect(
    unsafe_code,
    reason = "prlimit(2) of another process has no safe wrapper here"
)]
fn limit(pid: u32, files: u64) -> Result<()> {
    let pid = pid.cast_signed();
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the limit is our own variable, which the call only writes.
    let code = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
    ensure!(code == 0, "prlimit: {}", std::io::Error::last_os_error());
    // Who may not raise the upper limit leaves it alone.
    limit.rlim_cur = files.min(limit.rlim_max);
    // SAFETY: the limit is our own variable, which the call only reads.
    let code = unsafe {
        libc::prlimit(
            pid,
            libc::RLIMIT_NOFILE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    ensure!(code == 0, "prlimit: {}", std::io::Error::last_os_error());
    Ok(())
}

#[test]
fn a_ztunnel_near_its_limit_of_open_files_is_said_to_be() -> Result<()> {
    let (node, [_pod]) = Governed::meshed("headroom", ["a"])?;
    let pid = node.ztunnel()?.pid();
    let said = || -> Result<String> {
        let status = node.agent()?.status()?;
        let tasks = status["readiness"]["tasks"].as_array().cloned();
        let tasks = tasks.unwrap_or_default();
        let task = tasks.iter().find(|t| t["name"] == "ztunnel-files");
        let task = task.context("no such task")?;
        ensure!(
            task["ready"] == true,
            "pods are served all the same: {task}"
        );
        Ok(task["reason"].as_str().unwrap_or_default().to_owned())
    };
    limit(pid, 65536)?;
    eventually("nothing is said", || Ok(said()?.is_empty()))?;
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    limit(pid, u64::try_from(open)? + 1)?;
    eventually("it is said", || {
        Ok(said()?.contains(&format!("process {pid}, has ")))
    })?;
    ensure!(said()?.contains("LimitNOFILE"), "{}", said()?);
    let known = node.metric("culvert_ztunnel_open_files_limit")?;
    #[expect(clippy::cast_precision_loss, reason = "some dozens")]
    let expected = (open + 1) as f64;
    ensure!(known == expected, "{known}");
    let log = node.agent()?.process().stderr();
    ensure!(log.contains("CulvertZtunnelFiles"), "{log}");
    limit(pid, 65536)?;
    eventually("nothing is said any more", || Ok(said()?.is_empty()))
}
