//! A Deployment rolled out inside the mesh and outside, in turn.

use anyhow::Result;
use serde_json::{Value, json};

use super::fleet::Fleet;
use crate::stats::Summary;

/// Seconds of a roll-out.
#[derive(Debug)]
pub(super) struct Rolls {
    pub(super) pods: usize,
    pub(super) inside: Summary,
    pub(super) outside: Summary,
    /// Of neighbours: a roll-out inside over the one outside before or after it.
    pub(super) ratio: Summary,
}

/// So many pairs, those of odd number the other way round; nobody is in the mesh at the end.
pub(super) fn measure(fleet: &Fleet<'_>, pairs: usize) -> Result<Rolls> {
    let (mut inside, mut outside) = (vec![], vec![]);
    // What a first one alone has to do is nobody's.
    fleet.roll()?;
    for pair in 0..pairs {
        let first_inside = pair % 2 == 1;
        for into in [first_inside, !first_inside] {
            if into {
                fleet.enrol()?;
                inside.push(fleet.roll()?);
                fleet.release()?;
            } else {
                outside.push(fleet.roll()?);
            }
        }
        eprint!("\r  {} of {pairs}", pair + 1);
    }
    eprintln!();
    let ratios = inside.iter().zip(&outside).map(|(i, o)| i / o).collect();
    Ok(Rolls {
        pods: fleet.size,
        inside: Summary::of(inside),
        outside: Summary::of(outside),
        ratio: Summary::of(ratios),
    })
}

impl Rolls {
    pub(super) fn json(&self) -> Value {
        json!({
            "unit": "s", "pods": self.pods, "inside": self.inside.json(), "outside": self.outside.json(),
            "ratio": self.ratio.json(),
        })
    }
}
