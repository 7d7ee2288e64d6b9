//! The capabilities the agent needs, each with its reason, and letting go of all others.
//!
//! The table is the one place: preflight, error texts, documents and the chart follow it. A capability is listed only if
//! something fails without it; tests/e2e/tests/privileges.rs takes each away in turn.

use std::{borrow::Cow, fs, io};

use caps::{CapSet, Capability, CapsHashSet};
use serde::Serialize;

use super::error::{Error, Result};

/// A capability and what it is for.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Need {
    /// As capabilities(7) names it.
    pub name: &'static str,
    /// What fails without it.
    pub why: &'static str,
    #[serde(skip)]
    capability: Capability,
}

impl Need {
    /// Its number.
    #[must_use]
    pub fn bit(&self) -> u8 {
        self.capability.index()
    }
}

/// Everything the agent needs. CAP_BPF and CAP_PERFMON are not here: CAP_SYS_ADMIN, without which no namespace can be
/// entered, includes both.
pub const NEEDED: &[Need] = &[
    Need {
        name: "CAP_SYS_ADMIN",
        why: "entering pods' network namespaces; loading programs and creating maps",
        capability: Capability::CAP_SYS_ADMIN,
    },
    Need {
        name: "CAP_NET_ADMIN",
        why: "rules, routes and sysctls in pods; attaching programs to namespaces and cgroups",
        capability: Capability::CAP_NET_ADMIN,
    },
    Need {
        name: "CAP_SYS_PTRACE",
        why: "opening the namespaces and finding the executables of other users' processes, copying ztunnel's and applications' listeners",
        capability: Capability::CAP_SYS_PTRACE,
    },
    Need {
        name: "CAP_NET_RAW",
        why: "freeing an application's listener of the device it is bound to, so that ztunnel can deliver to it",
        capability: Capability::CAP_NET_RAW,
    },
];

/// What this thread may do now, one bit a capability.
fn effective() -> Result<u64> {
    let set = caps::read(None, CapSet::Effective).map_err(|e| failed("read", &e))?;
    Ok(set.iter().fold(0, |bits, c| bits | c.bitmask()))
}

/// Which of [`NEEDED`] this thread lacks.
pub fn missing() -> Result<Vec<&'static Need>> {
    let have = effective()?;
    Ok(NEEDED
        .iter()
        .filter(|need| have & need.capability.bitmask() == 0)
        .collect())
}

/// What cures a refusal of the kernel's, as this thread stands now.
pub(super) fn cure() -> Cow<'static, str> {
    let missing = missing().unwrap_or_default();
    if missing.is_empty() {
        // A mount that is read-only for us, a seccomp profile, SELinux, AppArmor, a user namespace.
        return "all capabilities it takes are there: look for a security profile of the container or the node that forbids \
                it; `culvert preflight` shows what else is needed"
            .into();
    }
    let names: Vec<&str> = missing.iter().map(|need| need.name).collect();
    format!("run as root, or add {}", names.join(", ")).into()
}

/// Keeps [`NEEDED`] and nothing else, for ever: no other capability can be had again, by whatever is executed.
///
/// Capabilities belong to threads, so this has to come before the process has a second one.
pub fn drop_others() -> Result<()> {
    let threads = fs::read_dir("/proc/self/task")
        .map_err(|e| Error::system("count threads in", "/proc/self/task", e))?
        .count();
    if threads != 1 {
        return Err(Error::wrong(
            "drop capabilities of",
            "this process",
            format!("it has {threads} threads, and capabilities are each thread's own"),
            "drop them before threads are started",
        ));
    }
    drop_others_of_thread()
}

/// The same for the calling thread alone, and those it starts.
pub fn drop_others_of_thread() -> Result<()> {
    let missing = missing()?;
    if !missing.is_empty() {
        let named: Vec<String> = missing
            .iter()
            .map(|need| format!("{} ({})", need.name, need.why))
            .collect();
        let names: Vec<&str> = missing.iter().map(|need| need.name).collect();
        return Err(Error::wrong(
            "work with",
            "the capabilities of this process",
            format!("missing: {}", named.join("; ")),
            format!(
                "run as root, or add {} (in a pod: securityContext.capabilities.add, without the prefix CAP_)",
                names.join(", ")
            ),
        ));
    }
    let keep: CapsHashSet = NEEDED.iter().map(|need| need.capability).collect();
    // The bounding set takes CAP_SETPCAP, so it comes first; a container that was given only what is needed has no such
    // capability, and nothing to drop either.
    let bounding = caps::read(None, CapSet::Bounding).map_err(|e| failed("read", &e))?;
    let may = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)
        .map_err(|e| failed("read", &e))?;
    for capability in bounding.difference(&keep) {
        if !may {
            tracing::debug!(%capability, "stays in the bounding set: dropping it takes CAP_SETPCAP");
            continue;
        }
        caps::drop(None, CapSet::Bounding, *capability).map_err(|e| failed("drop", &e))?;
    }
    caps::clear(None, CapSet::Ambient).map_err(|e| failed("drop", &e))?;
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        let left = match set {
            CapSet::Inheritable => CapsHashSet::new(),
            _ => keep.clone(),
        };
        caps::set(None, set, &left).map_err(|e| failed("drop", &e))?;
    }
    nix::sys::prctl::set_no_new_privs()
        .map_err(|e| Error::system("renounce new privileges of", "this process", e.into()))
}

fn failed(what: &'static str, cause: &caps::errors::CapsError) -> Error {
    Error::system(
        what,
        "the capabilities of this thread",
        io::Error::other(cause.to_string()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_what_it_lists() {
        for need in NEEDED {
            assert_eq!(need.capability.to_string(), need.name);
            let row = format!("| {} | {} |", need.name, need.why);
            let page = include_str!("../../../docs/privileges.md");
            assert!(page.contains(&row), "docs/privileges.md lacks: {row}");
        }
    }

    #[test]
    fn a_process_with_threads_is_refused() {
        // The test harness has threads.
        let error = std::thread::spawn(drop_others).join().unwrap().unwrap_err();
        assert!(
            error.to_string().contains("before threads are started"),
            "{error}"
        );
    }
}
