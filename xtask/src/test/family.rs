//! A process and all that it has started, directly or through others: found in /proc, and ended. Process groups would not
//! do: servers that tests start have groups of their own, and Ctrl-C must go on reaching the tests.

use std::{collections::BTreeMap, fs, process::Stdio};

use anyhow::{Context as _, Result};

use crate::cmd;

/// Ends a process and its family by force.
pub(super) fn end(pid: u32) -> Result<()> {
    let mut family = vec![pid];
    loop {
        // Nobody may start anything while they are looked for.
        signal("STOP", &family)?;
        let now = descendants(pid, &parents()?);
        if now.iter().all(|one| family.contains(one)) {
            return signal("KILL", &family);
        }
        family = [&[pid][..], &now].concat();
    }
}

fn signal(name: &str, pids: &[u32]) -> Result<()> {
    // Those that have ended by themselves are fine, and `kill` fails because of them.
    cmd::command("kill")
        .args(["-s", name])
        .args(pids.iter().map(ToString::to_string))
        .stderr(Stdio::null())
        .status()
        .context("cannot run `kill`")?;
    Ok(())
}

/// Every process with its parent.
fn parents() -> Result<BTreeMap<u32, u32>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")
        .context("cannot read /proc")?
        .flatten()
    {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // One may end while it is looked at.
        let stat = fs::read_to_string(entry.path().join("stat"));
        if let (Some(pid), Ok(stat)) = (pid, stat)
            && let Some(parent) = parent_in(&stat)
        {
            parents.insert(pid, parent);
        }
    }
    Ok(parents)
}

/// The program's name, in parentheses, may hold blanks and parentheses.
fn parent_in(stat: &str) -> Option<u32> {
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(1)?.parse().ok()
}

fn descendants(of: u32, parents: &BTreeMap<u32, u32>) -> Vec<u32> {
    let mut found = vec![of];
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        let children = parents.iter().filter(|(_, of)| **of == parent);
        found.extend(children.map(|(pid, _)| *pid));
        at += 1;
    }
    found.split_off(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_children_and_theirs_and_nobody_else() {
        let parents = [(2, 1), (3, 2), (4, 3), (5, 1), (6, 2)];
        assert_eq!(descendants(2, &parents.into()), [3, 6, 4]);
        assert!(descendants(4, &parents.into()).is_empty());
    }

    #[test]
    fn the_parent_stands_behind_the_name_and_the_state() {
        assert_eq!(parent_in("7 (a) b) S 42 7 7 0"), Some(42));
        assert_eq!(parent_in("7 (a"), None);
    }
}
