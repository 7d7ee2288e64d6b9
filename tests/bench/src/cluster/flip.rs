//! A namespace's label comes and goes, and with it the enrolment of its pods, which run already.

use anyhow::Result;
use serde_json::{Value, json};

use super::fleet::{Fleet, Turned};
use crate::stats::Summary;

/// How long it took, in seconds.
#[derive(Debug)]
pub(super) struct Flips {
    pub(super) pods: usize,
    pub(super) enrol: Times,
    pub(super) release: Times,
}

/// One direction.
#[derive(Debug)]
pub(super) struct Times {
    pub(super) both: Summary,
    pub(super) ztunnel: Summary,
    pub(super) annotated: Summary,
}

impl Times {
    fn of(turns: &[Turned]) -> Self {
        let summary = |time: fn(&Turned) -> f64| Summary::of(turns.iter().map(time).collect());
        Self {
            both: summary(|turned| turned.both()),
            ztunnel: summary(|turned| turned.ztunnel),
            annotated: summary(|turned| turned.annotated),
        }
    }

    fn json(&self) -> Value {
        json!({"both": self.both.json(), "ztunnel": self.ztunnel.json(), "annotated": self.annotated.json()})
    }
}

/// Flips so often; nobody is in the mesh at the end.
pub(super) fn measure(fleet: &Fleet<'_>, flips: usize) -> Result<Flips> {
    let (mut enrol, mut release) = (vec![], vec![]);
    for flip in 0..flips {
        enrol.push(fleet.enrol()?);
        release.push(fleet.release()?);
        eprint!("\r  {} of {flips}", flip + 1);
    }
    eprintln!();
    Ok(Flips {
        pods: fleet.size,
        enrol: Times::of(&enrol),
        release: Times::of(&release),
    })
}

impl Flips {
    pub(super) fn json(&self) -> Value {
        json!({"unit": "s", "pods": self.pods, "enrol": self.enrol.json(), "release": self.release.json()})
    }
}
