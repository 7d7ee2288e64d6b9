//! Step 2: client and web are enrolled under way, and all the same programs do the same again.

use std::time::Instant;

use anyhow::{Result, ensure};
use culvert_lab::Family;

use crate::kernel::Held;
use crate::programs;
use crate::report::Report;
use crate::stage::{MESH_NAME, Stage};
use crate::steps::Pages;
use crate::steps::before::Start;
use crate::wire::Wire;

pub(crate) fn play(report: &mut Report, stage: &mut Stage, start: &Start) -> Result<Held> {
    report.step("Enrolled: `culvert agent` runs, and a label appears on the pods' namespace")?;
    report.need("the agent and ztunnel start", || {
        let (agent, ztunnel) = (stage.start_agent()?, stage.start_ztunnel()?);
        Ok((
            (),
            format!("processes {agent} and {ztunnel}; no pod is enrolled yet"),
        ))
    })?;
    let stage = &*stage;
    report.need("istio.io/dataplane-mode=ambient", || {
        Ok(((), enrol(stage)?))
    })?;
    let held = Held::by(&stage.lab)?;

    let wire = Wire::of(stage, &stage.client)?;
    let pages = Pages::new("meshed");
    let out = stage.count(&stage.client, "hbone_out")?;
    let taken = stage.count(&stage.web, "hbone_in")?;
    report.need("client asks web with curl", || {
        Ok(((), pages.fetch(stage, &stage.client)?))
    })?;
    report.line("on client's wire", || {
        let (connections, bytes) = wire.only_tls(&start.steady, &pages.uris())?;
        Ok(format!(
            "TLS on port 15008 and nothing else: {connections} connections, {bytes} bytes"
        ))
    })?;
    drop(wire);
    report.line("ztunnel was in the path", || {
        stage.counted(&stage.client, "hbone_out", out, 2)?;
        stage.counted(&stage.web, "hbone_in", taken, 2)?;
        Ok("it carried 2 out of client and 2 into web".to_owned())
    })?;
    report.line("nginx logs the client", || {
        pages.logged_as(stage, &stage.client)
    })?;

    let pages = Pages::new("legacy");
    let taken = stage.count(&stage.web, "inbound_accepts")?;
    report.line("legacy, not in the mesh, asks web", || {
        pages.fetch(stage, &stage.legacy)?;
        stage.counted(&stage.web, "inbound_accepts", taken, 2)?;
        let seen = pages.logged_as(stage, &stage.legacy)?;
        Ok(format!("nginx logs {seen}; through ztunnel: 2"))
    })?;
    let pages = Pages::new("probe-meshed");
    let taken = stage.count(&stage.web, "inbound_accepts")?;
    report.line("a probe from the node", || {
        pages.fetch(stage, stage.lab.node())?;
        let seen = pages.logged_as(stage, stage.lab.node())?;
        stage.counted(&stage.web, "inbound_accepts", taken, 0)?;
        Ok(format!("nginx logs {seen}; through ztunnel: 0"))
    })?;
    // Nobody resolves names on the node: whatever answers is ztunnel.
    let resolver = stage.lab.node().ip(Family::V4)?;
    report.line("client looks web.mesh up with dig", || {
        for tcp in [false, true] {
            let said = programs::dig(&stage.client, resolver, MESH_NAME, tcp)?;
            ensure!(said == stage.web.v4()?.to_string(), "dig says {said:?}");
        }
        Ok(format!(
            "UDP and TCP: ztunnel answers in the name of {resolver}"
        ))
    })?;
    report.line("legacy asks the same", || {
        let said = programs::dig(&stage.legacy, resolver, MESH_NAME, false)?;
        ensure!(said.is_empty(), "dig says {said:?}");
        Ok(format!("no answer: nobody resolves names at {resolver}"))
    })?;
    report.line("the connections from before", || {
        start.steady.alive(&stage.log)
    })?;
    let carried = stage.count(&stage.client, "hbone_out")?;
    report.line("iperf3 from client to web, 1 s", || {
        let rate = programs::iperf3(&stage.client, &stage.web, Family::V4)? / 1e9;
        // One connection for control, one for data.
        stage.counted(&stage.client, "hbone_out", carried, 2)?;
        Ok(format!(
            "{rate:.1} Gbit/s; ztunnel carried both its connections"
        ))
    })?;
    Ok(held)
}

/// Labels the namespace, and waits until what follows from it has happened. Legacy's own label keeps it out.
fn enrol(stage: &Stage) -> Result<String> {
    let started = Instant::now();
    stage.label(Some("ambient"))?;
    for pod in stage.members() {
        stage.wait_until_enrolled(pod)?;
    }
    let took = started.elapsed().as_millis();
    let legacy = stage.agent()?.state(&stage.legacy)?;
    ensure!(legacy == "none", "legacy is {legacy} as well");
    Ok(format!(
        "client and web are enrolled {took} ms later, and ztunnel listens in both"
    ))
}
