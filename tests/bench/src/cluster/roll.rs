//! A Deployment rolled out inside the mesh and outside, in turn.

use anyhow::Result;
use serde_json::{Value, json};

use super::audit::{self, Audit};
use super::cost::Asked;
use super::fleet::Fleet;
use super::site::Site;
use crate::stats::Summary;

/// Seconds of a roll-out.
#[derive(Debug)]
pub(super) struct Rolls {
    pub(super) pods: usize,
    pub(super) inside: Summary,
    pub(super) outside: Summary,
    /// Of neighbours: a roll-out inside over the one outside before or after it.
    pub(super) ratio: Summary,
    /// By the node's agent, while pods start inside.
    pub(super) asked: Asked,
}

/// So many pairs, those of odd number the other way round; nobody is in the mesh at the end.
pub(super) fn measure(site: &Site, fleet: &Fleet<'_>, pairs: usize) -> Result<Rolls> {
    let (mut inside, mut outside) = (vec![], vec![]);
    let mut audit = Audit::new(site.cluster.audit_log());
    let mut asked = vec![];
    // What a first one alone has to do is nobody's.
    fleet.roll()?;
    for pair in 0..pairs {
        let first_inside = pair % 2 == 1;
        for into in [first_inside, !first_inside] {
            if into {
                fleet.enrol()?;
                audit.news()?;
                inside.push(fleet.roll()?);
                asked.extend(audit.news()?);
                fleet.release()?;
            } else {
                outside.push(fleet.roll()?);
            }
        }
        eprint!("\r  {} of {pairs}", pair + 1);
    }
    eprintln!();
    asked.retain(|one| one.node == fleet.node.name());
    let ratios = inside.iter().zip(&outside).map(|(i, o)| i / o).collect();
    Ok(Rolls {
        pods: fleet.size,
        asked: Asked {
            pods: fleet.size * inside.len(),
            kinds: audit::by_kind(&asked),
        },
        inside: Summary::of(inside),
        outside: Summary::of(outside),
        ratio: Summary::of(ratios),
    })
}

impl Rolls {
    pub(super) fn json(&self) -> Value {
        json!({
            "unit": "s", "pods": self.pods, "inside": self.inside.json(), "outside": self.outside.json(),
            "ratio": self.ratio.json(), "asked_while_pods_start": self.asked.json(),
        })
    }
}
