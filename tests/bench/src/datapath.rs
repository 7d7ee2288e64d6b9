//! The four ways in one interleaved run: each round has one slice of each measurement for each way, in an order of its own.

use anyhow::{Context as _, Result};
use culvert::kernel::Node;
use culvert_lab::{Family, Lab};

use crate::client::{self, Measure};
use crate::stats::{Shuffle, Summary};
use crate::ways::{self, Path, Way};
use crate::worker;

/// The four ways, set up.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) paths: Vec<Path>,
    /// Held for its maps while paths use them.
    _node: Node,
    /// Culvert's node.
    pub(crate) lab: Lab,
    /// Another one for the other ways: its sockets are in a cgroup without any of our programs, and pay nothing for them.
    _bare: Lab,
    apart: bool,
    cpus: Vec<usize>,
}

/// One way's figures in one measurement and family.
#[derive(Debug)]
pub(crate) struct WayResult {
    pub(crate) way: Way,
    /// Operations a second.
    pub(crate) rate: Summary,
    /// Of the straight way's rate in the same round.
    pub(crate) ratio: Summary,
    /// Processor microseconds an operation, client and listener together.
    pub(crate) cpu: Summary,
    /// Of the straight way's in the same round.
    pub(crate) cpu_ratio: Summary,
}

/// One measurement in one family.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) measure: Measure,
    pub(crate) family: Family,
    pub(crate) ways: Vec<WayResult>,
}

impl Row {
    pub(crate) fn way(&self, way: Way) -> Option<&WayResult> {
        self.ways.iter().find(|result| result.way == way)
    }
}

pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Field {
    pub(crate) fn new(name: &str, apart: bool) -> Result<Self> {
        let (lab, bare) = (Lab::new(name)?, Lab::new(&format!("{name}-bare"))?);
        let node = ways::load(&lab)?;
        let paths = Way::ALL
            .into_iter()
            .map(|way| {
                let at = if way == Way::Culvert { &lab } else { &bare };
                Path::new(at, &node, way)
                    .with_context(|| format!("setting up the way `{}`", way.name()))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            paths,
            _node: node,
            lab,
            _bare: bare,
            apart,
            cpus: worker::cpus()?,
        })
    }

    pub(crate) fn path(&self, way: Way) -> Result<&Path> {
        self.paths
            .iter()
            .find(|path| path.way == way)
            .context("every way has a path")
    }

    /// All of them on one processor, another one each round: then nothing idles, nothing hides in parallel, and what a
    /// connection takes is what it costs. With `apart`, clients on one and listeners on the next.
    fn pin(&self, round: usize) -> Result<()> {
        let at = |i: usize| self.cpus.get(i % self.cpus.len()).copied().unwrap_or(0);
        for path in &self.paths {
            path.client.thread().pin(at(round))?;
            path.proxy
                .thread()
                .pin(at(round + usize::from(self.apart)))?;
        }
        Ok(())
    }
}

/// Each way's rate and processor time, as in [`Way::ALL`].
type Round = [(f64, f64); 4];

struct Samples {
    measure: Measure,
    family: Family,
    rounds: Vec<Round>,
}

/// Runs the rounds.
pub(crate) fn measure(field: &Field, rounds: usize, measures: &[Measure]) -> Result<Vec<Row>> {
    let mut samples: Vec<Samples> = FAMILIES
        .into_iter()
        .flat_map(|family| {
            measures.iter().map(move |measure| Samples {
                measure: *measure,
                family,
                rounds: Vec::new(),
            })
        })
        .collect();
    let mut shuffle = Shuffle::new();
    for round in 0..rounds {
        field.pin(round)?;
        for sample in &mut samples {
            let mut order: Vec<usize> = (0..Way::ALL.len()).collect();
            shuffle.shuffle(&mut order);
            let mut taken = [(0.0, 0.0); 4];
            for index in order {
                let path = field.paths.get(index).context("every way has a path")?;
                let slice = client::slice(
                    &path.client,
                    &path.proxy,
                    path.target(sample.family),
                    sample.measure,
                    sample.measure.slice(),
                )
                .with_context(|| format!("the way `{}`", path.way.name()))?;
                if let Some(place) = taken.get_mut(index) {
                    *place = (slice.rate(), slice.cpu_each());
                }
            }
            sample.rounds.push(taken);
        }
    }
    Ok(samples.iter().map(row).collect())
}

fn row(samples: &Samples) -> Row {
    let of = |pick: &dyn Fn(&Round) -> f64| Summary::of(samples.rounds.iter().map(pick).collect());
    let ways = Way::ALL
        .into_iter()
        .enumerate()
        .map(|(i, way)| {
            let at = move |round: &Round| round.get(i).copied().unwrap_or_default();
            WayResult {
                way,
                rate: of(&|round| at(round).0),
                ratio: of(&|round| at(round).0 / round[0].0),
                cpu: of(&|round| at(round).1),
                cpu_ratio: of(&|round| at(round).1 / round[0].1),
            }
        })
        .collect();
    Row {
        measure: samples.measure,
        family: samples.family,
        ways,
    }
}
