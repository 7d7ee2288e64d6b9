//! What a namespace and a lab's pins look like, and how two such looks differ in few words.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use culvert_lab::{Lab, Ns};

/// The settings that enrolment changes.
pub const SYSCTLS: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];

/// Addresses, rules, routes and settings of a namespace.
pub fn of(ns: &Ns) -> Result<Vec<String>> {
    ns.picture(&SYSCTLS)
}

/// The lab's pins and all of its node and these pods.
pub fn all(lab: &Lab, pods: &[&Ns]) -> Result<Vec<String>> {
    let mut lines: Vec<String> = lab
        .pins()?
        .iter()
        .map(|pin| format!("pin {}", pin.display()))
        .collect();
    for ns in pods.iter().copied().chain([lab.node()]) {
        lines.extend(
            of(ns)?
                .into_iter()
                .map(|line| format!("{}: {line}", ns.name())),
        );
    }
    Ok(lines)
}

/// Like `all`, once nothing changes any more: the kernel adds IPv6's own routes a moment after an address.
pub fn settled(lab: &Lab, pods: &[&Ns]) -> Result<Vec<String>> {
    let mut last = all(lab, pods)?;
    let mut equal = 0;
    crate::eventually("routes settle", || {
        std::thread::sleep(Duration::from_millis(30));
        let now = all(lab, pods)?;
        equal = if now == last { equal + 1 } else { 0 };
        last = now;
        Ok(equal == 3)
    })?;
    Ok(last)
}

/// Fails, naming what is gone and what is new, unless both are the same lines in the same order.
pub fn same(before: &[String], after: &[String]) -> Result<()> {
    if before == after {
        return Ok(());
    }
    let mut count: BTreeMap<&String, i32> = BTreeMap::new();
    for line in before {
        *count.entry(line).or_default() -= 1;
    }
    for line in after {
        *count.entry(line).or_default() += 1;
    }
    let changes: Vec<String> = count
        .iter()
        .filter(|(_, n)| **n != 0)
        .map(|(line, n)| format!("{} {line}", if *n < 0 { "gone:" } else { "new: " }))
        .collect();
    if changes.is_empty() {
        bail!("the same lines in another order:\n{after:#?}");
    }
    bail!("not as before:\n{}", changes.join("\n"))
}
