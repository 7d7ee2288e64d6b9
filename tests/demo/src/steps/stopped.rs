//! Step 3: ztunnel dies. Whatever the pods want to send waits; nothing leaves in plaintext.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::interrupt;
use crate::report::Report;
use crate::stage::Stage;
use crate::steps::Pages;
use crate::steps::before::Start;
use crate::wire::Wire;

/// How long ztunnel is away at least: time for a SYN to be sent, and sent again.
const AWAY: Duration = Duration::from_millis(1300);

pub(crate) fn play(report: &mut Report, stage: &mut Stage, start: &Start) -> Result<()> {
    report.step("ztunnel is killed, and replaced")?;
    let dead = stage.kill_ztunnel()?;
    let wire = Wire::of(stage, &stage.client)?;
    let pages = Pages::new("waiting");
    let waiting = report.need("client asks web with curl", || {
        let waiting = pages.start(stage, &stage.client)?;
        interrupt::sleep(AWAY)?;
        for curl in &waiting {
            ensure!(curl.waits(), "curl does not wait: {}", curl.printed());
        }
        Ok((
            waiting,
            format!(
                "both wait; ztunnel (process {dead}) died {:.1} s ago",
                AWAY.as_secs_f64()
            ),
        ))
    })?;
    report.line("on client's wire", || {
        wire.silent(&start.steady, &pages.uris())?;
        Ok("no SYN, no byte".to_owned())
    })?;
    report.line("the connections from before", || {
        start.steady.alive(&stage.log)
    })?;
    report.need("another ztunnel starts", || {
        let pid = stage.start_ztunnel()?;
        for pod in stage.members() {
            stage.wait_until_enrolled(pod)?;
        }
        Ok(((), format!("process {pid}; it listens in both pods")))
    })?;
    report.line("the waiting curls", || {
        let mut took = Vec::new();
        for curl in waiting {
            took.push(format!("{:.1} s", curl.finish()?.as_secs_f64()));
        }
        Ok(format!("HTTP 200 after {}", took.join(" and ")))
    })?;
    report.line("on client's wire", || {
        let (connections, bytes) = wire.only_tls(&start.steady, &pages.uris())?;
        Ok(format!(
            "TLS on port 15008 and nothing else: {connections} connections, {bytes} bytes"
        ))
    })?;
    report.line("nginx logs the client", || {
        pages.logged_as(stage, &stage.client)
    })
}
