//! Step 4: client and web leave the mesh, and the node is as it was.

use anyhow::{Context as _, Result, ensure};

use crate::kernel::Held;
use crate::report::Report;
use crate::stage::{Stage, differences};
use crate::steady::Steady;
use crate::steps::Pages;
use crate::steps::before::Start;
use crate::wire::Wire;

pub(crate) fn play(
    report: &mut Report,
    stage: &mut Stage,
    start: &Start,
    held: &Held,
) -> Result<()> {
    report.step("Un-enrolled: the label goes, then the agent, then `culvert unload`")?;
    let carried = stage.count(&stage.client, "hbone_out")?;
    let meshed = report.need("two more curls, through ztunnel", || {
        let meshed = Steady::open(stage, &stage.client, "carried")?;
        stage.counted(&stage.client, "hbone_out", carried, 2)?;
        let proof = meshed.alive(&stage.log)?;
        Ok((meshed, proof))
    })?;
    let held = held.clone().and(Held::by(&stage.lab)?);
    report.need("client and web are let go", || {
        stage.label(None)?;
        for pod in stage.members() {
            stage.wait_for_state(pod, "draining")?;
        }
        Ok((
            (),
            "both are draining: new connections go direct".to_owned(),
        ))
    })?;
    report.line("the connections through ztunnel", || {
        meshed.alive(&stage.log)
    })?;

    let wire = Wire::of(stage, &stage.client)?;
    let pages = Pages::new("after");
    report.need("client asks web with curl", || {
        Ok(((), pages.fetch(stage, &stage.client)?))
    })?;
    report.line("on client's wire", || pages.plaintext(stage, &wire))?;
    report.line("nginx logs the client", || {
        pages.logged_as(stage, &stage.client)
    })?;
    drop(wire);

    meshed.close()?;
    report.need("once those through ztunnel end", || {
        for pod in stage.members() {
            stage.wait_for_state(pod, "none")?;
        }
        let list = stage.lab.culvert(&["-o", "json", "netns", "list"])?;
        let list = list.ok()?.json()?;
        ensure!(
            list["pods"].as_array().is_some_and(Vec::is_empty),
            "culvert still lists {list}"
        );
        Ok((
            (),
            "both pods are let go, by the kernel and by ztunnel".to_owned(),
        ))
    })?;
    report.line("the pods' network namespaces", || {
        let found = differences(&start.picture, &stage.picture()?);
        ensure!(found.is_empty(), "{}", found.join("\n"));
        Ok("addresses, rules, routes, sysctls: as before enrolment".to_owned())
    })?;
    report.need("unloaded", || {
        stage.stop_agent()?;
        stage
            .lab
            .culvert(&["unload"])?
            .ok()
            .context("culvert unload")?;
        held.gone(&stage.lab)?;
        Ok((
            (),
            format!("gone from the kernel: {}, every pin", held.counts()),
        ))
    })?;
    stage.kill_ztunnel()?;
    report.line("the connections from the beginning", || {
        start.steady.alive(&stage.log)
    })
}
