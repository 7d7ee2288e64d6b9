//! `culvert load` and `unload`.

use std::process::ExitCode;

use culvert::kernel::{LoadOptions, Node, node};
use serde_json::json;

use super::{
    Global,
    output::{columns, print, row},
};

pub(crate) fn load(global: &Global) -> anyhow::Result<ExitCode> {
    let options = LoadOptions {
        at_home: true,
        ..global.load_options()
    };
    let (_, report) = Node::load(&options)?;
    print(global.output, &report, |report| {
        let mut rows = vec![row![
            "PROGRAM",
            "KIND",
            "ACTION",
            "BYTES",
            "VERIFIED INSNS",
            "LOAD TIME",
            "TAG"
        ]];
        for p in &report.programs {
            let action = serde_json::to_value(p.action)
                .ok()
                .and_then(|v| v.as_str().map(str::to_owned));
            rows.push(row![
                p.name,
                p.kind,
                action.unwrap_or_default(),
                p.bytes_xlated,
                p.verified_instructions,
                p.load_time_us
                    .map_or("-".to_owned(), |t| format!("{:.1} ms", t as f64 / 1000.0)),
                p.tag,
            ]);
        }
        let mut dns = String::new();
        if let Some(at) = &report.dns {
            dns = format!(
                "DNS programs attached to {} ({:?})\n",
                at.cgroup.display(),
                at.found
            );
            for other in &at.ahead {
                dns.push_str(&format!("  {other} runs before them\n"));
            }
        }
        if let Some(problem) = &report.dns_problem {
            dns.push_str(&format!("lookups CANNOT BE CAPTURED: {problem}\n"));
        }
        format!(
            "{}\npinned at {}, attached to {}, ABI version {}{}\n{dns}",
            columns(&rows),
            report.bpffs.display(),
            report.cgroup_root.display(),
            report.abi_version,
            if report.adopted { ", maps adopted" } else { "" },
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn unload(global: &Global, force: bool) -> anyhow::Result<ExitCode> {
    if !force && let Some(node) = Node::open(&global.bpffs)? {
        culvert::kernel::pod::collect(&node)?;
    }
    let removed = node::unload(&global.bpffs, force)?;
    print(global.output, &json!({ "removed": removed }), |_| {
        if removed {
            "removed"
        } else {
            "nothing was loaded"
        }
        .to_owned()
    })?;
    Ok(ExitCode::SUCCESS)
}
