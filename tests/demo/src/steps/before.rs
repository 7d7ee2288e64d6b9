//! Step 1: the pods as any network plug-in leaves them. What is seen here is what must be seen again at the end.

use anyhow::Result;

use crate::report::Report;
use crate::stage::{Picture, Stage};
use crate::steady::Steady;
use crate::steps::Pages;
use crate::wire::Wire;

/// What later steps compare with.
#[derive(Debug)]
pub(crate) struct Start {
    /// Opened before enrolment, to live until the end.
    pub(crate) steady: Steady,
    pub(crate) picture: Picture,
}

pub(crate) fn play(report: &mut Report, stage: &Stage) -> Result<Start> {
    report.step("Before: nothing of ours is loaded")?;
    let wire = Wire::of(stage, &stage.client)?;
    let pages = Pages::new("before");
    report.need("client asks web with curl", || {
        Ok(((), pages.fetch(stage, &stage.client)?))
    })?;
    report.line("on client's wire", || pages.plaintext(stage, &wire))?;
    report.line("nginx logs the client", || {
        pages.logged_as(stage, &stage.client)
    })?;
    let probe = Pages::new("probe-before");
    report.line("a probe from the node", || {
        probe.fetch(stage, stage.lab.node())?;
        Ok(format!(
            "nginx logs {}",
            probe.logged_as(stage, stage.lab.node())?
        ))
    })?;
    let picture = stage.picture()?;
    let steady = report.need("two curls that keep their connections", || {
        let steady = Steady::open(stage, &stage.client, "kept")?;
        let proof = steady.alive(&stage.log)?;
        Ok((steady, proof))
    })?;
    Ok(Start { steady, picture })
}
